"""The pages on serving engines: every command of headfold on them is run, the others are those that the records of engines give."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from test_cli import run  # noqa: F401 (a fixture)
from test_gguf import byte_level
from tiny import tiny_checkpoint

import headfold
from headfold.serving.ask import installed_here
from headfold.serving.engine import BUILDERS, Engine, all_engines, engine_named

PAGES = Path(__file__).parents[1] / "docs/how-to/engines"
FOLDS = {"llama": "my-model-gqa", "t5": "my-t5-gqa"}


def commands(page: Path) -> list[str]:
    """The lines of the page's shell blocks, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `my-model-gqa` is a fold, and `my-t5-gqa` one of a T5."""
    folder = tmp_path_factory.mktemp("served")
    how = {"kv_heads": "1/4", "merge": "mean", "group": "contiguous", "refit": False, "verify": False}
    for name, fields in (
        ("llama", {"max_position_embeddings": 512, "num_hidden_layers": 1}),
        ("t5", {"num_layers": 1}),
    ):
        source = shutil.copytree(tiny_checkpoint(name, torch.float32, **fields), folder / "source")
        byte_level(source)
        headfold.fold(source, folder / FOLDS[name], **how)
        shutil.rmtree(source)
    return folder


@pytest.mark.parametrize("engine", all_engines().values(), ids=lambda engine: engine.name)
def test_pages_say_what_the_records_say(engine: Engine) -> None:
    """`headfold check` prints the same commands, and `make engines` runs the engine."""
    page = PAGES / f"{engine.name}.md"
    assert engine.install in commands(page)
    form = engine.reads
    served = Path(f"my-model-gqa{'.gguf' if form == 'gguf' else f'-{form}' if form else ''}")
    assert engine.serve(served, {}).replace(str(BUILDERS), ".../builders") in commands(page)


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_commands_run(page: Path, folder: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Exports are written; a check of an engine that is not here says so, and how to install it."""
    monkeypatch.chdir(folder)
    ours = [command for command in commands(page) if command.startswith("headfold ")]
    assert ours
    for command in dict.fromkeys(ours):
        said = run(*shlex.split(command)[1:])
        missing = re.search(r"--engine ([a-z0-9-]+)", command)
        if missing and missing[1] not in installed_here():
            assert said.code == 2, command
            here = "expected a Python" if "=" in command else engine_named(missing[1]).install
            assert here in said.err, command
        else:
            assert said.code == 0, (command, said.err, said.out)
    for made in folder.iterdir():
        if made.name not in FOLDS.values():
            shutil.rmtree(made) if made.is_dir() else made.unlink()
