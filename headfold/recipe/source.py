"""A checkpoint opened by its headers alone, checked to be one that can be folded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.hub import resolve
from ..checkpoint.reader import Checkpoint
from ..checkpoint.stats_file import StatsFile
from ..core.errors import UserError
from ..core.plan import Plan
from ..families import family_of, is_known
from ..families.layout import check_shapes
from ..families.spec import Family, Site
from ..families.spec import sites as sites_of
from ..runtime.load import kv_heads_by_layer
from ..runtime.rotary import plane_frequencies

_ORIGINAL = "fold the original to fewer heads instead"
_POSITIONS_BEHIND_PADDING = {"roberta", "xlm-roberta", "camembert"}

UNKNOWN_CONTEXT = 2048

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); units as the stage counts them: tokens, sites or bytes."""


def silent(stage: str, done: int, total: int) -> None:
    del stage, done, total


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint with its family and sites, checked to be one that can be folded."""

    name: str
    """As the user wrote it: a directory or a hub id."""
    checkpoint: Checkpoint
    family: Family
    every_site: list[Site]
    encoder: bool = False
    """Whether an encoder-decoder's encoder is folded too."""
    proven: bool = False
    """Whether the family was found by probing the architecture, for want of a literal."""

    @property
    def sites(self) -> list[Site]:
        """Those to fold: all but the optional ones, unless these were asked for or there are no others."""
        chosen = [site for site in self.every_site if self.encoder or not site.optional]
        return chosen or self.every_site

    @property
    def cached_sites(self) -> list[Site]:
        """Those whose K and V are cached: an encoder beside a decoder caches nothing."""
        return [site for site in self.every_site if not site.optional] or self.every_site

    @property
    def dtype(self) -> torch.dtype:
        return self.checkpoint.tensors[f"{self.sites[0].weights['o']}.weight"].dtype

    def kv_bytes_per_token(self, plan: Plan | None = None) -> int:
        """Bytes of K and V that one token leaves in the cache, over all sites, in the checkpoint's dtype, as a plan folds them.

        An encoder beside a decoder caches nothing.
        """
        dims = {site.name: site.num_kv_heads * site.head_dim for site in self.every_site}
        planned = plan.sites.items() if plan else ()
        dims |= {name: site.groups.num_kv_heads * site.head_dim for name, site in planned}
        return sum(2 * dims[site.name] * self.dtype.itemsize for site in self.cached_sites)


def open_source(model: str | Path, encoder: bool = False) -> Source:
    """Open a directory or hub id by its headers alone; `encoder` as in `Source`.

    Raises:
        UserError: whatever makes it impossible to fold; one line.
    """
    checkpoint = Checkpoint.open(resolve(str(model)))
    where = f"{model}/config.json"
    _refuse_folded(checkpoint.config, where)
    family, proven = _family(checkpoint, where)
    if "headfold" in checkpoint.config and any(attention.qkv for attention in family.attentions):
        raise UserError(f"{where}: this checkpoint is folded already, and its q, k and v lie apart; {_ORIGINAL}")
    sites = sites_of(family, checkpoint.config, checkpoint.tensors, where)
    for site in sites:
        check_shapes(site, lambda name: checkpoint.tensors[name].shape, where)
    return Source(str(model), checkpoint, family, _turning(sites, checkpoint.config), encoder, proven)


def _turning(sites: list[Site], config: Mapping[str, Any]) -> list[Site]:
    """The sites with the frequencies of their planes, where the config tells one table for all."""
    if not any(site.key_freedom.rotary_dim for site in sites):
        return sites
    found = plane_frequencies(config)
    return [
        replace(site, key_freedom=replace(site.key_freedom, frequencies=found, context=_span(config, place)))
        if site.key_freedom.rotary_dim == 2 * len(found) > 0
        else site
        for place, site in enumerate(sites)
    ]


def _span(config: Mapping[str, Any], layer: int) -> int:
    """Tokens that attention of a layer may look back: its window, or the whole context."""
    whole, kinds = context_limit(config) or UNKNOWN_CONTEXT, config.get("layer_types") or ()
    if kinds:
        slides = "sliding" in kinds[min(layer, len(kinds) - 1)]
    else:
        slides = config.get("use_sliding_window", config["model_type"] in ("mistral", "mixtral", "starcoder2", "phi3"))
    window = config.get("sliding_window") if slides else None
    return min(whole, window) if window else whole


def _refuse_folded(config: Mapping[str, Any], where: str) -> None:
    """Refuse a fold whose K/V heads no single count tells: what could be folded further is the original."""
    listed = config["headfold"].get("sites", []) if isinstance(config.get("headfold"), dict) else []
    known = is_known(config.get("model_type")) and family_of(dict(config), where).attentions
    native = listed and known and any(attention.kv_heads for attention in known)
    if kv_heads_by_layer(config) is not None or native or any({"kv_of_query", "slots"} & site.keys() for site in listed):
        raise UserError(
            f"{where}: this checkpoint is folded already, to groups, counts or widths of K/V heads that differ; {_ORIGINAL}"
        )


def _family(checkpoint: Checkpoint, where: str) -> tuple[Family, bool]:
    """The literal of a known `model_type`; of one that only transformers knows, a literal that proves itself (and True)."""
    config = checkpoint.config
    model_type = config.get("model_type")
    if is_known(model_type) or not isinstance(model_type, str) or "text_config" in config or "auto_map" in config:
        return family_of(config, where), False
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return family_of(config, where), False
    from ..detect import prove

    return prove(checkpoint.path), True


def context_limit(config: Mapping[str, Any]) -> int | None:
    """Tokens that the model takes at once, under whichever name its config has it."""
    inner = config.get("text_config") or {}
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
    named = (config.get(name) or inner.get(name) for name in names)
    limit = next((value for value in named if value), None)
    # Their positions begin behind the padding token's number.
    offset = config.get("pad_token_id", 1) + 1 if config.get("model_type") in _POSITIONS_BEHIND_PADDING else 0
    return limit and limit - offset


def open_stats(path: str | Path | None, source: Source) -> StatsFile | None:
    """The statistics file, refused if it is of another checkpoint."""
    if path is None:
        return None
    stats = StatsFile(Path(path))
    if stats.metadata.get("model") not in (None, source.checkpoint.fingerprint()):
        raise UserError(f"{path}: statistics of another model than {source.name}; run headfold calibrate on this one")
    return stats


def refuse_existing(path: Path, force: bool) -> None:
    """Nothing of the user's is overwritten unasked."""
    if path.is_dir():
        raise UserError(f"{path}: expected a file to write, got a directory")
    if path.exists() and not force:
        raise UserError(f"{path}: expected nothing there, got a file; choose another or pass --force to replace it")
