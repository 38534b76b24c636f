"""Names and layouts on disk ↔ `Heads`: the only place that reshapes tensors of a checkpoint."""

from collections.abc import Callable
from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from ..core.distances import NUM_BINS
from ..core.errors import UserError
from ..core.groups import Groups
from ..core.heads import Heads
from .spec import Site

_ROWS = "(head dim) model -> head dim model"
_COLUMNS = "model (head dim) -> head dim model"
_SHARDS = "(shard role row) model"
_PER_HEAD = ("bias_table", "sinks")
_GAINS = {"q_gain": "q_norm", "k_gain": "k_norm"}


def _inverse(pattern: str) -> str:
    """Return the einops pattern that undoes `pattern`: its sides swapped."""
    left, right = pattern.split(" -> ")
    return f"{right} -> {left}"


def _rows(site: Site, num_kv_heads: int, head_dim_multiple: int = 1) -> dict[str, int]:
    """Return the number of rows of each projection."""
    dim = head_dim_multiple * site.head_dim
    each = {"q": site.num_heads * dim, "k": num_kv_heads * dim, "v": num_kv_heads * dim}
    return {**each, "qkv": sum(each.values())}


def read_heads(site: Site, read: Callable[[str], Tensor]) -> Heads:
    """Return the site's heads; `read` returns a tensor by its name on disk. The dtype is the checkpoint's, norm gains are
    float64."""
    rows = {role: _homogeneous(site, role, read) for role in ("q", "k", "v", "qkv") if role in site.weights}
    split = _unfuse(site, rows["qkv"]) if "qkv" in rows else rows
    output = read(site.tensor("o"))
    gains = {
        name: _by_head(site, read(site.tensor(role)).double()) for name, role in _GAINS.items() if role in site.weights
    }
    # A table of position bias is (bucket, head) on disk, sinks are (head,): heads come first here.
    per_head = {role: read(site.tensor(role)).movedim(-1, 0) for role in _PER_HEAD if role in site.weights}
    return Heads(
        **{role: rearrange(split[role], _ROWS, dim=site.head_dim) for role in ("q", "k", "v")},
        **gains,
        gain_offset=site.norm_gain_offset,
        o=rearrange(output.T if site.transposed else output, _COLUMNS, dim=site.head_dim),
        o_bias=read(f"{site.weights['o']}.bias") if "o" in site.biases else None,
        groups=Groups.contiguous(site.num_heads, site.num_kv_heads),
        key_freedom=site.key_freedom,
        query_order=site.query_order,
        per_head=per_head,
    )


def _by_head(site: Site, gain: Tensor) -> Tensor:
    return gain.unflatten(0, (-1, site.head_dim)) if site.key_freedom.norm_spans_heads else gain


def _homogeneous(site: Site, role: str, read: Callable[[str], Tensor]) -> Tensor:
    """Return [W | b] of one linear, with b zero where the checkpoint has no bias."""
    weight = read(f"{site.weights[role]}.weight")
    weight = weight.T if site.transposed else weight
    bias = read(f"{site.weights[role]}.bias") if role in site.biases else weight.new_zeros(weight.shape[0])
    return torch.cat([weight, bias[:, None]], 1)


def _unfuse(site: Site, rows: Tensor) -> dict[str, Tensor]:
    """Return the rows of q, k and v from those of their common projection."""
    counts = _rows(site, site.num_kv_heads)
    if site.fused == "segments":
        return dict(zip("qkv", rows.split([counts[role] for role in "qkv"]), strict=True))
    if site.fused == "four-shards":
        return dict(zip("qvk", rearrange(rows, f"{_SHARDS} -> role (shard row) model", shard=4, role=3), strict=True))
    slots = rearrange(
        rows, "(group slot dim) model -> slot group dim model", group=site.num_kv_heads, dim=site.head_dim
    )
    q = rearrange(slots[:-2], "query group dim model -> (group query dim) model")
    return {
        "q": q,
        **{role: rearrange(slots[at], "group dim model -> (group dim) model") for role, at in (("k", -2), ("v", -1))},
    }


def _fuse(site: Site, rows: dict[str, Tensor]) -> Tensor:
    """Return the rows of the common projection: the inverse of `_unfuse`."""
    if site.fused == "segments":
        return torch.cat([rows[role] for role in "qkv"])
    if site.fused == "four-shards":
        return rearrange([rows[role] for role in "qvk"], f"role (shard row) model -> {_SHARDS}", shard=4)
    sizes = {"group": site.num_kv_heads, "dim": site.head_dim}
    q = rearrange(rows["q"], "(group query dim) model -> group query dim model", **sizes)
    k, v = (rearrange(rows[role], "(group dim) model -> group 1 dim model", **sizes) for role in "kv")
    return rearrange(torch.cat([q, k, v], 1), "group slot dim model -> (group slot dim) model")


def write_heads(site: Site, heads: Heads, *, in_slots: bool = False) -> dict[str, Tensor]:
    """Return the tensors of the site by their names on disk: the inverse of `read_heads`. Heads must be in standard order.

    Gains of norms are float64 here. A grouped site of a class without a count of K/V heads has q, k and v as separate linears.
    Heads with a multiple of the source's head_dim have their dims in the order in which their class rotates them; with
    `in_slots`, or where their class cannot take them, slot by slot, with q, k and v separate.
    """
    assert heads.groups.is_ordered
    head_dim_multiple = heads.head_dim // site.head_dim
    if head_dim_multiple > 1 and site.any_head_dim and not in_slots:
        order = rotary_order(site, head_dim_multiple)
        heads = replace(heads, q=heads.q[:, order], k=heads.k[:, order])
    joined = {role: rearrange(getattr(heads, role), _inverse(_ROWS)) for role in ("q", "k", "v")}
    splits = site.splits(heads.num_kv_heads) or (in_slots and head_dim_multiple > 1 and "qkv" in site.weights)
    names = {**site.weights, **(site.unfused if splits else {})}
    if "qkv" in site.weights and not splits:
        joined = {"qkv": _fuse(site, joined)}
    tensors = {}
    for role, rows in joined.items():
        weight = rows[:, :-1]
        tensors[f"{names[role]}.weight"] = (weight.T if site.transposed and not splits else weight).contiguous()
        if role in site.biases or (splits and "qkv" in site.biases):
            tensors[f"{names[role]}.bias"] = rows[:, -1].contiguous()
    output = rearrange(heads.o, _inverse(_COLUMNS))
    tensors[f"{names['o']}.weight"] = (output.T if site.transposed else output).contiguous()
    if heads.o_bias is not None:
        tensors[f"{names['o']}.bias"] = heads.o_bias
    for field, role in _GAINS.items():
        if role in site.weights and (gain := getattr(heads, field)) is not None:
            tensors[site.tensor(role)] = gain.flatten()
    return tensors | {site.tensor(role): extra.movedim(0, -1).contiguous() for role, extra in heads.per_head.items()}


def rotary_order(site: Site, head_dim_multiple: int) -> Int[Tensor, " slot_times_dim"]:
    """Return where each dim of a head that rotates as one is found in its slots.

    The rotary dims come first, by falling frequency (frequency, slot), then the others (slot, dim).
    """
    freedom = site.key_freedom
    wide = replace(freedom, rotary_dim=head_dim_multiple * freedom.rotary_dim)
    slots = site.head_dim * torch.arange(head_dim_multiple)
    order = torch.empty(head_dim_multiple * site.head_dim, dtype=torch.long)
    if freedom.rotary_dim:
        order[wide.planes()] = (freedom.planes()[:, None] + slots[:, None]).flatten(0, 1)
    rest = torch.arange(freedom.rotary_dim, site.head_dim)
    order[wide.rotary_dim :] = (slots[:, None] + rest).flatten()
    return order


def planned_shapes(
    site: Site, num_kv_heads: int, shape_of: Callable[[str], tuple[int, ...]], head_dim_multiple: int = 1
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors that `write_heads` will return once the site has `num_kv_heads` K/V heads; nothing is
    read."""
    rows = _rows(site, num_kv_heads, head_dim_multiple)
    splits = site.splits(num_kv_heads)
    shapes: dict[str, tuple[int, ...]] = {
        site.tensor(role): tuple(shape_of(site.tensor(role))) for role in _PER_HEAD if role in site.weights
    }
    spans = site.key_freedom.norm_spans_heads
    for role, num_heads in (("q_norm", site.num_heads), ("k_norm", num_kv_heads)):
        if role in site.weights:
            shapes[site.tensor(role)] = ((num_heads if spans else 1) * site.head_dim,)
    for role in ("q", "k", "v", "o", "qkv"):
        for suffix in ("weight", "bias"):
            if role not in site.weights or not (suffix == "weight" or role in site.biases):
                continue
            old = tuple(shape_of(f"{site.weights[role]}.{suffix}"))
            if role == "o":
                inputs = site.num_heads * head_dim_multiple * site.head_dim
                wide = (inputs, *old[1:]) if site.transposed else (*old[:1], inputs)
                shapes[f"{site.weights[role]}.{suffix}"] = wide if suffix == "weight" else old
                continue
            stored_transposed = site.transposed and suffix == "weight"
            model = (old[:1] if stored_transposed else old[1:]) if suffix == "weight" else ()
            for part in "qkv" if splits else (role,):
                name = site.unfused[part] if splits else site.weights[role]
                shape = (rows[part], *model)
                shapes[f"{name}.{suffix}"] = shape[::-1] if stored_transposed and not splits else shape
    return shapes


def renamed(site: Site, num_kv_heads: int) -> dict[str, tuple[str, ...]]:
    """Return the tensors that are replaced by others, by name on disk, each with the names of those."""
    if not site.splits(num_kv_heads):
        return {}
    suffixes = ["weight", *(["bias"] if "qkv" in site.biases else [])]
    return {
        f"{site.weights['qkv']}.{suffix}": tuple(f"{name}.{suffix}" for name in site.unfused.values())
        for suffix in suffixes
    }


def check_shapes(site: Site, shape_of: Callable[[str], tuple[int, ...]], where: str) -> None:
    """Check that the tensors of a site have the shapes that the config implies.

    Raises:
        UserError: names the tensor, both shapes, and what to do.
    """
    for role in ("q", "k", "v", "qkv", "o"):
        if role in site.weights and len(shape := shape_of(site.tensor(role))) != 2:
            raise UserError(
                f"{where}: {site.tensor(role)} has shape {tuple(shape)}, expected a matrix; correct the checkpoint"
            )
    if site.fused == "four-shards" and site.num_heads % 4:
        raise UserError(f"{where}: expected a multiple of 4 heads, got {site.num_heads}; correct the config")
    expected = planned_shapes(site, site.num_kv_heads, shape_of)
    inputs = _inputs(site, shape_of)
    same = {"k": inputs["k"], "v": inputs["k"], **({} if site.reads_encoder else {"q": inputs["k"]})}
    if site.input_norm is not None and tuple(found := shape_of(site.input_norm)) != (inputs["q"],):
        raise UserError(
            f"{where}: {site.input_norm} has shape {tuple(found)}, expected {(inputs['q'],)}; correct the checkpoint"
        )
    for role, expected_inputs in same.items():
        if inputs[role] != expected_inputs:
            raise UserError(
                f"{where}: {site.tensor(role)} has {inputs[role]} inputs, expected {expected_inputs} as {site.tensor('k')}; "
                "correct the checkpoint"
            )
    for name, shape in expected.items():
        if tuple(shape_of(name)) != shape:
            raise UserError(
                f"{where}: {name} has shape {tuple(shape_of(name))}, expected {shape} from {site.num_heads} query "
                f"heads, {site.num_kv_heads} K/V heads of size {site.head_dim}; correct the config or the checkpoint"
            )


def shapes_of_statistics(site: Site, shape_of: Callable[[str], tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the statistics of a site have (`core.stats.SiteStats`)."""
    inputs = _inputs(site, shape_of)
    square = {"second": inputs["k"] + 1, "scatter": inputs["k"], "query_second": inputs["q"] + 1}
    return {**{name: (size, size) for name, size in square.items()}, "attended": (site.num_kv_heads, NUM_BINS)}


def _inputs(site: Site, shape_of: Callable[[str], tuple[int, ...]]) -> dict[str, int]:
    """Return the number of inputs of the projections that make queries, keys and values."""
    axis = 0 if site.transposed else 1
    return {role: shape_of(site.tensor("qkv" if "qkv" in site.weights else role))[axis] for role in "qkv"}


def check_dtypes(site: Site, dtype_of: Callable[[str], torch.dtype], where: str) -> None:
    """Check that the tensors of a site which a fold writes anew have one dtype, of real numbers.

    Raises:
        UserError: names the tensor and the dtypes.
    """
    names = [site.tensor(role) for role in ("q", "k", "v", "qkv", "o") if role in site.weights]
    names += [f"{site.weights[role]}.bias" for role in sorted(site.biases)]
    expected = dtype_of(site.tensor("o"))
    for name in names:
        if (found := dtype_of(name)) != expected or not found.is_floating_point:
            raise UserError(
                f"{where}: {name}: expected one dtype of real numbers for all of {site.name}, got "
                f"{str(found).removeprefix('torch.')} beside {str(expected).removeprefix('torch.')}; convert the checkpoint to one dtype"
            )
