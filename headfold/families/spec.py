"""What a family literal may say, and nothing more: the four projections of each attention, and how position enters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..core.errors import UserError
from ..core.groups import check_group_count
from ..core.heads import KeyFreedom, QueryOrder


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position on K. `fraction` names the config field that says which share of a head rotates."""

    interleaved: bool = False
    fraction: str | None = None


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention per layer: where its projections lie, as submodule names of `at`.

    Either `q`, `k` and `v` name a linear each, or `qkv` names one whose rows are [heads·dim; groups·dim; groups·dim].
    """

    name: str
    at: str
    o: str
    q: str = ""
    k: str = ""
    v: str = ""
    qkv: str = ""
    q_norm: str = ""
    k_norm: str = ""
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    order: QueryOrder = "free"
    input_norm: str = "input_layernorm"
    """The norm beside the attention whose gains say how large the K/V input is, all that is known without calibration."""


@dataclass(frozen=True, slots=True)
class Family:
    """One model family. A literal is a claim; the family laws test it on tiny random models."""

    model_types: tuple[str, ...]
    attentions: tuple[Attention, ...] = ()
    position: Rope | None = None
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """What the config class assumes for fields that config.json leaves out."""
    norm_gain_offset: float = 0.0
    """What the norms add to their stored gains (Gemma: 1)."""
    refuses: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Config setting → why it cannot be folded exactly when it is on; `*` refuses the whole family."""


@dataclass(frozen=True, slots=True)
class Site:
    """One attention block of one checkpoint: pure data."""

    name: str
    """Short name used in plans, statistics and messages, such as `layers.3.self`."""
    module: str
    """Path of the attention module in the transformers class that saved the checkpoint (its `architectures`)."""
    weights: Mapping[str, str]
    """Role (q, k, v, o or qkv; q_norm, k_norm) → tensor name on disk without `.weight`.

    That is also the path of the submodule in the model.
    """
    biases: frozenset[str]
    """Roles that have a `.bias` on disk."""
    num_heads: int
    num_groups: int
    head_dim: int
    key_freedom: KeyFreedom
    query_order: QueryOrder
    input_norm: str | None
    """Name on disk of the gains of the norm before the attention; None where it has none."""
    norm_gain_offset: float


def read_field(family: Family, config: Mapping[str, Any], name: str) -> Any:
    """A config field as its class sees it: among the rotary parameters, set outright (null too), or the default."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rope.get(name) is not None:
        return rope[name]
    return config[name] if name in config else family.defaults.get(name)


def _count(family: Family, config: Mapping[str, Any], name: str, otherwise: int | None = None) -> int:
    """A positive whole number of the config; null or absent means `otherwise`, which None forbids."""
    value = read_field(family, config, name)
    value = otherwise if value is None else value
    if not isinstance(value, int) or value < 1:
        raise UserError(f"config.json: {name} is {value!r}, expected a positive whole number; correct the config")
    return value


def key_freedom(family: Family, attention: Attention, config: Mapping[str, Any], head_dim: int) -> KeyFreedom:
    """The freedom that the literal's position and norms leave to K."""
    if family.position is None:
        return KeyFreedom("any")
    fraction = read_field(family, config, family.position.fraction) if family.position.fraction else None
    rotary_dim = int(head_dim * (1.0 if fraction is None else fraction))
    pairs = family.position.interleaved
    kind = "signs" if attention.k_norm else "rope-pairs" if pairs else "rope-halves"
    return KeyFreedom(kind, rotary_dim, pairs)


def sites(
    family: Family, config: Mapping[str, Any], names: Mapping[str, Any], where: str = "config.json"
) -> list[Site]:
    """Every attention site of a checkpoint, in the order of the forward pass.

    `names` are the tensor names on disk: they tell biases, and a base model saved without its head, whose names lack
    the first component (`model.`).

    Raises:
        UserError: a projection that the literal names is absent; every absent one is listed.
    """
    found = [
        _site(family, attention, config, names, layer)
        for attention in family.attentions
        for layer in range(_count(family, config, attention.layers))
    ]
    for site in (_site(family, a, config, names, _count(family, config, a.layers)) for a in family.attentions):
        if f"{site.weights['o']}.weight" in names:
            raise UserError(
                f"{where}: the checkpoint has more layers than the config says ({site.name}); correct the config"
            )
    absent = [f"{w}.weight" for site in found for w in site.weights.values() if f"{w}.weight" not in names]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise UserError(
            f"{where}: model_type {config.get('model_type')!r} expects tensors that the checkpoint lacks: "
            f"{', '.join(absent[:3])}{more}; is the checkpoint complete, and the model_type right?"
        )
    return found


def _site(
    family: Family, attention: Attention, config: Mapping[str, Any], names: Mapping[str, Any], layer: int
) -> Site:
    module = attention.at.format(layer=layer)
    roles = ("q", "k", "v", "o", "qkv", "q_norm", "k_norm")
    local = {role: getattr(attention, role) for role in roles if getattr(attention, role)}
    if f"{module}.{attention.o}.weight" not in names:
        stripped = module.partition(".")[2]
        module = stripped if f"{stripped}.{attention.o}.weight" in names else module
    weights = {role: f"{module}.{name}" for role, name in local.items()}
    num_heads = _count(family, config, attention.heads)
    num_groups = _count(family, config, attention.kv_heads, num_heads)
    head_dim = _count(family, config, "head_dim", _count(family, config, "hidden_size") // num_heads)
    check_group_count(f"config.json: {num_heads} query heads", num_heads, num_groups)
    return Site(
        name=attention.name.format(layer=layer),
        module=module,
        weights=weights,
        biases=frozenset(role for role, weight in weights.items() if f"{weight}.bias" in names),
        num_heads=num_heads,
        num_groups=num_groups,
        head_dim=head_dim,
        key_freedom=key_freedom(family, attention, config, head_dim),
        query_order=attention.order,
        input_norm=gains if (gains := f"{module.rpartition('.')[0]}.{attention.input_norm}.weight") in names else None,
        norm_gain_offset=family.norm_gain_offset,
    )


def folded_config(family: Family, config: Mapping[str, Any], num_groups: int) -> dict[str, Any]:
    """The config with the count of K/V heads replaced; everything else is kept as it stands."""
    return {**config, **{attention.kv_heads: num_groups for attention in family.attentions}}
