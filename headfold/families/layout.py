"""Names and layouts on disk ↔ `Heads`: the only place that reshapes checkpoints."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from ..core.errors import UserError
from ..core.groups import Groups
from ..core.heads import Heads
from .spec import Site

_ROWS = "(head dim) model -> head dim model"
_COLUMNS = "model (head dim) -> head dim model"


def _inverse(pattern: str) -> str:
    """The pattern that undoes `pattern`: its sides swapped."""
    left, right = pattern.split(" -> ")
    return f"{right} -> {left}"


def _segments(site: Site, num_groups: int) -> dict[str, int]:
    """Rows of each projection."""
    return {"q": site.num_heads * site.head_dim, "k": num_groups * site.head_dim, "v": num_groups * site.head_dim}


def read_heads(site: Site, read: Callable[[str], Tensor]) -> Heads:
    """The site's heads; `read` gives a tensor by its name on disk. Dtype stays the checkpoint's."""
    rows = {role: _homogeneous(site, role, read) for role in ("q", "k", "v", "qkv") if role in site.weights}
    if "qkv" in rows:
        parts = rows.pop("qkv").split(list(_segments(site, site.num_groups).values()))
        rows = dict(zip(("q", "k", "v"), parts, strict=True))
    split = {role: rearrange(t, _ROWS, dim=site.head_dim) for role, t in rows.items()}
    extras = {
        name: read(f"{site.weights[role]}.weight")
        for name, role in (("q_gain", "q_norm"), ("k_gain", "k_norm"))
        if role in site.weights
    }
    return Heads(
        **split,
        **extras,
        o=rearrange(read(f"{site.weights['o']}.weight"), _COLUMNS, dim=site.head_dim),
        o_bias=read(f"{site.weights['o']}.bias") if "o" in site.biases else None,
        kv_of_query=Groups.contiguous(site.num_heads, site.num_groups),
        key_freedom=site.key_freedom,
        query_order=site.query_order,
    )


def _homogeneous(site: Site, role: str, read: Callable[[str], Tensor]) -> Tensor:
    """[W | b] of one linear, b zero where the checkpoint has none."""
    weight = read(f"{site.weights[role]}.weight")
    bias = read(f"{site.weights[role]}.bias") if role in site.biases else weight.new_zeros(weight.shape[0])
    return torch.cat([weight, bias[:, None]], 1)


def write_heads(site: Site, heads: Heads) -> dict[str, Tensor]:
    """The tensors of the site by their names on disk: the inverse of `read_heads`. Heads must be in standard order."""
    assert heads.kv_of_query.is_contiguous
    joined = {role: rearrange(getattr(heads, role), _inverse(_ROWS)) for role in ("q", "k", "v")}
    if "qkv" in site.weights:
        joined = {"qkv": torch.cat(list(joined.values()))}
    tensors = {}
    for role, rows in joined.items():
        tensors[f"{site.weights[role]}.weight"] = rows[:, :-1].contiguous()
        if role in site.biases:
            tensors[f"{site.weights[role]}.bias"] = rows[:, -1].contiguous()
    tensors[f"{site.weights['o']}.weight"] = rearrange(heads.o, _inverse(_COLUMNS)).contiguous()
    if heads.o_bias is not None:
        tensors[f"{site.weights['o']}.bias"] = heads.o_bias
    return tensors


def planned_shapes(
    site: Site, num_groups: int, shape_of: Callable[[str], tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that `write_heads` will give once the site has `num_groups` K/V heads; nothing is read."""
    rows = _segments(site, num_groups)
    rows["qkv"] = sum(rows.values())
    shapes = {}
    for role in ("q", "k", "v", "o", "qkv"):
        for suffix in ("weight", "bias"):
            name = f"{site.weights.get(role)}.{suffix}"
            if role in site.weights and (suffix == "weight" or role in site.biases):
                old = shape_of(name)
                shapes[name] = (rows.get(role, old[0]), *old[1:])
    return shapes


def check_shapes(site: Site, shape_of: Callable[[str], tuple[int, ...]], where: str) -> None:
    """Refuse a site whose tensors are not as large as the config says.

    Raises:
        UserError: where, expected, got, what to do.
    """
    expected = planned_shapes(site, site.num_groups, shape_of)
    output = f"{site.weights['o']}.weight"
    expected[output] = (*shape_of(output)[:1], site.num_heads * site.head_dim)
    expected |= {
        f"{site.weights[role]}.weight": (site.head_dim,) for role in ("q_norm", "k_norm") if role in site.weights
    }
    for name, shape in expected.items():
        if tuple(shape_of(name)) != shape:
            raise UserError(
                f"{where}: {name} has shape {tuple(shape_of(name))}, expected {shape} from {site.num_heads} query "
                f"heads, {site.num_groups} K/V heads of size {site.head_dim}; correct the config or the checkpoint"
            )
