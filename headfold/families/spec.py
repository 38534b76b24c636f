"""What a family literal may say, and nothing more: the four projections of each attention, and how position enters."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from ..core.errors import UserError
from ..core.groups import Groups, check_group_count
from ..core.heads import KeyFreedom, QueryOrder

FusedRows = Literal["segments", "per-group"]
"""Rows of one projection for q, k and v: all of q, then k, then v; or by K/V head its queries, its key, its value."""
ROLES = ("q", "k", "v", "o", "qkv", "q_norm", "k_norm", "bias_table", "sinks")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position on K. `fraction` names the config field with the share of a head that rotates, `dim` one with the dims."""

    interleaved: bool = False
    fraction: str | None = None
    dim: str | None = None
    layers: str | None = None
    """Config field with one entry per layer: where it is 0 or `full_attention`, that layer has no position. Absent: all have."""


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention per layer: where its projections lie on disk, as submodule names of `at`.

    Paths may hold `{layer}` and, where the types of a family are called so in them, `{model_type}`.
    Either `q`, `k` and `v` name a linear each, or `qkv` names one for all three whose rows lie as `fused` says.
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
    bias_table: str = ""
    """Embedding (bucket, head) of a position bias, whose columns move with the query heads; it may be in some layers only."""
    sinks: str = ""
    """Bare parameter (head,), a logit that joins the softmax of each query head and moves with it."""
    fused: FusedRows = "segments"
    transposed: bool = False
    """Conv1D: `qkv` and `o` are stored (in, out)."""
    core: str = ""
    """Submodule of `at` that attends, where the projections lie around it (BERT)."""
    model_at: str = ""
    """Path in the transformers model where it is not `at`: transformers renames some on loading."""
    model_names: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Role → submodule of `model_at`, with it."""
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    """Empty where the class knows no such field: the fold then runs in headfold's own runtime."""
    head_dim: str = "head_dim"
    any_head_dim: bool = True
    """Of a class with K/V heads: whether it takes any `head_dim` and a table with a factor for every frequency (`longrope`). Wide heads
    run in headfold's runtime where it does not."""
    fixed_head_dim: bool = False
    """Whether it cannot be given wide heads there either, as it reshapes to sizes of its own."""
    scale: str = ""
    """Config field that says the softmax scale; empty where it is one over the root of the head's width."""
    width: str = "hidden_size"
    stack: str = ""
    """Attentions that share one order of query heads where `order` is `stack`."""
    order: QueryOrder = "free"
    alibi: str = ""
    """Config field that turns on a bias by head index (`*`: always on): no rotation then, and a fixed order."""
    reads_encoder: bool = False
    """Cross-attention: K and V come from the encoder's output."""
    optional: bool = False
    """Folded only when asked (the encoder of an encoder-decoder), or where the checkpoint has nothing else."""
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
    """Path of the module that holds the projections, in the transformers class that saved the checkpoint (`architectures`)."""
    weights: Mapping[str, str]
    """Role (q, k, v, o or qkv; q_norm, k_norm, bias_table; sinks) → tensor name on disk without `.weight`."""
    biases: frozenset[str]
    """Roles that have a `.bias` on disk."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    key_freedom: KeyFreedom
    query_order: QueryOrder
    input_norm: str | None
    """Name on disk of the gains of the norm before the attention; None where it has none."""
    norm_gain_offset: float
    paths: Mapping[str, str]
    """Role → path of the submodule in the model."""
    core: str
    """Path in the model of the module that attends; that is `module` wherever the projections are its own."""
    stock_gqa: bool = True
    """Whether the stock class reads its count of K/V heads from the config."""
    any_head_dim: bool = False
    """Whether it takes heads of any width; elsewhere wide heads are slots in headfold's runtime."""
    fixed_head_dim: bool = False
    """Whether it can have neither."""
    scale_from_head_dim: bool = True
    """Whether its softmax scale follows from that width."""
    fused: FusedRows = "segments"
    transposed: bool = False
    stack: str = ""
    reads_encoder: bool = False
    optional: bool = False

    def tensor(self, role: str) -> str:
        """The name on disk of what the role's module holds, its bias apart."""
        return self.weights[role] if role == "sinks" else f"{self.weights[role]}.weight"

    @property
    def parameters(self) -> dict[str, str]:
        """Tensor name on disk → name of the parameter in the model."""
        named = {self.tensor(role): self.paths[role] + ("" if role == "sinks" else ".weight") for role in self.weights}
        return named | {f"{self.weights[role]}.bias": f"{self.paths[role]}.bias" for role in self.biases}

    @property
    def unfused(self) -> dict[str, str]:
        """Role → tensor name on disk (without suffix) once a fused projection of a class without K/V heads is grouped."""
        prefix = self.weights["qkv"].rpartition(".")[0]
        return {role: f"{prefix}.{role}_proj" for role in "qkv"}

    def splits(self, num_kv_heads: int) -> bool:
        """Whether the site is written with q, k and v apart, other than it was read."""
        return "qkv" in self.weights and not self.stock_gqa and num_kv_heads != self.num_kv_heads


def read_field(family: Family, config: Mapping[str, Any], name: str) -> Any:
    """A config field as its class sees it: among the rotary parameters, set outright (null too), or the default.

    A dot leads into a nested config (`text_config.hidden_size`), `a|b` means b where a is not set.
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


def _count(family: Family, config: Mapping[str, Any], name: str, otherwise: int | None = None) -> int:
    """A positive whole number of the config; null or absent means `otherwise`, which None forbids."""
    value = read_field(family, config, name)
    value = otherwise if value is None else value
    if not isinstance(value, int) or value < 1:
        raise UserError(f"config.json: {name} is {value!r}, expected a positive whole number; correct the config")
    return value


def key_freedom(
    family: Family, attention: Attention, config: Mapping[str, Any], head_dim: int, layer: int
) -> KeyFreedom:
    """The freedom that the literal's position and norms leave to K."""
    rope = family.position
    if rope is None or attention.reads_encoder or _has_alibi(family, attention, config):
        return KeyFreedom("any")
    entries = read_field(family, config, rope.layers) if rope.layers else None
    if entries and entries[min(layer, len(entries) - 1)] in (0, "full_attention"):
        return KeyFreedom("any")
    rotary_dim = head_dim
    if rope.fraction and (fraction := read_field(family, config, rope.fraction)) is not None:
        rotary_dim = int(head_dim * fraction)
    if rope.dim and (dim := read_field(family, config, rope.dim)):
        rotary_dim = dim
    kind = "signs" if attention.k_norm else "rope-pairs" if rope.interleaved else "rope-halves"
    return KeyFreedom(kind, rotary_dim, rope.interleaved)


def _has_alibi(family: Family, attention: Attention, config: Mapping[str, Any]) -> bool:
    return attention.alibi == "*" or bool(attention.alibi and read_field(family, config, attention.alibi))


def sites(
    family: Family, config: Mapping[str, Any], tensors: Mapping[str, Any], where: str = "config.json"
) -> list[Site]:
    """Every attention site of a checkpoint, in the order of the forward pass.

    `tensors` are the tensors on disk by name, each with a `shape`: they tell biases, and a base model saved without its
    head, whose names lack the first component (`model.`).

    Raises:
        UserError: a projection that the literal names is absent; every absent one is listed.
    """
    stacks = [_stack(family, attention, config, tensors, where) for attention in family.attentions]
    present = [made for made in stacks if any(not _lacking(site, tensors) for site in made)]
    # One stack may be saved alone, an encoder without its decoder; if none is there, all are missed.
    absent = [name for made in present or stacks for site in made for name in _lacking(site, tensors)]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise UserError(
            f"{where}: model_type {config.get('model_type')!r} expects tensors that the checkpoint lacks: "
            f"{', '.join(absent[:3])}{more}; is the checkpoint complete, and the model_type right?"
        )
    return [site for made in present for site in made]


def _stack(
    family: Family, attention: Attention, config: Mapping[str, Any], tensors: Mapping[str, Any], where: str
) -> list[Site]:
    num_layers = _count(family, config, attention.layers)
    *made, beyond = (_site(family, attention, config, tensors, layer) for layer in range(num_layers + 1))
    if f"{beyond.weights['o']}.weight" in tensors:
        raise UserError(
            f"{where}: the checkpoint has more layers than the config says ({beyond.name}); correct the config"
        )
    return made


def _lacking(site: Site, tensors: Mapping[str, Any]) -> list[str]:
    return [name for role in site.weights if (name := site.tensor(role)) not in tensors]


def _site(
    family: Family, attention: Attention, config: Mapping[str, Any], tensors: Mapping[str, Any], layer: int
) -> Site:
    names = {"layer": layer, "model_type": config.get("model_type")}
    at, module = attention.at.format(**names), (attention.model_at or attention.at).format(**names)
    stripped = at.partition(".")[2]
    if f"{at}.{attention.o}.weight" not in tensors and f"{stripped}.{attention.o}.weight" in tensors:
        at, module = stripped, module.partition(".")[2] if _is_base_model(config) else module
    local = {role: getattr(attention, role) for role in ROLES if getattr(attention, role)}
    weights = {role: f"{at}.{name}" for role, name in local.items()}
    if "bias_table" in weights and f"{weights['bias_table']}.weight" not in tensors:
        del weights["bias_table"]
    num_heads = _count(family, config, attention.heads)
    head_dim = _count(family, config, attention.head_dim, _count(family, config, attention.width) // num_heads)
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
        paths={role: f"{module}.{attention.model_names.get(role, local[role])}" for role in weights},
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
    )


TABLES = ("default", "linear", "llama3", "yarn", "longrope")
"""Kinds of rotary tables that one with a factor for every frequency can stand for."""


def has_one_table(family: Family, config: Mapping[str, Any], head_dim: int) -> bool:
    """Whether all rotating layers share one table of frequencies, the same at every length, that covers whole dims."""
    if family.position is None:
        return True
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    share = read_field(family, config, family.position.fraction) if family.position.fraction else None
    whole = float(head_dim * (1 if share is None else share)).is_integer()
    return whole and not family.position.dim and rope.get("rope_type", rope.get("type", "default")) in TABLES and not any(
        isinstance(value, Mapping) for value in rope.values()
    )  # fmt: skip


def _is_base_model(config: Mapping[str, Any]) -> bool:
    """Whether the class that saved the checkpoint has no head, so that its paths lack the first component."""
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
    """K/V heads: as the config counts them or, where it has no field for them, as many as the tensors hold."""
    if attention.kv_heads:
        return _count(family, config, attention.kv_heads, num_heads)
    info = tensors.get(f"{weights.get('qkv', weights.get('k'))}.weight")
    if info is None:
        return num_heads
    rows = info.shape[1 if attention.transposed else 0] // head_dim
    return max(1, (rows - num_heads) // 2 if "qkv" in weights else rows)


def folded_config(
    family: Family,
    config: Mapping[str, Any],
    sites: Iterable[Site],
    num_kv_heads: Mapping[str, int],
    uneven: Mapping[str, Groups] = MappingProxyType({}),
    head_dim_multiples: Mapping[str, int] = MappingProxyType({}),
    rotary: Callable[[int], Mapping[str, Any]] = lambda head_dim_multiple: {},
) -> dict[str, Any]:
    """The config of a fold; `num_kv_heads` by site name. Everything but the counts of K/V heads is kept as it stands.

    `head_dim_multiples` are in heads of the source, 1 where none is named; `rotary` gives the fields of a rotary table that many times as wide.

    A class that knows such a count gets its field set, if it is the same at all its sites; otherwise the sites are listed under
    `headfold`, for the runtime. `uneven` has the groups of query heads, in standard order, where they are not equal.

    Raises:
        UserError: such a class has groups that are not equal, or not equally many, and q, k and v are one tensor.
    """
    fields = {attention.kv_heads for attention in family.attentions if attention.kv_heads}
    folded = [site for site in sites if site.name in num_kv_heads]
    native = [site for site in folded if site.stock_gqa]
    different = {num_kv_heads[site.name] for site in native}
    widths = {head_dim_multiples.get(site.name, 1) for site in native}
    slotted = widths != {1} and not all(site.any_head_dim for site in native)
    told = len(different) == 1 and not slotted and not any(site.name in uneven for site in native)
    if not told and any("qkv" in site.weights for site in native):
        raise UserError(
            f"{config.get('model_type')}: expected equal groups, as many at every site, since q, k and v are one tensor on disk; "
            f"got {', '.join(map(str, sorted(different)))} K/V heads; make the plan with --kv-heads"
        )
    changes: dict[str, Any] = dict.fromkeys(fields, different.pop()) if told else {}
    if native and not slotted and widths != {1}:
        if len(widths) > 1:
            raise UserError(f"{config.get('model_type')}: expected one head width at every site, got {sorted(widths)}")
        width = widths.pop()
        changes |= {attention.head_dim: width * native[0].head_dim for attention in family.attentions}
        changes |= rotary(width) if native[0].key_freedom.rotary_dim else {}
    listed = [
        entry(
            s,
            num_kv_heads[s.name],
            uneven.get(s.name),
            head_dim_multiples.get(s.name, 1),
            in_slots=slotted or not s.stock_gqa,
        )
        for s in folded
        if not (told and s.stock_gqa)
    ]
    return {**config, **changes, **({"headfold": {"sites": listed}} if listed else {})}


def entry(
    site: Site, num_kv_heads: int, uneven: Groups | None = None, head_dim_multiple: int = 1, *, in_slots: bool = True
) -> dict[str, Any]:
    """What the runtime has to know of a grouped site. Wide heads are slots of the source's width or, else, simply wide.

    A site whose class takes wide heads has their softmax scale in W_q (`surgery.site_heads`), which slots undo.
    """
    local = {role: site.paths[role].removeprefix(f"{site.core}.") for role in "qkv" if role in site.paths}
    fused = {}
    if "qkv" in site.paths:
        local = {role: f"{role}_proj" for role in "qkv"}
        fused = {"fused": site.paths["qkv"].removeprefix(f"{site.core}.")}
    counts = {"heads": site.num_heads, "kv_heads": num_kv_heads, "head_dim": site.head_dim}
    groups = {} if uneven is None else {"kv_of_query": list(uneven.group_of_head)}
    wide = {}
    if head_dim_multiple > 1 and in_slots:
        wide = {"slots": head_dim_multiple, "o": site.paths["o"]}
        wide |= {"scale": head_dim_multiple**-0.5} if site.any_head_dim and site.scale_from_head_dim else {}
    elif head_dim_multiple > 1:
        counts["head_dim"] *= head_dim_multiple
    return {"module": site.core, **local, **fused, **counts, **groups, **wide}
