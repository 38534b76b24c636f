"""Batches of calibration data: all items once, with little padding; and what a fold of texts is estimated to take."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from tiny import readable_checkpoint

import headfold
from headfold.calibration import TOKENS_PER_BATCH, batches, batches_in_order, num_tokens, text_lengths, total_tokens
from headfold.conversion import estimate
from headfold.conversion.estimate import item_operations as counted
from headfold.conversion.fold_job import FoldJob

LENGTHS = st.lists(st.integers(1, 512), min_size=1, max_size=300)


def texts(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Texts of these lengths; every token is the number of its text."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.arange(1, len(lengths) + 1)[:, None] * mask, "attention_mask": mask}


@given(lengths=LENGTHS)
def test_every_text_is_run_once_and_whole(lengths: list[int]) -> None:
    seen = {}
    for batch in batches(texts(lengths)):
        assert num_tokens(batch) <= TOKENS_PER_BATCH
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            assert int(row[0]) not in seen
            seen[int(row[0])] = int(mask.sum())
    assert [seen[number] for number in sorted(seen)] == lengths


def test_little_of_them_is_padding() -> None:
    """In their own order, one long text pads all texts of its batch."""
    lengths = torch.randint(1, 512, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    sample = texts(lengths)
    assert sum(lengths) <= total_tokens(sample) < 1.1 * sum(lengths)
    assert sum(map(num_tokens, batches_in_order(sample, TOKENS_PER_BATCH))) > 1.5 * sum(lengths)


def test_a_long_answer_to_a_short_text_counts() -> None:
    """A batch is bounded in the decoder, too, and a pair is as long as the longer of its texts."""
    inputs, answers = [2, 300, 5, 4], [256, 3, 7, 1]
    labels = torch.where(torch.arange(256) < torch.tensor(answers)[:, None], 1, -100)
    sample = texts(inputs) | {"labels": labels}
    assert text_lengths(sample).tolist() == [256, 300, 7, 4]
    many = {name: tensor.repeat(40, 1) for name, tensor in sample.items()}
    for batch in batches(many):
        assert max(batch["labels"].numel(), batch["input_ids"].numel()) <= TOKENS_PER_BATCH


def test_windows_of_text_keep_their_order() -> None:
    """Nothing of them is padding."""
    windows = torch.arange(64).view(8, 8)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches({"input_ids": windows})]), windows)


@pytest.mark.parametrize("words", [4, 12])
def test_a_fold_is_estimated_by_the_length_of_its_texts(
    words: int,
    tmp_path: Path,
    tokenizer: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not by one that is assumed."""
    lengths: list[int] = []
    monkeypatch.setattr(
        estimate, "item_operations", lambda source, length: lengths.append(length) or counted(source, length)
    )
    text = tmp_path / "texts.txt"
    text.write_text(16 * f"{' '.join(words * ['a'])}\n")
    source = readable_checkpoint(tmp_path / "bert", tokenizer, "bert")
    headfold.fold(source, tmp_path / "fold", kv_heads=1, calibration=str(text), items=16, verify=False)
    assert lengths == [len(tokenizer(" ".join(words * ["a"]))["input_ids"])]


def test_a_run_that_has_calibrated_needs_its_data_no_more(
    tmp_path: Path,
    tokenizer: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The texts lie beside the statistics."""
    text = tmp_path / "texts.txt"
    text.write_text(16 * "a b c d\n")
    source, out = readable_checkpoint(tmp_path / "bert", tokenizer, "bert"), tmp_path / "fold"
    how: dict[str, Any] = {"kv_heads": 1, "calibration": str(text), "items": 16, "verify": False}
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(FoldJob, "planned", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        headfold.fold(source, out, **how)
    text.unlink()
    headfold.fold(source, out, **how)
    assert (out / "config.json").exists()
