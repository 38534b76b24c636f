"""A folded checkpoint as layouts read it: the attention of each layer, with its heads and groups as the config lists them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.reader import Checkpoint
from ..checkpoint.refusals import NO_CODE
from ..core.errors import UserError
from ..core.groups import Groups
from ..families import family_of
from ..families.spec import Attention, Family, read_field
from ..hf_models.building import one_line, open_config
from ..runtime.load import read_checked_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROLES = ("q", "k", "v", "o", "qkv")
_ENCODERS = ("BertModel", "BertForMaskedLM")
"""Classes of encoders that have entries too."""
_UNCOUNTED = ("falcon",)
"""Model types whose number of K/V heads follows from several fields of an original's config."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The attention of one layer. `names` maps role to tensor name on disk without suffix: q, k, v and o, or qkv and o."""

    names: Mapping[str, str]
    num_heads: int
    head_dim: int
    """Dims of a K/V head and of its queries."""
    groups: Groups
    """Query head → K/V head."""
    multiple: int = 1
    """The number of slots that are one head, where it has a larger head_dim in a class that takes the source's alone."""

    @property
    def group_size(self) -> int:
        """The number of query heads in the largest group."""
        return max(self.groups.sizes)

    def slots(self, group_size: int) -> tuple[int, ...]:
        """Return slot → query head, with every group filled up to `group_size` slots; `num_heads` stands for an empty one."""
        empty = [self.num_heads]
        return tuple(slot for heads in self.groups.members for slot in [*heads, *empty * (group_size - len(heads))])


@dataclass(frozen=True, slots=True)
class Folded:
    """What a layout reads of a fold before any tensor is read: config and sites. `where` names the config in messages."""

    config: Mapping[str, Any]
    family: Family
    entries: tuple[Entry, ...]
    where: str = "config.json"

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of K/V heads of each layer."""
        return tuple(entry.groups.num_kv_heads for entry in self.entries)

    @property
    def group_size(self) -> int:
        """The number of query heads in the largest group of all layers."""
        return max(entry.group_size for entry in self.entries)

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have the same number of K/V heads and one head_dim."""
        return len({(entry.groups.num_kv_heads, entry.head_dim) for entry in self.entries}) == 1

    @property
    def is_even(self) -> bool:
        """Whether all groups of each layer have the same size."""
        return all(entry.groups.is_even for entry in self.entries)

    @property
    def is_fused(self) -> bool:
        """Whether q, k and v of any layer are one tensor on disk."""
        return any("qkv" in entry.names for entry in self.entries)

    @property
    def has_window(self) -> bool:
        """Whether the attention of any layer has a sliding window."""
        turned_on = self.config.get("use_sliding_window", self.model_type == "mistral")
        windows = turned_on and self.config.get("sliding_window", 4096 if self.model_type == "mistral" else None)
        return bool(windows) or "sliding_attention" in (self.config.get("layer_types") or ())

    def field(self, name: str) -> Any:
        """Return a config field as its class reads it."""
        return read_field(self.family, self.config, name)


def folded(config: Mapping[str, Any], where: str = "config.json") -> Folded:
    """Return a fold given by its config alone. A model with other sites than one per layer, or that neither generates text nor is an
    encoder without a task, has no entries.
    """
    family = family_of(dict(config), where, NO_CODE)
    counted = "headfold" in config or config["model_type"] not in _UNCOUNTED
    name = (config.get("architectures") or [""])[0]
    simple = (
        counted and (name.endswith(("ForCausalLM", "LMHeadModel")) or name in _ENCODERS) and len(family.attentions) == 1
    )
    try:
        entries = tuple(entries_of(config, family, family.attentions[0])) if simple else ()
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{where}: expected numbers of layers, heads and dims that its class reads, got {one_line(error)}; fold again"
        ) from error
    return Folded(config, family, entries, where)


def stock_config(source: Folded) -> "PreTrainedConfig":
    """Return the config as an object of the source's own class, with all its defaults."""
    import transformers

    name = source.config["architectures"][0].removeprefix("PerLayer")
    config = {field: value for field, value in without_code(source.config).items() if field != "per_layer_config"}
    return open_config(config, source.where, getattr(transformers, name).config_class)


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that remain when a fold no longer needs headfold's runtime."""
    return {name: value for name, value in config.items() if name not in ("headfold", "auto_map")}


def open_folded(path: str | Path) -> tuple[Checkpoint, Folded]:
    """Open a directory that `fold` wrote.

    Raises:
        UserError: there is no checkpoint, it is unfinished, or its config, plan and tensors disagree.
    """
    path = Path(path)
    found = folded(read_checked_config(path), f"{path}/config.json")
    checkpoint = Checkpoint.open(path)
    bare = tuple(map(_of_base_model, found.entries))
    if bare and f"{bare[0].names['o']}.weight" in checkpoint.tensors:
        found = replace(found, entries=bare)
    for entry in found.entries:
        _check_rows(entry, checkpoint, path)
    return checkpoint, found


def _of_base_model(entry: Entry) -> Entry:
    """Return the entry of a checkpoint whose names lack the first component, as those of GPT-2 and BLOOM do."""
    return replace(entry, names={role: name.partition(".")[2] for role, name in entry.names.items()})


def entries_of(config: Mapping[str, Any], family: Family, attention: Attention) -> Iterator[Entry]:
    """Yield one attention of a family in every layer. Heads in slots have the head_dim of a slot."""
    listed = {site["module"]: site for site in (config.get("headfold") or {}).get("sites", [])}
    layers = config.get("per_layer_config") or {}
    for layer in range(read_field(family, config, attention.layers)):
        own = {**config, **layers.get(str(layer), {})}
        at = attention.at.format(layer=layer, model_type=config["model_type"])
        core = f"{at}.{attention.core}" if attention.core else at
        site = listed.get(core) or listed.get(core.partition(".")[2], {})
        heads, groups, head_dim = _shape(own, family, attention, site)
        local = {
            role: ("" if role == "o" or attention.core else site.get(role)) or getattr(attention, role)
            for role in ROLES
        }
        local["qkv"] = "" if local["q"] else local["qkv"]
        yield Entry(
            {role: f"{at}.{name}" for role, name in local.items() if name},
            heads,
            head_dim,
            groups,
            site.get("slots", 1),
        )


def _shape(
    config: Mapping[str, Any], family: Family, attention: Attention, site: Mapping[str, Any]
) -> tuple[int, Groups, int]:
    """Return heads, groups and head_dim: as a site lists them, else as the config counts them."""
    num_heads = site.get("heads") or read_field(family, config, attention.heads)
    config_count = read_field(family, config, attention.kv_heads) if attention.kv_heads else None
    num_kv_heads = site.get("kv_heads") or config_count or num_heads
    head_dim = read_field(family, config, attention.head_dim) if attention.head_dim else None
    head_dim = head_dim or read_field(family, config, attention.hidden_size) // num_heads
    uneven = site.get("kv_of_query")
    groups = Groups(tuple(uneven)) if uneven else Groups.contiguous(num_heads, num_kv_heads)
    return num_heads, groups, site.get("head_dim") or head_dim


def _check_rows(entry: Entry, checkpoint: Checkpoint, path: Path) -> None:
    """Raise a UserError where weights do not have the size that the config says."""
    rows = {"q": entry.num_heads, "k": entry.groups.num_kv_heads, "v": entry.groups.num_kv_heads}
    for role, heads in rows.items():
        if role not in entry.names:
            continue
        name = f"{entry.names[role]}.weight"
        found = checkpoint.tensors[name].shape[0] if name in checkpoint.tensors else "no such tensor"
        head_dim = entry.multiple * entry.head_dim
        if found != heads * head_dim:
            raise UserError(
                f"{path}: {name}: expected {heads * head_dim} rows ({heads} heads of {head_dim}), got {found}; "
                "was it written by headfold fold?"
            )
