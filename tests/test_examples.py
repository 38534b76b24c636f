"""The examples run from the package alone, and print what they promise."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_checkpoint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

import headfold

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SECONDS = 240
"""An idle core takes less than a tenth of it."""
PRINTED = {
    "fold_and_eval.py": "perplexity of the original",
    "in_memory.py": "K/V heads 8 before, 4 after",
    "budget.py": "layers.4.self",
    "custom_merge.py": "largest",
    "speech_folder.py": "loss per token of what is said",
    "fold_bundled.ipynb": "verified: True",
}
"""Example → a part of its output."""


def speech(folder: Path) -> list[str]:
    """A tiny Whisper that takes seconds of sound and knows three words, a folder of flac files, and a place for the fold."""
    soundfile = pytest.importorskip("soundfile")
    model = shutil.copytree(
        tiny_checkpoint("whisper", torch.float32, num_mel_bins=10, max_source_positions=50), folder / "whisper"
    )
    WhisperFeatureExtractor(feature_size=10, chunk_length=1).save_pretrained(model)
    spelling = Tokenizer(
        WordLevel({word: number for number, word in enumerate(["?", "<s>", "</s>", "a", "b", "c"])}, "?")
    )
    spelling.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=spelling, unk_token="?", eos_token="</s>").save_pretrained(model)
    (folder / "sounds").mkdir()
    for number in range(12):
        tone = np.sin(np.arange(6000) * (number + 3) / 40) / 2
        soundfile.write(folder / "sounds" / f"{number}.flac", tone, 16_000)
        (folder / "sounds" / f"{number}.txt").write_text("a b c b"[number % 3 :])
    return [str(model), str(folder / "sounds"), str(folder / "fold"), "--items", "6"]


ARGUMENTS: dict[str, Callable[[Path], list[str]]] = {
    "fold_and_eval.py": lambda folder: ["--tokens", "1024"],
    "budget.py": lambda folder: ["--tokens", "512"],
    "speech_folder.py": speech,
}
"""Example → what makes its arguments in a folder."""


def source(path: Path) -> str:
    """The code cells of a notebook, one after the other."""
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_every_example_is_run() -> None:
    found = {path.name for suffix in ("*.py", "*.ipynb") for path in EXAMPLES.glob(suffix)}
    assert found == PRINTED.keys()


ONE_AFTER_ANOTHER = """
import json, os, runpy, sys, traceback
import headfold

for name in headfold.__all__:
    getattr(headfold, name)  # imported once for all
for place, script, *words in json.loads(sys.argv[1]):
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            sys.exit(f"{script}: exit code {code}: " + open(f"{place}/stderr").read()[-2000:])
        continue
    os.chdir(place)
    for number, file in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.argv, code = [script, *words], 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""
"""Each example in a process of its own, forked from one that has imported the package, which takes longer than most of them."""


def test_the_examples_run(tmp_path: Path) -> None:
    commands = []
    for name in PRINTED:
        place = tmp_path / name
        place.mkdir()
        script = place / "notebook.py" if name.endswith(".ipynb") else EXAMPLES / name
        if name.endswith(".ipynb"):
            script.write_text(source(EXAMPLES / name))
        commands.append([str(place), str(script), *ARGUMENTS.get(name, lambda folder: [])(place)])
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(commands)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    for name, said in PRINTED.items():
        assert said in (tmp_path / name / "stdout").read_text()


def test_the_recipe_compares_three_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vl_convert", reason="the page has charts: pip install 'headfold[report]'")
    recipe = EXAMPLES / "three_methods.yaml"
    few = recipe.read_text().replace("8192", "1024")
    (tmp_path / "few.yaml").write_text(few)
    monkeypatch.chdir(ROOT)
    found = headfold.run(tmp_path / "few.yaml", tmp_path / "out")
    by_name = {row.name: row.value for row in found.rows}
    assert list(by_name) == ["default", "procrustes", "mean"]
    assert by_name["default"] < by_name["procrustes"] < by_name["mean"]
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


UNDER_LAWS = """
import sys
import pytest

class Merges:
    def pytest_configure(self):
        import headfold.merge
        headfold.merge.__path__.insert(0, sys.argv[1])

words = ["-q", "-p", "no:cacheprovider", "tests/test_merges.py", "tests/test_house.py", "-k", "largest"]
sys.exit(pytest.main(words, plugins=[Merges()]))
"""


def test_the_example_of_a_merge_is_under_the_laws() -> None:
    """As if it lay in headfold/merge."""
    ran = subprocess.run(
        [sys.executable, "-c", UNDER_LAWS, str(EXAMPLES / "merges")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    assert "passed" in ran.stdout


def test_the_notebook_is_committed_without_output() -> None:
    cells = json.loads((EXAMPLES / "fold_bundled.ipynb").read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
