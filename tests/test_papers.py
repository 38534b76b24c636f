"""What the tables of papers stand on: batches of one length lose and repeat nothing, a table goes on where it was left."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from benchmarks.papers import runs


class Endless:
    """Items with as many labels as their number says."""

    seed = 3

    def __iter__(self):
        for number in range(10**6):
            yield {"labels": torch.full((number % 7 + 1,), number)}


def test_batches_of_one_length_hold_what_the_stream_holds() -> None:
    sorted_batches = runs.ByLength(Endless(), batch=4)
    size = sorted_batches.WINDOW * 4
    found, again = (list(islice(sorted_batches, 2 * size)) for _ in range(2))
    numbers = [int(item["labels"][0]) for item in found]
    assert sorted(numbers[:size]) == list(range(size)) and sorted(numbers) == list(range(2 * size))
    assert numbers == [int(item["labels"][0]) for item in again]
    lengths = [len(item["labels"]) for item in found]
    assert sum(max(lengths[at : at + 4]) - min(lengths[at : at + 4]) for at in range(0, size, 4)) <= 6


def test_a_table_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    facts = {"settings": {"rates": (1e-3,), "model": "t5"}}
    first = runs.Table("x", facts)
    first.run(("MHA", 1e-3, 0), lambda: {"nll": 2.5})
    second = runs.Table("x", facts)
    assert second.run(("MHA", 1e-3, 0), lambda: pytest.fail("made again")) == {"nll": 2.5}
    with pytest.raises(SystemExit, match="other settings"):
        runs.Table("x", {"settings": {"rates": (1e-4,), "model": "t5"}})


def test_the_deviation_is_that_of_the_sample() -> None:
    assert runs.mean_and_deviation([1.0, 2.0, 3.0]) == {"mean": 2.0, "sd": 1.0, "seeds": 3}
    assert runs.mean_and_deviation([1.0])["sd"] == 0.0
