"""A dataset of the Hugging Face hub, streamed: `hub:NAME[:CONFIG][:SPLIT][:COLUMN]` or `org/name`."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..core.errors import UserError

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""A repository of the hub, with or without its owner."""
SHUFFLE_BUFFER = 2_000
"""Documents that are held in memory to draw at random from a stream; its shards are shuffled too."""


def documents(spelling: str, seed: int | None = None) -> Iterator[str]:
    """Yield the documents of `NAME[:CONFIG][:SPLIT][:COLUMN]` (by default split `train` and column `text`) as they are streamed.

    Raises:
        UserError: `datasets` is not installed, the hub cannot be reached, or it has no such dataset, split or column.
    """
    name, config, split, column = (spelling.split(":") + [""] * 3)[:4]
    stream = open_stream(name, config or None, split or "train")
    if seed is not None:
        stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    yield from _column(stream, name, column or "text")


def open_stream(name: str, config: str | None, split: str) -> Any:
    """Return the streamed rows of a split, as `datasets` opens them.

    Raises:
        UserError: no name that a dataset can have, `datasets` is not installed, the hub cannot be reached, or it has no such dataset or
            split.
    """
    # `datasets` takes an empty name for the working directory, and looks for others among its paths too.
    if not (_NAME.fullmatch(name) or (name and Path(name).is_dir())):
        raise UserError(f"hub:{name}: expected a dataset such as org/name; write hub:NAME[:CONFIG][:SPLIT][:COLUMN]")
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"hub:{name}: reading hub datasets needs the datasets library; pip install 'headfold[data]'"
        ) from error
    try:
        return datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # the hub client raises a dozen types for an absent name, a bad split or no network
        raise UserError(f"hub:{name}: {first_line(error)}; write hub:NAME[:CONFIG][:SPLIT][:COLUMN]") from error


def _column(stream: Iterable[dict[str, Any]], name: str, column: str) -> Iterator[str]:
    rows = iter(stream)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # the network may go away at any row
            raise UserError(f"hub:{name}: reading stopped: {first_line(error)}") from error
        if not isinstance(row.get(column), str):
            listed = ", ".join(row)
            raise UserError(
                f"hub:{name}: expected text under {column!r}, found columns {listed}; name one after the split"
            )
        if row[column]:
            yield row[column]


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
