"""A job that cannot be done loses nothing of an earlier one, and an interrupt is one line from the first import on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from tiny import readable_checkpoint, tiny_checkpoint

import headfold
from headfold.checkpoint.staging import open_staging
from headfold.conversion.source import open_source
from headfold.core.errors import UserError
from headfold.hf_models import readers

TEXT = "what was there before is there afterwards\n" * 40
WITHOUT_IMPORTS = """
import sys
class Interrupted:
    def find_spec(self, name, *rest):
        if name == NAME:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from headfold.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:  # noqa: F811
    return readable_checkpoint(tmp_path_factory.mktemp("lost") / "model", tokenizer)


@pytest.mark.parametrize("verb", ["fold", "route"])
def test_data_that_are_not_there_are_missed_before_what_another_job_left_is_removed(
    model: Path, tmp_path: Path, verb: str
) -> None:
    out, folded = tmp_path / "out", tmp_path / "folded"
    headfold.fold(model, folded, kv_heads=4, merge="mean", group="contiguous", refit=False, verify=False)
    done = open_staging(out, "another job", False) / "done"
    done.write_text("hours of work")

    def ask(source: Path) -> None:
        if verb == "fold":
            headfold.fold(model, out, kv_heads=4, calibration=str(source), tokens=256, context=16, verify=False)
        else:
            headfold.route(folded, out, calibration=str(source), tokens=256, context=16)

    with pytest.raises(UserError, match="gone.txt"):
        ask(tmp_path / "gone.txt")
    assert done.read_text() == "hours of work"
    (tmp_path / "there.txt").write_text(TEXT)
    ask(tmp_path / "there.txt")
    assert (out / "config.json").exists() and not (tmp_path / "out.partial").exists()


def test_an_output_that_is_taken_is_refused_before_data_are_drawn(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    open_staging(out, "another job", False)
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(UserError, match="--force"):
        headfold.fold(model, out, kv_heads=4, calibration=str(tmp_path / "gone.txt"), tokens=256, context=16)


@pytest.mark.parametrize("name", ["typer", "headfold.threads"])
def test_an_interrupt_while_the_command_line_is_imported_is_one_line(name: str) -> None:
    words = [sys.executable, "-c", WITHOUT_IMPORTS.replace("NAME", repr(name)), "methods"]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "headfold: interrupted\n")


def test_the_installed_program_takes_that_way_in() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"headfold": "headfold.__main__:main"}


def test_a_config_with_strange_rotary_parameters_is_named_with_its_place(tmp_path: Path) -> None:
    place = tmp_path / "strange"
    shutil.copytree(tiny_checkpoint("llama", torch.float32), place)
    config = json.loads((place / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e-308}
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"^{place}/config.json: expected rotary parameters that give finite"):
        open_source(place)


def test_the_ids_of_a_tokenizer_are_checked_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, reads = tmp_path / "tokenizer.json", []
    read = readers.read_object
    monkeypatch.setattr(readers, "read_object", lambda path: reads.append(path) or read(path))
    file.write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    for _ in range(3):
        readers.check_ids(file)
    assert reads == [file]
    file.write_text(json.dumps({"model": {"vocab": {"a": -10}}}))
    for _ in range(2):  # what is wrong is said every time
        with pytest.raises(UserError, match="expected ids of tokens"):
            readers.check_ids(file)
    assert len(reads) == 3
