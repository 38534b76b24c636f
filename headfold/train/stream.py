"""Training data without end: what a model takes, read as it is needed, drawn by seed, another order in every epoch.

The items depend on source and seed alone, not on how many processes share them: a run resumes, and scales, on the same data.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ..core.errors import UserError
from ..corpus import open_corpus
from ..corpus.samples import batches, draw_sample, image_sample_blocks

Item = dict[str, Tensor]
LABELLED = ("text", "pairs", "images", "sentences")
"""Kinds of data that can be trained on (`corpus.samples.kind_of`)."""


class Stream(IterableDataset):
    """Items of a source, epoch after epoch. Text is packed: windows of `context` tokens, no padding, `labels` the tokens themselves."""

    def __init__(
        self, kind: str, source: str, path: Path, tokenizer: Any, context: int, seed: int, columns: Sequence[str] = ()
    ) -> None:
        """`path` is the model's directory, for its tokenizer or processor; `tokenizer` is that of text, else None."""
        super().__init__()
        if kind not in LABELLED:
            raise UserError(
                f"uptrain: a model of {kind} cannot be trained here yet; expected one of {', '.join(LABELLED)}"
            )
        if source == "self":
            raise UserError("--data self: the model would learn from itself alone; name text, or another source")
        self.kind, self.source, self.path, self.tokenizer = kind, source, path, tokenizer
        self.context, self.seed, self.columns = context, seed, columns
        self._sample: Item | None = None

    def __iter__(self) -> Iterator[Item]:
        epoch = 0
        while True:
            count = 0
            for item in self._epoch(self.seed + epoch):
                yield item
                count += 1
            if count == 0:
                raise UserError(f"{self.source}: not one item of {self.context} tokens to train on; give more data")
            epoch += 1

    def _epoch(self, seed: int) -> Iterator[Item]:
        if self.kind == "text":
            yield from self._windows(seed)
        elif self.kind == "images":
            blocks = image_sample_blocks(self.source, path=self.path, num_items=None, seed=seed, columns=self.columns)
            for block in blocks:
                yield from _items(block)
        else:
            yield from self._drawn(seed)

    def _windows(self, seed: int) -> Iterator[Item]:
        """Documents one behind the other, each with the tokenizer's own special tokens; what is left at the end of an epoch is dropped."""
        ids: list[int] = []
        for document in open_corpus(self.source, seed=seed).documents:
            ids += self.tokenizer(document, verbose=False)["input_ids"]
            for at in range(0, len(ids) - self.context + 1, self.context):
                window = torch.tensor(ids[at : at + self.context])
                yield {"input_ids": window, "labels": window}
            ids = ids[len(ids) // self.context * self.context :]

    def _drawn(self, seed: int) -> Iterator[Item]:
        """All items in the order that the seed draws."""
        if self._sample is None:
            asked = {"path": self.path, "context": self.context, "columns": self.columns}
            self._sample = draw_sample(self.kind, self.source, num_items=None, seed=self.seed, **asked)
        sample = self._sample
        number = len(next(iter(sample.values())))
        for at in torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist():
            yield {name: tensor[at] for name, tensor in sample.items()}


def _items(sample: Mapping[str, Tensor]) -> Iterator[Item]:
    for at in range(len(next(iter(sample.values())))):
        yield {name: tensor[at] for name, tensor in sample.items()}


def collate(items: Sequence[Item]) -> Item:
    """One batch, without columns that pad every item."""
    stacked = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    (batch,) = batches(stacked, len(items))
    return batch
