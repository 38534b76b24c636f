"""The command of the fold that is to follow, as a user can copy it."""

import shlex
from pathlib import Path

from ..conversion.source import Source
from ..corpus.samples import kind_of
from ..families.wrapped import is_wrapper
from ..towers import columns_of_tower


def next_fold(source: Source, num_kv_heads: int, *options: str) -> str:
    """Return the command that folds a source with these options; it names the data to calibrate on where none are bundled.

    Statistics (`--stats`) among the options say which data they were measured on.
    """
    name = source.name.rstrip("/")
    out = f"{Path(name).name.removesuffix('.gguf') or 'model'}-{'gqa' if num_kv_heads > 1 else 'mqa'}"
    words = ["headfold", "fold", name, out, *options]
    words += ["--adapter", source.plain.adapter] if source.plain.adapter else []
    words += ["--trust-remote-code"] if source.code else []
    columns = columns_of_tower(source.sites) if is_wrapper(source.config) else ""
    if "--stats" not in options and (columns or kind_of(source.config) != "text"):
        words += ["--calibration", "SOURCE", *(["--columns", columns] if columns else [])]
    return shlex.join(words)
