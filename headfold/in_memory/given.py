"""Data that a Python program hands over instead of the name of a source: texts, rows with columns, or batches of a model's inputs."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core.errors import UserError
from ..corpus.bounds import FROM_PYTHON, drawn_order
from ..corpus.rows import Row, Table, encoded
from ..corpus.samples import Sample
from ..corpus.windows import CHARACTERS
from .loaded import MAIN, MOST, Need, sample_of_batches

_FORMS = "a list of texts, a Dataset, or an iterable of batches (dicts of tensors)"
_NOTHING = object()
"""The first item of data without any."""


def read_given(data: Any, need: Need, columns: Sequence[str] = (), seed: int | None = None) -> Table | Sample:
    """Return data as rows, of which the columns are still to be chosen and to be encoded, or batches as a sample.

    Data with a length whose items can be asked for by number (a list, a `datasets.Dataset`, a map-style dataset of torch) stay where they
    are, and readers draw from all of them by their seed; of batches and tokenized rows among them an order is drawn by `seed`. Anything
    else is read once, from its beginning, up to the limit. Rows of ids count as batches of one, unless `columns` are named.

    Raises:
        UserError: data of another form, or none; else as `sample_of_batches`.
    """
    name = f"{FROM_PYTHON}{type(data).__name__}"
    data = _opened(data, name)
    items: Iterator[Any]
    if numbered := _is_numbered(data):
        order = range(len(data)) if seed is None else drawn_order(len(data), seed)
        items, first = (data[number] for number in order), data[0] if len(data) else _NOTHING
    else:
        iterator = iter(data)
        first = next(iterator, _NOTHING)
        items = itertools.chain([first], iterator)
    if first is _NOTHING:
        raise UserError(f"{name}: expected {_FORMS}, got none; was the loader read before?")
    if not columns and (_is_batch(first) or _holds_tensors(first)):
        return sample_of_batches(items, need, name)
    return _table(data if numbered else list(_first(items, need)), name)


def _opened(data: Any, name: str) -> Any:
    """Return the data, or their form of rows, where they have several."""
    if isinstance(data, Mapping):
        what = f"one of its parts, {', '.join(map(str, data))}" if _of_datasets(data) else "a list of batches, [batch]"
        raise UserError(f"{name}: expected {_FORMS}, got a dict; give {what}")
    if isinstance(data, Tensor | bytes) or not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise UserError(f"{name}: expected {_FORMS}, got {type(data).__name__}; give one of them")
    if hasattr(data, "__dataframe__"):  # iterating over a table of pandas gives the names of its columns
        raise UserError(
            f"{name}: expected {_FORMS}, got a data frame; give frame.to_dict('records') or Dataset.from_pandas(frame)"
        )
    if _of_datasets(data) and hasattr(data, "cast_column"):  # a column of one has no types of its own
        return encoded(data)
    return data.tolist() if hasattr(data, "tolist") else data  # numpy's arrays, and columns of pandas


def _of_datasets(data: Any) -> bool:
    return type(data).__module__.partition(".")[0] == "datasets"


def _is_numbered(data: Any) -> bool:
    """Return whether items can be asked for by number: a loader has a length, and no items by number."""
    return isinstance(data, Sequence) or (hasattr(data, "__len__") and hasattr(data, "__getitem__"))


def _is_batch(item: Any) -> bool:
    return isinstance(item, Mapping) and any(key in item and not isinstance(item[key], str) for key in MAIN)


def _holds_tensors(item: Any) -> bool:
    """Return whether an item is a batch of another form than a dict, such as the tuples of a TensorDataset, which are refused."""
    return isinstance(item, Tensor) or (
        isinstance(item, list | tuple) and any(isinstance(part, Tensor) for part in item)
    )


def _first(items: Iterator[Any], need: Need) -> Iterator[Any]:
    """Yield as many items as are needed: of text as many characters as the tokens may have."""
    limit, count = need.limit or MOST, 0
    if need.kind == "text":
        limit *= CHARACTERS
    for item in items:
        yield item
        count += 1 if need.kind != "text" else max(1, sum(len(text) for text in _values(item) if isinstance(text, str)))
        if count >= limit:
            break
    if need.limit is None and count >= limit:
        raise UserError(f"{FROM_PYTHON}data: expected at most {MOST} tokens or items, got more; name how many to read")


def _values(item: Any) -> Iterable[Any]:
    return [item] if isinstance(item, str) else item.values() if isinstance(item, Mapping) else []


def _table(data: Any, name: str) -> Table:
    def take(numbers: Sequence[int], columns: Sequence[str]) -> Iterator[Row]:
        del columns
        return (_row(data[number], f"{name}: item {number + 1}") for number in numbers)

    return Table(name, tuple(map(str, next(take([0], ())))), len(data), take)


def _row(item: Any, where: str) -> Row:
    """Return an item as a row: a text, a pair of texts, an image of pillow, or what is one already."""
    if isinstance(item, str):
        return {"text": item}
    if isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(part, str) for part in item):
        return {"source": item[0], "target": item[1]}
    if isinstance(item, Mapping):
        return item
    if type(item).__module__.partition(".")[0] == "PIL":
        return {"image": item}
    raise UserError(
        f"{where}: expected a text, a row of named columns, or a batch of tensors by name, got {type(item).__name__}; correct the data"
    )
