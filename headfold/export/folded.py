"""A folded checkpoint as the layouts see it: its attentions by layer, with their heads and groups as the config lists them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.reader import Checkpoint
from ..core.errors import UserError
from ..core.groups import Groups
from ..families import family_of
from ..families.spec import Attention, Family, read_field
from ..runtime.load import check

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROLES = ("q", "k", "v", "o")


@dataclass(frozen=True, slots=True)
class Entry:
    """The attention of one layer. `names` are role → tensor name on disk without its suffix, the projections unfused."""

    names: Mapping[str, str]
    num_heads: int
    head_dim: int
    """Width of a K/V head, and of its queries."""
    groups: Groups
    """Query head → K/V head."""

    @property
    def width(self) -> int:
        """Queries of the largest group."""
        return max(self.groups.sizes)

    def slots(self, width: int) -> tuple[int, ...]:
        """Slot → query head, every group filled up to `width` slots; `num_heads` in an empty one."""
        empty = [self.num_heads]
        return tuple(slot for heads in self.groups.members for slot in [*heads, *empty * (width - len(heads))])


@dataclass(frozen=True, slots=True)
class Folded:
    """What a layout may look at before anything is read: config and attentions. `where` names it in messages."""

    config: Mapping[str, Any]
    family: Family
    entries: tuple[Entry, ...]
    where: str = "config.json"

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @property
    def counts(self) -> tuple[int, ...]:
        """K/V heads, by layer."""
        return tuple(entry.groups.num_kv_heads for entry in self.entries)

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have equally many K/V heads of one width."""
        return len({(entry.groups.num_kv_heads, entry.head_dim) for entry in self.entries}) == 1

    @property
    def is_even(self) -> bool:
        """Whether inside every layer all groups are equal."""
        return all(entry.groups.is_even for entry in self.entries)

    @property
    def has_window(self) -> bool:
        """Whether attention of any layer sees only the last tokens."""
        turned_on = self.config.get("use_sliding_window", self.model_type == "mistral")
        windows = turned_on and self.config.get("sliding_window", 4096 if self.model_type == "mistral" else None)
        return bool(windows) or "sliding_attention" in (self.config.get("layer_types") or ())

    def field(self, name: str) -> Any:
        """A config field as its class sees it."""
        return read_field(self.family, self.config, name)


def folded(config: Mapping[str, Any], where: str = "config.json") -> Folded:
    """Of a config alone. A model with other attentions than one per layer, or without a language head, has no entries."""
    family = family_of(dict(config), where)
    simple = len(family.attentions) == 1 and (config.get("architectures") or [""])[0].endswith("ForCausalLM")
    return Folded(config, family, tuple(_entries(config, family)) if simple else (), where)


def stock_config(source: Folded) -> "PreTrainedConfig":
    """The config of the source's own class, with all that this class assumes."""
    import transformers

    config_class = getattr(transformers, source.config["architectures"][0]).config_class
    return config_class.from_dict(without_code(source.config))


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that stay when a fold leaves headfold's runtime."""
    return {name: value for name, value in config.items() if name not in ("headfold", "auto_map")}


def open_folded(path: str | Path) -> tuple[Checkpoint, Folded]:
    """Open a directory that `fold` wrote.

    Raises:
        UserError: no checkpoint, an unfinished one, or one whose config, plan and tensors disagree.
    """
    path = Path(path)
    found = folded(check(path), f"{path}/config.json")
    checkpoint = Checkpoint.open(path)
    for entry in found.entries:
        _check_rows(entry, checkpoint, path)
    return checkpoint, found


def _entries(config: Mapping[str, Any], family: Family) -> Iterator[Entry]:
    (attention,) = family.attentions
    listed = {site["module"]: site for site in (config.get("headfold") or {}).get("sites", [])}
    for layer in range(read_field(family, config, attention.layers)):
        at = attention.at.format(layer=layer, model_type=config["model_type"])
        site = listed.get(at, {})
        heads, groups, head_dim = _shape(config, family, attention, site)
        names = {role: f"{at}.{site.get(role) or getattr(attention, role)}" for role in ROLES}
        yield Entry(names, heads, head_dim, groups)


def _shape(
    config: Mapping[str, Any], family: Family, attention: Attention, site: Mapping[str, Any]
) -> tuple[int, Groups, int]:
    """Heads, groups and their width: as a site lists them, else as the config counts them."""
    num_heads = site.get("heads") or read_field(family, config, attention.heads)
    native = read_field(family, config, attention.kv_heads) if attention.kv_heads else None
    num_kv_heads = site.get("kv_heads") or native or num_heads
    width = read_field(family, config, attention.head_dim) if attention.head_dim else None
    width = width or read_field(family, config, attention.hidden_size) // num_heads
    uneven = site.get("kv_of_query")
    groups = Groups(tuple(uneven)) if uneven else Groups.contiguous(num_heads, num_kv_heads)
    return num_heads, groups, site.get("head_dim") or width


def _check_rows(entry: Entry, checkpoint: Checkpoint, path: Path) -> None:
    """Refuse weights that are not as large as the config says."""
    rows = {"q": entry.num_heads, "k": entry.groups.num_kv_heads, "v": entry.groups.num_kv_heads}
    for role, heads in rows.items():
        name = f"{entry.names[role]}.weight"
        found = checkpoint.tensors[name].shape[0] if name in checkpoint.tensors else "no such tensor"
        if found != heads * entry.head_dim:
            raise UserError(
                f"{path}: {name}: expected {heads * entry.head_dim} rows ({heads} heads of {entry.head_dim}), got {found}; "
                "was it written by headfold fold?"
            )
