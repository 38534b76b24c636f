"""An endless stream of training data, read as needed and shuffled by seed, with another order in every epoch.

The items depend on source and seed only, not on the number of processes, so a run can be resumed or scaled on the same data.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ..core.errors import UserError
from ..corpus import open_corpus
from ..corpus.pairs import IGNORED
from ..corpus.samples import batches, draw_sample, image_sample_blocks
from ..corpus.windows import draw_windows

Item = dict[str, Tensor]
LABELLED = ("text", "pairs", "images", "sentences")
"""Kinds of data that models can be trained on (`corpus.samples.kind_of`)."""
IN_TEXT = ("captions", "spoken")
"""Kinds that wrappers can be trained on, too: texts with an image, or sound, each."""


class Stream(IterableDataset[Item]):
    """Yields the items of a source, epoch after epoch.

    Text is packed into windows of `context` tokens without padding, whose `labels` are the tokens themselves.
    """

    def __init__(
        self,
        kind: str,
        source: str,
        path: Path,
        tokenizer: Any,
        context: int,
        seed: int,
        columns: Sequence[str] = (),
        *,
        writer: Any = None,
        written_tokens: int = 0,
        seen: Collection[int] | None = None,
    ) -> None:
        """`path` is the model's directory, which holds its tokenizer or processor; `tokenizer` is given for text only, else None.

        `writer` is the model that writes the source `self`, other `written_tokens` in every epoch. `seen` are the tokens in whose place a
        wrapper puts images or sound, which are no labels; None for other models.

        Raises:
            UserError: a kind of data that cannot be trained on, or text that the model would have to write itself.
        """
        super().__init__()
        if kind not in LABELLED and (seen is None or kind not in IN_TEXT):
            raise UserError(f"uptrain: models of {kind} cannot be trained yet, expected one of {', '.join(LABELLED)}")
        if source == "self" and writer is None:
            raise UserError(
                "--data self: a model cannot be trained on text that it writes itself; name another source, or give --distill ORIGINAL"
            )
        self.kind, self.source, self.path, self.tokenizer = kind, source, path, tokenizer
        self.context, self.seed, self.columns = context, seed, columns
        self._sample: Item | None = None
        self._writer, self._written_tokens, self._seen = writer, written_tokens, seen

    def __iter__(self) -> Iterator[Item]:
        epoch = 0
        while True:
            count = 0
            for item in self._epoch(self.seed + epoch):
                yield item
                count += 1
            if count == 0:
                raise UserError(
                    f"{self.source}: expected at least one item of {self.context} tokens to train on, got none; give more data"
                )
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
        """Yield windows of concatenated documents, each with the tokenizer's special tokens; the remainder at the end of an epoch is
        dropped.
        """
        if self.source == "self":
            for window in self._written(seed):
                yield {"input_ids": window, "labels": window}
            return
        ids: list[int] = []
        for document in open_corpus(self.source, seed=seed).documents:
            ids += self.tokenizer(document, verbose=False)["input_ids"]
            for at in range(0, len(ids) - self.context + 1, self.context):
                window = torch.tensor(ids[at : at + self.context])
                yield {"input_ids": window, "labels": window}
            ids = ids[len(ids) // self.context * self.context :]

    def _written(self, seed: int) -> Tensor:
        """Return the windows that the writer writes by this seed; those of the first epoch, which is begun several times, once."""
        if seed == self.seed and self._sample is not None:
            return self._sample["input_ids"]
        windows = draw_windows(
            "self",
            tokenizer=self.tokenizer,
            model=self._writer,
            num_tokens=self._written_tokens,
            context=self.context,
            seed=seed,
        )
        if seed == self.seed:
            self._sample = {"input_ids": windows}
        return windows

    def _drawn(self, seed: int) -> Iterator[Item]:
        """Yield all items in a random order given by the seed."""
        if self._sample is None:
            self._sample = draw_sample(
                self.kind,
                self.source,
                path=self.path,
                context=self.context,
                num_items=None,
                seed=self.seed,
                columns=self.columns,
            )
            if self.kind in IN_TEXT:
                self._sample["labels"] = self._labels(self._sample)
        sample = self._sample
        number = len(next(iter(sample.values())))
        for at in torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist():
            yield {name: tensor[at] for name, tensor in sample.items()}

    def _labels(self, sample: Item) -> Tensor:
        """Return the tokens that a language model writes beside an image or sound, -100 at padding and where it is seen."""
        tokens = sample["input_ids"]
        unread = torch.isin(tokens, torch.tensor(sorted(self._seen or ()), dtype=tokens.dtype))
        return tokens.masked_fill(unread | (sample["attention_mask"] == 0), IGNORED)


def _items(sample: Mapping[str, Tensor]) -> Iterator[Item]:
    for at in range(len(next(iter(sample.values())))):
        yield {name: tensor[at] for name, tensor in sample.items()}


def collate(items: Sequence[Item]) -> Item:
    """Return one batch of items, without the columns that are padding in all of them."""
    stacked = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    (batch,) = batches(stacked, len(items))
    return batch
