"""Data as verbs take them, to calibrate or to measure: the name of a source, or data of the calling program, read once."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.config import read_config
from ..conversion.calibration_config import DEFAULT_ITEMS, CalibrationConfig, CalibrationRequest
from ..conversion.source import Source
from ..corpus.bounds import FROM_PYTHON
from ..corpus.rows import Row, Table, require, value
from ..corpus.samples import MAX_CONTEXT, NamedSample, Sample, draw_sample, kind_of, main_input, window_length
from ..corpus.windows import draw_windows, fingerprint
from ..families.context import context_length
from ..families.wrapped import is_wrapper
from ..hf_models import open_tokenizer
from .given import read_given
from .loaded import Need

_DIGITS = 16
"""Hexadecimal digits of the fingerprint in the name of data without another name."""


def calibration_data(
    source: Source,
    named: Any,
    tokens: int | None,
    items: int | None,
    columns: Sequence[str],
    context: int | None,
    seed: int,
) -> tuple[CalibrationRequest, Sample | None, list[str]]:
    """Return the request for calibration data, the data themselves where `named` is neither a source nor None, and what was left out.

    They are named by their content, so that a job goes on from what another run left only with the same data.

    Raises:
        UserError: as `read_given`; data of another kind than the model takes.
    """
    request, notes = CalibrationRequest(None, tokens, items, tuple(columns), context, seed), list[str]()
    if named is None or isinstance(named, str | os.PathLike):
        return replace(request, source=None if named is None else os.fspath(named)), None, notes
    config = CalibrationConfig.resolve(source, replace(request, source=FROM_PYTHON))
    context = window_length(source.config, config.context)
    limit = config.tokens if config.kind == "text" else config.items
    beside = items or DEFAULT_ITEMS["captions"] if config.kind == "text" and is_wrapper(source.config) else None
    need = Need(config.kind, source.config, context, limit, notes.append, beside)
    found = read_given(named, need, config.columns, config.seed)
    sample = found if isinstance(found, dict) else _encoded(source, found, config, context, notes)
    name = f"{FROM_PYTHON}{type(named).__name__}-{fingerprint(sample)[:_DIGITS]}"
    kind = config.kind
    if kind == "text" and "attention_mask" in sample:
        kinds = {"pixel_values": "captions", "input_features": "spoken"}
        kind = next((kinds[key] for key in kinds if key in sample), "texts")
    first = main_input(sample)
    return replace(request, source=name, kind=kind, tokens=first.numel(), items=len(first)), sample, notes


def _encoded(source: Source, rows: Table, config: CalibrationConfig, context: int, notes: list[str]) -> Sample:
    """Return rows as inputs of the model, as those of a file become."""
    path, columns, seed = source.checkpoint.path, config.columns, config.seed
    if config.kind != "text":
        return draw_sample(
            config.kind, rows, path=path, num_items=config.items, context=context, seed=seed, columns=columns, joined=True,
            say=notes.append,
        )  # fmt: skip
    return {
        "input_ids": draw_windows(
            rows,
            tokenizer=open_tokenizer(path),
            model=None,
            num_tokens=config.tokens,
            context=context,
            seed=seed,
            columns=columns,
        )
    }


def evaluation_data(
    directory: Path, named: Any, limit: int | None, context: int | None, columns: Sequence[str]
) -> str | None | Table | NamedSample:
    """Return data to measure the model of a directory on: the name of a source, or rows or a sample where `named` is none.

    Raises:
        UserError: as `read_given`.
    """
    if named is None or isinstance(named, str | os.PathLike):
        return None if named is None else os.fspath(named)
    config = read_config(directory)
    kind = kind_of(config)
    need = Need(kind, config, context or context_length(config) or MAX_CONTEXT, limit)
    found = read_given(named, need, columns)
    if isinstance(found, dict):
        return NamedSample(f"{FROM_PYTHON}{type(named).__name__}", found)
    if kind != "text":
        return found
    name, *_ = require(found, tuple(columns) or ("text",))

    def take(numbers: Sequence[int], wanted: Sequence[str]) -> Iterator[Row]:
        del wanted
        return ({"text": value(row, name)} for row in found.take(numbers, [name]))

    return Table(found.name, ("text",), found.count, take)
