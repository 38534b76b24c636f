"""A dataset of the Hugging Face hub, streamed: `hub:NAME[:CONFIG][:SPLIT][:COLUMN]` or `org/name`."""

from collections.abc import Iterator

from ..core.errors import UserError

SHUFFLE_BUFFER = 2_000
"""Documents held while drawing at random from a stream; the order of its shards is shuffled besides."""


def documents(spelling: str, seed: int | None = None) -> Iterator[str]:
    """The documents of `NAME[:CONFIG][:SPLIT][:COLUMN]` (split `train` and column `text` where left out) as they stream in.

    Raises:
        UserError: `datasets` is not installed, the hub cannot be reached, or it has no such dataset, split or column.
    """
    name, config, split, column = (spelling.split(":") + [""] * 3)[:4]
    stream = _open(name, config or None, split or "train")
    if seed is not None:
        stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    yield from _column(stream, name, column or "text")


def _open(name: str, config: str | None, split: str) -> Iterator[dict]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"hub:{name}: reading hub datasets needs the datasets library; pip install 'headfold[data]'"
        ) from error
    try:
        return datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # the hub client raises a dozen types for an absent name, a bad split or no network
        raise UserError(f"hub:{name}: {_first_line(error)}; write hub:NAME[:CONFIG][:SPLIT][:COLUMN]") from error


def _column(stream: Iterator[dict], name: str, column: str) -> Iterator[str]:
    rows = iter(stream)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # the network may go away at any row
            raise UserError(f"hub:{name}: reading stopped: {_first_line(error)}") from error
        if not isinstance(row.get(column), str):
            listed = ", ".join(row)
            raise UserError(
                f"hub:{name}: expected text under {column!r}, found columns {listed}; name one after the split"
            )
        if row[column]:
            yield row[column]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
