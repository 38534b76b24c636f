"""Find the attention of an unknown architecture: its projections by shape and name, and the config fields that size them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import nn

from ..families.spec import COUNTS
from .shrink import Config
from .toy import Architecture, Unproven

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMED = {
    "q": r"(q|wq|query|linear_q|to_q)(_?(proj|lin|linear|layer))?|query_proj",
    "k": r"(k|wk|key|linear_k|to_k)(_?(proj|lin|linear|layer))?|key_proj",
    "v": r"(v|wv|value|linear_v|to_v)(_?(proj|lin|linear|layer))?|value_proj",
    "o": r"(o|wo|out|output|dense|c|attn_out|linear_o|linear_out)(_?(proj|lin|linear|dense|layer))?|to_out",
    "qkv": r"(w?qkv|c_attn|query_key_value|w_pack|qkv)(_?proj)?",
    "q_norm": r"(q|query)_?(layer_?)?norm|norm_q|q_ln",
    "k_norm": r"(k|key)_?(layer_?)?norm|norm_k|k_ln",
}
"""Role → usual names of its submodule."""
_FIELDS = {
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    "kv_heads": COUNTS,
    "head_dim": ("head_dim", "kv_channels", "attention_head_size", "attention_head_dim", "d_kv"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
}


@dataclass(frozen=True, slots=True)
class FoundAttention:
    """One kind of attention, which every layer has, by paths in the model."""

    at: str
    """Path of the attention module, with `{layer}` for the number of the layer."""
    names: Mapping[str, str]
    """Role (q, k, v, o or qkv; q_norm, k_norm, sinks) → submodule of `at`."""
    num_layers: int
    stock_gqa: bool
    """Whether K and V shrink with a count in the config."""
    transposed: bool
    core: str = ""
    """Submodule of `at` that computes the attention, if the projections are outside of it."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Role of a number (heads, kv_heads, head_dim, hidden_size, layers) → field of config.json."""
    others: tuple[str, ...] = ()
    """All other parameters of the attention."""

    def path(self, role: str, layer: int) -> str:
        return f"{self.at.format(layer=layer)}.{self.names[role]}"


def find(architecture: Architecture) -> FoundAttention:
    """Return the attention of a causal language model or encoder, found by shapes alone.

    Raises:
        Unproven: none, several kinds, or one that no literal can describe.
    """
    model = architecture.build(device="meta")
    shrunk = _shrinking(architecture, model)
    linears = {path: module for path, module in model.named_modules() if _is_linear(module)}
    keyed = _parents(linears, shrunk)
    patterns = _patterns(keyed)
    config = architecture.toy_config().to_dict()
    depth = next((config[name] for name in _FIELDS["layers"] if isinstance(config.get(name), int)), 0)
    if not patterns:
        counted = next((name for name in _FIELDS["kv_heads"] if config.get(name)), "a count of K/V heads")
        latent = ", but from a latent of kv_lora_rank numbers" if config.get("kv_lora_rank") else ""
        raise Unproven(
            f"no projection has fewer rows if {counted} is smaller: K and V are not made head by head{latent}"
        )
    at, layers = _only_pattern(patterns, depth)
    at, core = _with_output(at, layers[0], linears)
    names = _roles(at.format(layer=layers[0]), linears, shrunk, architecture)
    return _described(
        model,
        FoundAttention(at, names, len(layers), bool(shrunk), _is_transposed(linears, at, layers[0], names), core),
        config,
    )


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _shrinking(architecture: Architecture, model: "PreTrainedModel") -> set[str]:
    """Return the parameters that have fewer rows if the config asks for fewer K/V heads."""
    fewer = architecture.with_geometry(num_kv_heads=architecture.geometry.num_kv_heads // 2).build(device="meta")
    shapes = {name: parameter.shape for name, parameter in fewer.named_parameters()}
    return {name for name, parameter in model.named_parameters() if shapes.get(name) != parameter.shape}


def _parents(linears: Mapping[str, nn.Module], shrunk: set[str]) -> set[str]:
    """Return the modules with projections that compute K."""
    if shrunk:
        grouped = {path for path in linears if f"{path}.weight" in shrunk}
        if not grouped:
            raise Unproven(f"{min(shrunk)} shrinks with the K/V heads, but is no linear projection")
        return {_split(path)[0] for path in grouped}
    called: dict[str, set[str]] = {"k": set(), "v": set(), "qkv": set()}
    for path in linears:
        parent, name = _split(path)
        for role in called:
            if _is_called(role, name):
                called[role].add(parent)
    return (called["k"] & called["v"]) | called["qkv"]


def _split(path: str) -> tuple[str, str]:
    """Split a path into an attention and the name of a linear in it, which some classes wrap (`k_proj.linear`)."""
    match = re.fullmatch(r"(?:(.*?)\.)?([^.]+(?:\.linear)?)", path)
    assert match is not None
    parent, name = match.groups()
    return parent or "", name


def _is_called(role: str, name: str) -> bool:
    return re.fullmatch(_NAMED[role], name.removesuffix(".linear").rpartition(".")[2], re.IGNORECASE) is not None


def _with_output(at: str, layer: int, linears: Mapping[str, nn.Module]) -> tuple[str, str]:
    """Return the module that contains O too, and the path below it of the one that computes the attention, if O is outside of
    that (BERT)."""
    outer, _, inner = at.rpartition(".")
    for parent, core in ((at, ""), (outer, inner)):
        prefix = f"{parent.format(layer=layer)}."
        if any(path.startswith(prefix) and _is_called("o", path.removeprefix(prefix)) for path in linears):
            return parent, core
    return at, ""


def _patterns(paths: Iterable[str]) -> dict[str, list[int]]:
    """Return `model.layers.{layer}.self_attn` → its layers."""
    patterns: dict[str, list[int]] = {}
    for path in paths:
        number = re.search(r"(?<=\.)\d+(?=\.|$)", path)
        if number is None:
            raise Unproven(f"{path} has K/V projections outside of any stack of layers")
        pattern = f"{path[: number.start()]}{{layer}}{path[number.end() :]}"
        patterns.setdefault(pattern, []).append(int(number[0]))
    return {pattern: sorted(layers) for pattern, layers in patterns.items()}


def _only_pattern(patterns: Mapping[str, list[int]], depth: int) -> tuple[str, list[int]]:
    if len(patterns) > 1:
        raise Unproven(
            f"K/V projections of several kinds: {', '.join(sorted(patterns))}; expected one kind in every layer"
        )
    ((at, layers),) = patterns.items()
    if layers != list(range(depth)):
        raise Unproven(
            f"attention in layers {', '.join(map(str, layers))} of {depth} only; expected every layer to have it"
        )
    return at, layers


def _roles(
    parent: str, linears: Mapping[str, nn.Module], shrunk: set[str], architecture: Architecture
) -> dict[str, str]:
    """Return role → submodule of one attention."""
    inside = {
        path.removeprefix(f"{parent}."): module for path, module in linears.items() if path.startswith(f"{parent}.")
    }
    grouped = [name for name in inside if not shrunk or f"{parent}.{name}.weight" in shrunk]
    names = {role: name for role in ("k", "v", "qkv") for name in grouped if _is_called(role, name)}
    names = {"qkv": names["qkv"]} if "k" not in names and "qkv" in names else names
    extra = [name for name in grouped if shrunk and name not in names.values()]
    if "qkv" not in names and not {"k", "v"} <= names.keys():
        raise Unproven(f"{parent}: cannot identify K and V among {', '.join(sorted(grouped))}")
    if extra:
        raise Unproven(f"{parent}: besides K and V, {', '.join(sorted(extra))} depends on the number of K/V heads")
    wanted = ("o",) if "qkv" in names else ("q", "o")
    rest = {name: module for name, module in inside.items() if name not in names.values()}
    for role in wanted:
        named = [name for name in rest if _is_called(role, name)]
        if len(named) != 1:
            listed = ", ".join(sorted(rest)) or "nothing"
            raise Unproven(f"{parent}: cannot identify the {role.upper()} projection among {listed}")
        names[role] = named[0]
    _check_rows(parent, names, inside, architecture)
    return names


def _check_rows(
    parent: str, names: Mapping[str, str], inside: Mapping[str, nn.Module], architecture: Architecture
) -> None:
    """Check that Q, K, V and O have the shapes of heads of one size."""
    if "qkv" in names:
        return
    heads, groups = architecture.geometry.num_heads, architecture.geometry.num_kv_heads
    q, k, v = (inside[names[role]].get_parameter("weight").shape[0] for role in "qkv")
    o = inside[names["o"]].get_parameter("weight").shape[1]
    if k % groups or k != v:
        raise Unproven(f"{parent}: K has {k} rows and V {v}; expected {groups} heads of one size in both")
    if q != k // groups * heads or o != q:
        raise Unproven(
            f"{parent}: Q has {q} rows and O {o} columns; expected {heads} heads of {k // groups} in both (is there a gate in Q?)"
        )


def _is_transposed(linears: Mapping[str, nn.Module], at: str, layer: int, names: Mapping[str, str]) -> bool:
    return type(linears[f"{at.format(layer=layer)}.{names['o']}"]).__name__ == "Conv1D"


def _described(model: "PreTrainedModel", found: FoundAttention, config: Config) -> FoundAttention:
    """Add norms, config fields and all other parameters of the attention."""
    parent = found.at.format(layer=0)
    module = model.get_submodule(parent)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    names = dict(found.names)
    for role in ("q_norm", "k_norm"):
        named = [n for n in shapes if n.endswith(".weight") and _is_called(role, n.removesuffix(".weight"))]
        if named:
            names[role] = named[0].removesuffix(".weight")
    claimed = {f"{name}.{kind}" for name in names.values() for kind in ("weight", "bias")}
    others = tuple(name for name in shapes if name not in claimed)
    fields = {
        role: next((name for name in choices if isinstance(config.get(name), int)), "")
        for role, choices in _FIELDS.items()
    }
    return replace(found, names=names, fields=fields, others=others)
