"""Measured sensitivities of sites on disk: loss increases by site and count, with what they were measured on."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.staging import write_json
from ..core.errors import UserError
from ..core.json_input import read_object

FORMAT = "headfold-sensitivity-3"

Sensitivities = Mapping[str, Mapping[int, float]]
"""Loss increase of one site folded alone, by the site's name and its count of K/V heads."""


def read_sensitivities(path: Path, about: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Return what was measured of the model, data and methods that `about` describes; empty where there is no file.

    Raises:
        UserError: another file is there, or one of other measurements.
    """
    if not path.exists():
        return {}
    try:
        found = read_object(path)
        # A file written before --dtype was recorded has no dtype, which is what None stands for.
        same = found["format"] == FORMAT and all(found.get(name) == value for name, value in about.items())
        measured = {name: {int(n): float(x) for n, x in row.items()} for name, row in found["loss_increase"].items()}
        if not all(math.isfinite(increase) for row in measured.values() for increase in row.values()):
            raise ValueError("a loss increase that is not finite")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: expected sensitivities that this version of headfold wrote; remove the file or name another"
        ) from error
    if not same:
        raise UserError(
            f"{path}: expected sensitivities of this model, data and method, got others; remove the file or name another"
        )
    return measured


def write_sensitivities(path: Path, about: Mapping[str, Any], measured: Sensitivities) -> None:
    """Write the file; it appears whole or not at all."""
    write_json(path, {"format": FORMAT, **about, "loss_increase": measured})


def sensitivity_path(out: Path) -> Path:
    """Return where sensitivities lie if no file is named: beside the plan `out`."""
    return out.with_name(f"{out.name.removesuffix('.json')}.sensitivity.json")


def path_of_multiple(path: Path, head_dim_multiple: int) -> Path:
    """Return the file of sensitivities of heads with this head_dim multiple."""
    if head_dim_multiple == 1:
        return path
    return path.with_suffix(f".head-dim-x{head_dim_multiple}{path.suffix}")
