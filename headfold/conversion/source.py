"""A checkpoint, opened by its headers and checked to be one that can be folded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.reader import Checkpoint, check_finite
from ..core.errors import UserError
from ..core.plan import Plan
from ..core.progress import Progress, no_progress, silent
from ..corpus.samples import kind_of
from ..families import cached, family_of, is_known
from ..families.folded import kv_heads_by_layer
from ..families.layout import check_dtypes, check_shapes, shapes_of_statistics
from ..families.spec import Family, Site
from ..families.spec import sites as sites_of
from ..families.wrapped import is_wrapper
from ..hf_models.building import fitting_class, open_config
from ..rotary_tables import with_plane_frequencies
from ..sources.plain import Plain, open_plain
from ..stats_file import StatsFile
from ..towers import check_tower_runs, tower_sites, why_no_tower
from ..trusted_code import trusted_code

_FOLD_THE_ORIGINAL = "fold the original to fewer heads instead"


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint with its family and sites, checked to be one that can be folded."""

    name: str
    """Name of the model as the user wrote it: a directory, a GGUF file or a hub id."""
    plain: Plain
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    """The checkpoint's config; of a wrapper with all fields of its class, as published ones leave out what a class assumes."""
    family: Family
    every_site: list[Site]
    encoder: bool = False
    """Whether the encoder of an encoder-decoder, or the tower of a wrapper, is folded too."""
    detected: bool = False
    """Whether the architecture has no family literal and was detected by experiments on a toy model."""
    code: tuple[str, ...] = ()
    """Files of the checkpoint's own code that run because the user trusts them."""

    @property
    def sites(self) -> list[Site]:
        """The sites to fold: all but the optional ones, unless those were asked for or there are no others."""
        chosen = [site for site in self.every_site if self.encoder or not site.optional]
        return chosen or self.every_site

    @property
    def cached_sites(self) -> list[Site]:
        """The sites whose K and V are cached; an encoder beside a decoder caches nothing."""
        return cached.cached_sites(self.every_site)

    @property
    def caches(self) -> bool:
        """Whether the model caches K and V: it generates token by token."""
        return kind_of(self.config) in ("text", "pairs", "audio")

    @property
    def num_kv_heads(self) -> int:
        """The K/V heads of the site that has most."""
        return max(site.num_kv_heads for site in self.sites)

    @property
    def dtype(self) -> torch.dtype:
        return self.checkpoint.tensors[f"{self.cached_sites[0].weights['o']}.weight"].dtype

    def read_finite(self, name: str) -> Tensor:
        """Return a tensor of the checkpoint.

        Raises:
            UserError: it has elements that are not finite.
        """
        tensor = self.checkpoint.read(name)
        check_finite(f"{self.name}: {name}", tensor)
        return tensor

    def kv_bytes_per_token(self, plan: Plan | None = None) -> int:
        """Return the bytes of K and V that one token adds to the cache over all sites, in the checkpoint's dtype, as `plan` folds them."""
        return cached.kv_bytes_per_token(self.every_site, self.dtype.itemsize, plan)

    def cache_bytes(self, plan: Plan | None = None) -> int:
        """Return the bytes of the cache of one sequence of the whole context (`families.cached.cache_bytes`), as `plan` folds it."""
        return cached.cache_bytes(self.config, self.every_site, self.dtype.itemsize, plan)


def open_source(
    model: object, encoder: bool = False, adapter: str | Path | None = None, progress: Progress | None = None,
    say: Callable[[str], None] = silent,
) -> Source:  # fmt: skip
    """Open a model: its config and the headers of its weights; none are read but those that `open_plain` decodes or merges.

    An architecture without a family literal is detected by experiments on a toy model of its config. `encoder` as in `Source`.

    Raises:
        UserError: whatever makes folding impossible, in one line.
    """
    plain = open_plain(model, None if adapter is None else str(adapter), progress or no_progress, say)
    checkpoint = Checkpoint.open(plain.path)
    where = f"{model}/config.json"
    _refuse_uneven_folds(checkpoint.config, where)
    family, detected = _family(checkpoint, where)
    opened = open_config(checkpoint.config, where)  # what transformers refuses cannot be run, before or after
    checkpoint = _with_fitting_class(checkpoint)
    config = opened.to_dict() if is_wrapper(checkpoint.config) else checkpoint.config
    if "headfold" in checkpoint.config and any(attention.qkv for attention in family.attentions):
        raise UserError(
            f"{where}: this checkpoint is already folded, with q, k and v as separate tensors; {_FOLD_THE_ORIGINAL}"
        )
    sites = _checked(sites_of(family, config, checkpoint.tensors, where), checkpoint, where)
    sites = with_plane_frequencies(sites, config, where)
    code = trusted_code(config["model_type"])
    files = () if code is None else code.files
    return with_encoder(Source(str(model), plain, checkpoint, config, family, sites, False, detected, files), encoder)


def _checked(sites: list[Site], checkpoint: Checkpoint, where: str) -> list[Site]:
    for site in sites:
        check_shapes(site, lambda name: checkpoint.tensors[name].shape, where)
        check_dtypes(site, lambda name: checkpoint.tensors[name].dtype, where)
    return sites


def with_encoder(source: Source, encoder: bool) -> Source:
    """Return the source with its encoder, or the tower of a wrapper, among the sites to fold or not.

    Raises:
        UserError: the attention of the tower is not known.
    """
    tower = list[Site]()
    if encoder and is_wrapper(source.config) and not any(site.optional for site in source.every_site):
        where = f"{source.name}/config.json"
        tower = _checked(tower_sites(source.config, source.checkpoint.tensors, where), source.checkpoint, where)
    return replace(source, encoder=encoder, every_site=[*tower, *source.every_site])


def with_sites_of(source: Source, plan: Plan) -> Source:
    """Return the source with the encoder among the sites to fold if the plan has sites beside those that cache."""
    return with_encoder(source, bool(plan.sites.keys() - {site.name for site in source.cached_sites}))


def with_seen_tower(source: Source, kind: str) -> Source:
    """Return the source with the tower of a wrapper among its sites, where data of this kind pass it and its attention is known."""
    runs = is_wrapper(source.config) and kind != "text" and kind != "texts"
    return (
        replace(with_encoder(source, True), encoder=False) if runs and why_no_tower(source.config) is None else source
    )


def _with_fitting_class(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the class in its config that its tensors fit, which is the one to run and to write."""
    if not checkpoint.config.get("architectures"):
        return checkpoint
    return replace(checkpoint, config=checkpoint.config | {"architectures": [fitting_class(checkpoint)]})


def open_stats(path: str | Path | None, source: Source) -> StatsFile | None:
    """Open a file of statistics.

    Raises:
        UserError: the statistics are of another checkpoint, or of text where a tower is to be folded.
    """
    if path is None:
        return None
    stats = StatsFile(Path(path))
    if stats.metadata.get("model") not in (None, source.checkpoint.fingerprint()):
        raise UserError(f"{path}: statistics of another model than {source.name}; run headfold calibrate on this one")
    if is_wrapper(source.config):
        check_tower_runs(f"{path}: statistics of {source.name}", source.sites, stats.metadata.get("kind"))
    for site in source.every_site:
        for name, expected in shapes_of_statistics(
            site, lambda tensor: source.checkpoint.tensors[tensor].shape
        ).items():
            if (got := stats.shape(site.name, name)) not in (None, expected):
                raise UserError(
                    f"{path}: {site.name}/{name}: expected the shape {expected}, got {got}; run headfold calibrate again"
                )
    return stats


def _refuse_uneven_folds(config: Mapping[str, Any], where: str) -> None:
    """Refuse a fold whose K/V heads are not described by one count: its original can be folded further, it cannot."""
    listed = (config.get("headfold") or {}).get("sites", [])
    known = is_known(config.get("model_type")) and family_of(dict(config), where).attentions
    stock_gqa = listed and known and any(attention.kv_heads for attention in known)
    if (
        kv_heads_by_layer(config) is not None
        or stock_gqa
        or any({"kv_of_query", "slots"} & site.keys() for site in listed)
    ):
        raise UserError(
            f"{where}: this checkpoint is already folded, with K/V heads that differ in group size, count or head_dim; "
            f"{_FOLD_THE_ORIGINAL}"
        )


def _family(checkpoint: Checkpoint, where: str) -> tuple[Family, bool]:
    """Return the family of a known `model_type` and False, or a detected one and True."""
    config = checkpoint.config
    model_type = config.get("model_type")
    if is_known(model_type) or not isinstance(model_type, str) or "text_config" in config:
        return family_of(config, where), False
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return family_of(config, where), False
    from ..detection import prove

    return prove(checkpoint.path), True
