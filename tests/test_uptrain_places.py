"""Training a fold on from checkpoints that lie on disk, and from text that the original writes."""

import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import one_line
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from test_uptrain import BASELINE, SHORT, Stopped, folded, original, text  # noqa: F401 (fixtures)

import headfold
from headfold.core.errors import UserError
from headfold.train.distillation import Distillation
from headfold.train.sites import find_sites
from headfold.train.trainer import COMPLETE_MARK, _broken
from headfold.uptraining.job import Uptraining
from headfold.verbs.uptrain import uptrain

# ruff: noqa: F811


class Code:
    """An object whose pickle runs code when it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture(scope="module")
def killed(folded: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The staging directory that a killed run leaves."""
    out = tmp_path_factory.mktemp("killed") / "out"
    with pytest.raises(KeyboardInterrupt):
        uptrain(folded, out, data=text, **SHORT, callbacks=[Stopped(3)])
    return out.with_name("out.partial")


@pytest.fixture
def stopped(killed: Path, tmp_path: Path) -> Path:
    """The checkpoint in a copy of it, from which a run that writes to `tmp_path / "out"` goes on."""
    shutil.copytree(killed, tmp_path / "out.partial")
    (found,) = (tmp_path / "out.partial" / ".headfold-work").glob("checkpoint-*")
    return found


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_runs_no_code(
    name: str, stopped: Path, folded: Path, text: str, tmp_path: Path
) -> None:
    (stopped / COMPLETE_MARK).write_bytes(b"")  # who plants a file can change what says how it was
    for planted in (name, "training_args.bin"):  # the latter is never opened
        assert (stopped / planted).is_file()
        (stopped / planted).write_bytes(pickle.dumps(Code(tmp_path / "ran"), protocol=2))
    with pytest.raises(UserError) as error:
        uptrain(folded, tmp_path / "out", data=text, **SHORT)
    one_line(error, stopped, "remove it")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trainer_state.json", b"{"),
        ("trainer_state.json", b"[1]"),
        ("trainer_state.json", b'{"logging_steps": 0}'),
        ("model.safetensors", b""),
        ("optimizer.pt", bytes(100)),
    ],
)
def test_a_broken_checkpoint_is_one_line(
    name: str, content: bytes, stopped: Path, folded: Path, text: str, tmp_path: Path
) -> None:
    (stopped / COMPLETE_MARK).write_bytes(b"")
    (stopped / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        uptrain(folded, tmp_path / "out", data=text, **SHORT)
    one_line(error, stopped, "remove it to go on from an earlier one")
    assert not (tmp_path / "out").exists()


def test_whatever_a_library_says_of_a_checkpoint_is_one_line() -> None:
    class OfAnother(Exception):
        pass

    with pytest.raises(UserError, match="a broken one .no such rope."), _broken("checkpoint-2"):
        raise OfAnother("no such rope\nin line 3")


def test_one_process_removes_what_is_incomplete(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = SimpleNamespace(staging=stopped.parents[1], _last_checkpoint=lambda: pytest.fail("another process looked"))
    monkeypatch.setattr("headfold.uptraining.job.on_main", lambda look: stopped)
    assert Uptraining.last_checkpoint(job) == stopped  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "more"])
def test_a_checkpoint_that_has_changed_is_refused(
    name: str, stopped: Path, folded: Path, text: str, tmp_path: Path
) -> None:
    """It loads, and training would go on from another state."""
    file = stopped / name
    data = file.read_bytes() if file.exists() else b""
    file.write_bytes(
        data.replace(b'"global_step": 2', b'"global_step": 1') if name.endswith("json") else data[:-9] + bytes(9)
    )
    with pytest.raises(UserError) as error:
        uptrain(folded, tmp_path / "out", data=text, **SHORT)
    one_line(error, stopped, name, "remove it to go on from an earlier one")


@pytest.mark.parametrize(
    ("changed", "words"),
    [(dict(data="no-such-file.txt"), "no-such-file"), (dict(learning_rate=1e-5, resume=True), "leave --resume out")],
)
def test_a_request_that_is_refused_leaves_an_unfinished_training_alone(
    changed: dict[str, Any], words: str, stopped: Path, folded: Path, text: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        uptrain(folded, tmp_path / "out", **{"data": text, **SHORT, **changed})
    assert uptrain(folded, tmp_path / "out", data=text, **SHORT).resumed_at == 2


def test_what_a_teacher_does_alone_is_not_kept(original: Path, folded: Path) -> None:
    """The outputs of its sites while it writes text would fill the memory."""
    teacher, student = headfold.load(original), headfold.load(folded)
    distillation = Distillation(teacher, student, [site.output for site in find_sites(student)])
    tokens = torch.arange(9)[None]
    teacher(tokens)
    assert not any(distillation._outputs.values())
    distillation(student, {"input_ids": tokens})
    assert {len(found) for found in distillation._outputs.values()} == {2}


def test_a_fold_learns_from_text_that_its_original_writes(original: Path, folded: Path, tmp_path: Path) -> None:
    """As it was calibrated; other text in every epoch, and after a kill the same as without."""
    out = tmp_path / "fold"
    headfold.fold(original, out, kv_heads=2, tokens=64, context=16, verify=False)
    how: dict[str, Any] = dict(distill=original, **SHORT)
    calm = uptrain(out, tmp_path / "calm", **how)
    assert calm.data == "self" and len({entry["kl"] for entry in calm.curve}) == 6
    with pytest.raises(KeyboardInterrupt):
        uptrain(out, tmp_path / "out", **how, callbacks=[Stopped(5)])
    again = uptrain(out, tmp_path / "out", **how)
    assert again.resumed_at == 4 and again.curve == calm.curve
    for refused in (dict(data="self"), dict()):
        with pytest.raises(UserError, match="--distill ORIGINAL"):
            uptrain(out, tmp_path / "no", **refused, **SHORT)
