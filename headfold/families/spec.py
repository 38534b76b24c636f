"""The schema of a family literal: the projections of each attention, per-head extras, and how position enters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from ..core.errors import UserError
from ..core.groups import check_group_count
from ..core.heads import FreedomKind, KeyFreedom, QueryOrder
from .wrapped import Place, language_config, place_of

FusedRows = Literal["segments", "per-group", "four-shards"]
"""Order of the rows of one projection for q, k and v: all of q, then k, then v; or, by K/V head, its queries, its key, its value; or, by
quarter of the heads, their q, their v, their k."""
ROLES = ("q", "k", "v", "o", "qkv", "q_norm", "k_norm", "bias_table", "sinks")
COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv")
"""Names that config classes have for the number of K/V heads; a literal says which one a family has."""
APPROXIMATE = "one norm spans all K heads, so every fold is approximate"
"""What a user is told of a site whose K norm counts all heads (`Attention.norm_spans_heads`)."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position on K. `fraction` names the config field with the rotary share of a head, `dim` one with the number of
    rotary dims."""

    interleaved: bool = False
    fraction: str | None = None
    dim: str | None = None
    layers: str | None = None
    """Config field with one entry per layer; a layer whose entry is 0 or `full_attention` has no position. Without it all layers
    rotate."""
    unless: str = ""
    """`field=value`: nothing rotates where the config field has this value."""


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention per layer: where its projections are on disk, as submodule names of `at`.

    Paths may contain `{layer}` and, where they contain the type of the model, `{model_type}`. Either `q`, `k` and `v` name a
    linear each, or `qkv` names one linear for all three, whose rows are in the order `fused`.
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
    norm_spans_heads: bool = False
    """Whether `q_norm` is one norm over all query heads, and `k_norm` one over all K heads; else every head has its own."""
    bias_table: str = ""
    """Embedding (bucket, head) of a position bias, whose columns move with the query heads; only some layers may have it."""
    stack_table: str = ""
    """Path of such an embedding outside of `at`, which all attentions of the stack share. The first of them has it."""
    sinks: str = ""
    """Parameter (head,): a logit that joins the softmax of each query head and moves with it."""
    fused: FusedRows = "segments"
    transposed: bool = False
    """Whether `qkv` and `o` are stored (in, out), as Conv1D does."""
    core: str = ""
    """Submodule of `at` that computes the attention, if the projections are outside of it (BERT)."""
    model_at: str = ""
    """Path in the transformers model if it is not `at`: transformers renames some modules on loading."""
    model_names: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Role → submodule of `model_at`, where that differs from the name on disk."""
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    """Empty if the class has no such field: the fold then runs in headfold's own runtime."""
    head_dim: str = "head_dim"
    any_head_dim: bool = True
    """Whether a class with a count of K/V heads takes any `head_dim` and a table with a factor for every frequency (`longrope`).
    If not, heads with a multiple of the source's head_dim run in headfold's runtime."""
    fixed_head_dim: bool = False
    """Whether they cannot run there either, because the class reshapes to fixed sizes."""
    scale: str = ""
    """Config field with the softmax scale; empty if it is one over the square root of head_dim."""
    hidden_size: str = "hidden_size"
    stack: str = ""
    """The attentions of one stack share an order of query heads if `order` is `stack`."""
    order: QueryOrder = "free"
    alibi: str = ""
    """Config field that enables a bias by head index (`*`: always enabled); K does not rotate then, and the order of heads is
    fixed."""
    reads_encoder: bool = False
    """Cross-attention: K and V are computed from the encoder's output."""
    optional: bool = False
    """Folded only if requested (the encoder of an encoder-decoder), or if the checkpoint has no other attention."""
    repeated: bool = False
    """Whether several layers run the same module: what it sees in all of them is summed, and one fold suits them all."""
    input_norm: str = "input_layernorm"
    """The norm before the attention. Without calibration, its gains are all that is known of the K/V input."""


@dataclass(frozen=True, slots=True)
class Family:
    """One model family. A literal is a claim, which the family laws test on tiny random models."""

    model_types: tuple[str, ...]
    attentions: tuple[Attention, ...] = ()
    position: Rope | None = None
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Values that the config class assumes for fields that config.json leaves out."""
    norm_gain_offset: float = 0.0
    """What the norms add to their stored gains (Gemma: 1)."""
    refuses: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Config setting → why a model with this setting cannot be folded exactly; `*` refuses the whole family."""


@dataclass(frozen=True, slots=True)
class Site:
    """One attention block of one checkpoint: pure data."""

    name: str
    """Short name used in plans, statistics and messages, such as `layers.3.self`."""
    module: str
    """Path of the module with the projections, in the transformers class that saved the checkpoint (`architectures`)."""
    weights: Mapping[str, str]
    """Role (q, k, v, o or qkv; q_norm, k_norm, bias_table; sinks) → tensor name on disk without `.weight`."""
    biases: frozenset[str]
    """Roles with a `.bias` on disk."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    key_freedom: KeyFreedom
    query_order: QueryOrder
    input_norm: str | None
    """Name on disk of the gains of the norm before the attention; None if there is none."""
    norm_gain_offset: float
    paths: Mapping[str, str]
    """Role → path of the submodule in the model."""
    core: str
    """Path in the model of the module that computes the attention; it is `module` unless the projections are outside of it."""
    stock_gqa: bool = True
    """Whether the stock class reads its number of K/V heads from the config."""
    any_head_dim: bool = False
    """Whether the stock class takes any head_dim; elsewhere heads with a multiple of it are slots in headfold's runtime."""
    fixed_head_dim: bool = False
    """Whether the site cannot have heads of another head_dim at all."""
    scale_from_head_dim: bool = True
    """Whether the softmax scale is derived from head_dim."""
    fused: FusedRows = "segments"
    transposed: bool = False
    stack: str = ""
    reads_encoder: bool = False
    optional: bool = False
    repeated: bool = False

    def tensor(self, role: str) -> str:
        """Return the name on disk of the role's weight."""
        return self.weights[role] if role == "sinks" else f"{self.weights[role]}.weight"

    @property
    def parameters(self) -> dict[str, str]:
        """Tensor name on disk → name of the parameter in the model."""
        named = {self.tensor(role): self.paths[role] + ("" if role == "sinks" else ".weight") for role in self.weights}
        return named | {f"{self.weights[role]}.bias": f"{self.paths[role]}.bias" for role in self.biases}

    @property
    def unfused(self) -> dict[str, str]:
        """Role → tensor name on disk (without suffix) after a fused projection of a class without K/V heads was grouped."""
        prefix = self.weights["qkv"].rpartition(".")[0]
        return {role: f"{prefix}.{role}_proj" for role in "qkv"}

    def splits(self, num_kv_heads: int) -> bool:
        """Return whether the site is written with q, k and v separate although it was read fused."""
        return "qkv" in self.weights and not self.stock_gqa and num_kv_heads != self.num_kv_heads


def read_field(family: Family, config: Mapping[str, Any], name: str) -> Any:
    """Return a config field as its class sees it: among the rotary parameters, set in the config (null too), or the default.

    A dot leads into a nested config (`text_config.hidden_size`); `a|b` means b if a is not set.
    """
    if "|" in name:
        return next(
            (value for part in name.split("|") if (value := read_field(family, config, part)) is not None), None
        )
    outer, _, inner = name.rpartition(".")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not outer and rope.get(name) is not None:
        return rope[name]
    nested = config.get(outer) or {} if outer else config
    return nested[inner] if inner in nested else family.defaults.get(name)


def read_count(family: Family, config: Mapping[str, Any], name: str, otherwise: int | None = None) -> int:
    """Return a positive whole number of the config; if it is null or absent, `otherwise`.

    Raises:
        UserError: it is something else, or absent while `otherwise` is None.
    """
    value = read_field(family, config, name)
    value = otherwise if value is None else value
    if not isinstance(value, int) or value < 1:
        raise UserError(f"config.json: {name}: expected a positive whole number, got {value!r}; correct the config")
    return value


def key_freedom(
    family: Family, attention: Attention, config: Mapping[str, Any], head_dim: int, layer: int
) -> KeyFreedom:
    """Return the freedom that the literal's position and norms leave to K."""
    rope = family.position
    if rope is None or attention.reads_encoder or _has_alibi(family, attention, config):
        return KeyFreedom("any")
    field, _, value = rope.unless.partition("=")
    if field and read_field(family, config, field) == value:
        return KeyFreedom("any")
    entries = read_field(family, config, rope.layers) if rope.layers else None
    if entries and entries[min(layer, len(entries) - 1)] in (0, "full_attention"):
        return KeyFreedom("any")
    rotary_dim = head_dim
    if rope.fraction and (fraction := read_field(family, config, rope.fraction)) is not None:
        rotary_dim = int(head_dim * fraction)
    if rope.dim and (dim := read_field(family, config, rope.dim)):
        rotary_dim = dim
    kind: FreedomKind = "signs" if attention.k_norm else "rope-pairs" if rope.interleaved else "rope-halves"
    return KeyFreedom(kind, rotary_dim, rope.interleaved, norm_spans_heads=attention.norm_spans_heads)


def _has_alibi(family: Family, attention: Attention, config: Mapping[str, Any]) -> bool:
    return attention.alibi == "*" or bool(attention.alibi and read_field(family, config, attention.alibi))


def sites(
    family: Family,
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    where: str = "config.json",
    place: Place | None = None,
) -> list[Site]:
    """Return every attention site of a checkpoint, in the order of the forward pass; of a wrapper those of its language model.

    `tensors` are the tensors on disk by name, each with a `shape`. They show which biases exist, and whether a base model was
    saved without its head, so that names lack the first component (`model.`). `place` says where the model of this config is inside
    another, if that is no language model.

    Raises:
        UserError: projections that the literal names are missing; all of them are listed.
    """
    language = language_config(config)
    place = place or place_of(config, tensors, is_base_model=is_base_model(config))
    stacks = [_stack(family, attention, language, tensors, where, place) for attention in family.attentions]
    present = [made for made in stacks if any(not _missing(site, tensors) for site in made)]
    # One stack may be saved alone, an encoder without its decoder; if none is there, all are missed.
    absent = [name for made in present or stacks for site in made for name in _missing(site, tensors)]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise UserError(
            f"{where}: model_type {config.get('model_type')!r} expects tensors that are not in the checkpoint: "
            f"{', '.join(absent[:3])}{more}; check that the checkpoint is complete and the model_type correct"
        )
    return [site for made in present for site in made]


def _stack(
    family: Family,
    attention: Attention,
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    where: str,
    place: Place | None,
) -> list[Site]:
    num_layers = read_count(family, config, attention.layers)
    *made, beyond = (_site(family, attention, config, tensors, layer, place) for layer in range(num_layers + 1))
    if f"{beyond.weights['o']}.weight" in tensors:
        raise UserError(
            f"{where}: expected {num_layers} layers, got a checkpoint with more ({beyond.name}); correct the config"
        )
    return made


def _missing(site: Site, tensors: Mapping[str, Any]) -> list[str]:
    absent = [role for role in site.weights if site.tensor(role) not in tensors]
    if "qkv" in absent and not site.stock_gqa and all(f"{name}.weight" in tensors for name in site.unfused.values()):
        absent.remove("qkv")  # a fold has them separate
    return [site.tensor(role) for role in absent]


def _site(
    family: Family,
    attention: Attention,
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    layer: int,
    place: Place | None,
) -> Site:
    names = {"layer": layer, "model_type": config.get("model_type")}
    at = attention.at.format(**names)
    module = model_at = (attention.model_at or attention.at).format(**names)
    stripped = at.partition(".")[2]
    if place is not None:
        at, module = place.on_disk + stripped, place.module + module.partition(".")[2]
    elif f"{at}.{attention.o}.weight" not in tensors and f"{stripped}.{attention.o}.weight" in tensors:
        at, module = stripped, module.partition(".")[2] if is_base_model(config) else module
    local = {role: getattr(attention, role) for role in ROLES if getattr(attention, role)}
    weights = {role: f"{at}.{name}" for role, name in local.items()}
    if "bias_table" in weights and f"{weights['bias_table']}.weight" not in tensors:
        del weights["bias_table"]
    paths = {role: f"{module}.{attention.model_names.get(role, local[role])}" for role in weights}
    if attention.stack_table and layer == 0:
        # Saved without the head, a base model lacks the first component here as there.
        weights["bias_table"], paths["bias_table"] = (
            attention.stack_table if whole == found else attention.stack_table.partition(".")[2]
            for whole, found in ((attention.at.format(**names), at), (model_at, module))
        )
    num_heads = read_count(family, config, attention.heads)
    head_dim = read_count(
        family, config, attention.head_dim, read_count(family, config, attention.hidden_size) // num_heads
    )
    num_kv_heads = _num_kv_heads(family, attention, config, tensors, weights, num_heads, head_dim)
    check_group_count(f"config.json: {num_heads} query heads", num_heads, num_kv_heads)
    return Site(
        name=attention.name.format(layer=layer),
        module=module,
        weights=weights,
        biases=frozenset(role for role, weight in weights.items() if f"{weight}.bias" in tensors),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        key_freedom=key_freedom(family, attention, config, head_dim, layer),
        query_order="fixed" if _has_alibi(family, attention, config) else attention.order,
        input_norm=gains if (gains := f"{at.rpartition('.')[0]}.{attention.input_norm}.weight") in tensors else None,
        norm_gain_offset=family.norm_gain_offset,
        paths=paths,
        core=f"{module}.{attention.core}" if attention.core else module,
        stock_gqa=bool(attention.kv_heads),
        any_head_dim=bool(attention.kv_heads) and attention.any_head_dim and has_one_table(family, config, head_dim),
        fixed_head_dim=attention.fixed_head_dim,
        scale_from_head_dim=not attention.scale,
        fused=attention.fused,
        transposed=attention.transposed,
        stack=attention.stack,
        reads_encoder=attention.reads_encoder,
        optional=attention.optional,
        repeated=attention.repeated,
    )


TABLES = ("default", "linear", "llama3", "yarn", "longrope")
"""Kinds of rotary tables that a table with a factor for every frequency can express."""


def has_one_table(family: Family, config: Mapping[str, Any], head_dim: int) -> bool:
    """Return whether all rotary layers share one table of frequencies, the same at every length, that covers whole dims."""
    if family.position is None:
        return True
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    share = read_field(family, config, family.position.fraction) if family.position.fraction else None
    whole = float(head_dim * (1 if share is None else share)).is_integer()
    if "mrope_section" in rope:  # runs of planes belong to one coordinate each: repeated planes would change hands
        return False
    return whole and not family.position.dim and rope.get("rope_type", rope.get("type", "default")) in TABLES and not any(
        isinstance(value, Mapping) for value in rope.values()
    )  # fmt: skip


def is_base_model(config: Mapping[str, Any]) -> bool:
    """Return whether the class that saved the checkpoint has no head, so that its paths lack the first component."""
    name = next(iter(config.get("architectures") or []), "Model")
    return name.endswith("Model") and not name.endswith(("HeadModel", "HeadsModel", "MTModel"))


def _num_kv_heads(
    family: Family,
    attention: Attention,
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    weights: Mapping[str, str],
    num_heads: int,
    head_dim: int,
) -> int:
    """Return the number of K/V heads: the config's or, if it has no such field, that of the tensors."""
    if attention.kv_heads:
        return read_count(family, config, attention.kv_heads, num_heads)
    info = tensors.get(f"{weights.get('qkv', weights.get('k'))}.weight")
    if info is None:
        return num_heads
    if len(info.shape) != 2:
        raise UserError(
            f"{weights.get('qkv', weights.get('k'))}.weight: expected a matrix, got shape {info.shape}; download the checkpoint again"
        )
    rows = info.shape[1 if attention.transposed else 0] // head_dim
    return max(1, (rows - num_heads) // 2 if "qkv" in weights else rows)
