"""The original model while it runs: its calibration data, its statistics, and the heads that are fitted to its answers."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import calibration as calibrating
from ..adequacy.surprise import surprise
from ..checkpoint.reader import Checkpoint, check_finite
from ..core.errors import UserError
from ..core.fitted import FittedHeads
from ..core.heads import Heads
from ..core.plan import Plan
from ..core.progress import Progress, counter, no_progress
from ..core.stats import SiteStats
from ..corpus.samples import draw_sample, window_length
from ..corpus.windows import draw_windows
from ..corpus.windows import fingerprint as fingerprint_of
from ..descent.descend import NotFinite
from ..families.spec import Site
from ..hf_models import compute_dtype, open_model, open_tokenizer, stored_dtype
from ..hf_models.streamed import is_streamed
from ..parallel import on_all, on_main, on_main_only
from ..refine import distill, heal, measuring, refit
from ..refine.fitting import Watch
from ..refine.scope import Healing
from ..runtime.load import own_class
from ..stats_file import StatsFile
from ..surgery import kept_weights, query_order, site_heads
from .calibration_config import CalibrationConfig
from .fitted_sites import FittedSites
from .source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEALING_BYTES = 2**31
"""Bytes of hidden states, attention inputs and answers, in float32, while one block after another is healed on text."""
MAX_TOKENS = 2**24
"""Tokens that the model is healed on at most before they are repeated: their text is held in memory."""
MAX_ITEM_FACTOR = 4
"""Healing draws at most this many times the calibration items."""


@dataclass(slots=True)
class Teacher:
    """The original, opened at most once, with its calibration data. Several processes share its passes over data."""

    source: Source
    config: CalibrationConfig | None
    """None where no step needs calibration data."""
    device: str
    dtype: torch.dtype | None = None
    """dtype that the model computes in; by default the fastest that holds the weights (`hf_models.compute_dtype`)."""
    progress: Progress = no_progress
    given: Mapping[str, Tensor] | None = None
    """The calibration data, where a program gave them."""
    notes: list[str] = field(default_factory=list)
    _model: Any = None
    _sample: Mapping[str, Tensor] | None = None
    _facts: dict[str, str] | None = None

    @property
    def model(self) -> "PreTrainedModel":
        """The running model. Every rank must ask for it at the same point."""
        if self._model is None:
            stored = stored_dtype(self.source.checkpoint.path)
            dtype, why = on_main(lambda: (self.dtype, "") if self.dtype else compute_dtype(stored, self.device))
            self.notes += [why] if why else []
            fingerprint = on_main(self.source.checkpoint.fingerprint)
            self._model = on_all(partial(self._open, fingerprint, dtype))
        return self._model

    def _open(self, fingerprint: str, dtype: torch.dtype) -> "PreTrainedModel":
        name, checkpoint = self.source.name, self.source.checkpoint
        if checkpoint.fingerprint() != fingerprint:
            raise UserError(f"{name}: expected the checkpoint of rank 0, got another; copy that one here")
        return open_finite(name, checkpoint, dtype, self.device)

    def use_sample(self, stats: StatsFile | None) -> None:
        """Take the calibration data that lies beside earlier statistics, if it is there. `stats` matters on rank 0 alone.

        Raises:
            UserError: it is not the data that the statistics were measured on.
        """
        self._sample = on_main(lambda: None if stats is None else _sample_of(stats)) or self._sample

    def close(self) -> None:
        """Free the model's memory."""
        self._model = None

    @property
    def sample(self) -> Mapping[str, Tensor]:
        """The calibration data, drawn once, on rank 0. Every rank must ask for it at the same point."""
        self._sample = self._sample or self.given
        if self._sample is None:
            config = self._require_config()
            writes_text = config.kind == "text" and config.source == "self"
            model = self.model if writes_text else None
            self._sample = on_main(partial(self._draw, config, model))
        return self._sample

    @property
    def text_length(self) -> float | None:
        """The mean length of texts that come one by one, once they are drawn; None of data whose length is known."""
        lengths = calibrating.text_lengths(self._sample) if self._sample and self.takes_texts() else None
        return None if lengths is None else float(lengths.double().mean())

    def takes_texts(self) -> bool:
        """Return whether the data are texts that come one by one."""
        return self.config is not None and self.config.kind in ("pairs", "sentences", "captions", "spoken", "texts")

    def _require_config(self) -> CalibrationConfig:
        assert self.config is not None, "this job was planned without calibration data"
        return self.config

    def _draw(self, config: CalibrationConfig, model: "PreTrainedModel | None") -> dict[str, Tensor]:
        path, context = self.source.checkpoint.path, window_length(self.source.config, config.context)
        if config.kind != "text":
            return draw_sample(
                config.kind, config.source, path=path, num_items=config.items, context=context, seed=config.seed,
                columns=config.columns, joined=True, say=self.notes.append,
            )  # fmt: skip
        windows = draw_windows(
            config.source, tokenizer=open_tokenizer(path), model=model, num_tokens=config.tokens, context=context, seed=config.seed,
            progress=counter(self.progress, "sample", config.tokens),
        )  # fmt: skip
        self.progress("sample", config.tokens, config.tokens)
        return {"input_ids": windows}

    def write_statistics(self, path: Path, statistics: frozenset[str] | None = None) -> dict[str, str]:
        """Measure `statistics` (default: all) of every site, write them to the file `path` and return its metadata."""
        sample, model, metadata = self.sample, self.model, self.statistics_metadata()
        tensors, counted = self.source.checkpoint.tensors, partial(counter, self.progress, "calibrate")
        measuring.write_statistics(
            path, model, self.source.every_site, sample, metadata, lambda name: tensors[name].shape, statistics, counted
        )
        return metadata

    def statistics_metadata(self) -> dict[str, str]:
        """Return what a file of statistics says of the model and of the calibration data."""
        return {"model": self.source.checkpoint.fingerprint(), **self.facts()}

    def data_facts(self) -> dict[str, str]:
        """Return what describes the calibration data: enough to draw the same again."""
        return self._require_config().facts(self.sample)

    def facts(self) -> dict[str, str]:
        """Return the same as files and cards record it, text with how the original takes it. Every rank must ask at the same point."""
        if self._facts is None:
            facts, sample, model = self.data_facts(), self.sample, self.model
            self._facts = on_main(lambda: facts | _surprise(model, sample))
        return self._facts

    def refit(
        self,
        plan_of: Callable[[Site], Plan],
        stats: Mapping[str, SiteStats] | None,
        fitted: FittedSites,
        by: str,
        watch: Watch | None = None,
    ) -> None:
        """Refit the sites that `fitted` lacks to the original's answers, and keep them there with what of their merge stays.

        By "block" each is trained at the end, which one that the "model" trains with all others does not need. A site's plan and
        statistics are asked for when its block has run; `watch` as in `refine.fitting.fit`.
        """
        passes = refit.DESCENT_PASSES if by == "block" else 0
        fit = partial(refit.refit, watch=watch, passes=passes)
        self._fit("refit", fit, refit.tokens_per_block(self.sample, passes=passes), plan_of, stats, None, fitted)

    def refit_together(
        self,
        plan: Plan,
        stats: Mapping[str, SiteStats] | None,
        refits: Mapping[str, FittedHeads],
        fitted: FittedSites,
        seed: int,
    ) -> None:
        """Train all sites together in one pass over the data, from where `refits` end; rank 0 merges and keeps, all ranks train.

        What overflows there, and all of a model that is read from disk as it runs, stays as `refits` have it.
        """
        why = "the model is read from disk as it runs"
        try:
            if not is_streamed(self.model):
                self._distill("refit", plan, stats, refits, fitted, None, seed)
                return
        except NotFinite:
            why = "its error overflows"
        facts = self.facts()
        self.notes.append(
            f"sites were not refitted together, as {why}: the refit ends with least squares (--refit-by block trains each)"
        )
        for site in self.source.sites:
            on_main_only(lambda site=site: fitted.put(site.name, refits[site.name], facts))  # type: ignore[misc]

    def heal(
        self,
        plan: Plan,
        stats: Mapping[str, SiteStats] | None,
        refits: Mapping[str, FittedHeads] | None,
        healed: FittedSites,
        healing: Healing,
        seed: int,
    ) -> None:
        """Train the sites that `healed` lacks, from where merge and `refits` end. By model, all are trained again if one is lacking."""
        trainer = self._with_more_data(healing)
        if healing.by == "model":
            trainer._distill("heal", plan, stats, refits, healed, healing.tokens, seed)
            return
        total = heal.tokens_per_block(trainer.sample, healing.tokens)
        fit = partial(heal.heal, tokens=healing.tokens, seed=seed)
        trainer._fit("heal", fit, total, lambda site: plan, stats, refits, healed)

    def _distill(
        self,
        stage: str,
        plan: Plan,
        stats: Mapping[str, SiteStats] | None,
        refits: Mapping[str, FittedHeads] | None,
        healed: FittedSites,
        tokens: int | None,
        seed: int,
    ) -> None:
        """Train all sites together, with None on all data once; rank 0 merges and keeps, all ranks train."""
        read, sites, sample, facts = self.source.checkpoint.read, self.source.sites, self.sample, self.facts()

        def merge(site: Site) -> Heads:
            return on_main(lambda: site_heads(site, plan, read, stats, refits))

        found = distill.distill(
            self.model, sites, merge, sample, tokens=tokens, seed=seed,
            progress=counter(self.progress, stage, distill.total_tokens(sample, tokens)),
        )  # fmt: skip
        for site in sites:
            whole = found[site.name].completed(merge(site))  # gains are not trained
            on_main_only(lambda site=site, whole=whole: healed.put(site.name, whole, facts))  # type: ignore[misc]

    def _with_more_data(self, healing: Healing) -> "Teacher":
        """Return a teacher with as much more data of the same source as healing uses and memory holds.

        Text that the model would have to write itself, and data that a program gave, stay as they are. Tokens that are seen once heal
        better than fewer tokens seen as often as that takes.
        """
        config = self._require_config()
        # As healing counts them, with the padding of its batches.
        have = sum(map(calibrating.num_tokens, calibrating.batches_in_order(self.sample, calibrating.TOKENS_PER_BATCH)))
        most = MAX_ITEM_FACTOR * have
        if config.kind == "text":
            most = MAX_TOKENS if healing.by == "model" else HEALING_BYTES // (3 * 4 * self._hidden_size())
        factor = min(healing.tokens, most) / have
        if config.is_written or factor <= 1:
            return self
        more = replace(config, tokens=round(factor * have), items=math.ceil(factor * config.items))
        return replace(self, config=more, _model=self.model, _sample=None, _facts=None, notes=[])

    def _hidden_size(self) -> int:
        tensors = self.source.checkpoint.tensors
        return max(tensors[f"{site.weights['o']}.weight"].shape[0] for site in self.source.sites)

    def _fit(
        self,
        stage: str,
        fit: Callable[..., Any],
        tokens: int,
        plan_of: Callable[[Site], Plan],
        stats: Mapping[str, SiteStats] | None,
        refits: Mapping[str, FittedHeads] | None,
        fitted: FittedSites,
    ) -> None:
        """Run `fit` on every site that `fitted` lacks; it runs `tokens` tokens through each. Rank 0 merges and keeps, all ranks fit."""
        read, model, facts = self.source.checkpoint.read, self.model, self.facts()
        sites = {site.name: site for site in self.source.sites}
        # One site in memory at a time.
        merged: dict[str, Heads] = {}
        plans: dict[str, Plan] = {}

        def merge(site: Site) -> Heads:
            merged.clear()
            plans.clear()
            plans[site.name] = plan_of(site)
            merged[site.name] = on_main(partial(site_heads, site, plans[site.name], read, stats, refits))
            return merged[site.name]

        def order(site: Site) -> tuple[int, ...]:
            return query_order(site, plans[site.name])

        def keep(name: str, found: FittedHeads) -> None:
            kept = kept_weights(sites[name], plans[name]) and not found.is_complete
            whole = found if kept else found.completed(merged[name])
            on_main_only(lambda: fitted.put(name, whole, facts))

        done = on_main(lambda: frozenset(fitted))
        fit(
            model, self.source.sites, merge, self.sample, order=order, skip=done, keep=keep,
            progress=counter(self.progress, stage, tokens * len(sites)),
        )  # fmt: skip


def _surprise(model: "PreTrainedModel", sample: Mapping[str, Tensor]) -> dict[str, str]:
    writes = calibrating.is_packed_text(sample) and model.get_output_embeddings() is not None
    return surprise(model, sample["input_ids"]).facts() if writes else {}


def _sample_of(stats: StatsFile) -> Mapping[str, Tensor] | None:
    sample = stats.sample()
    if sample is not None and stats.metadata.get("fingerprint") not in (None, fingerprint_of(sample)):
        raise UserError(
            f"{stats.path}: expected the calibration data that its fingerprint names, got other data; run headfold calibrate again"
        )
    return sample


def open_finite(name: str, checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> "PreTrainedModel":
    """Open a checkpoint with the class that runs it.

    Raises:
        UserError: it does not load, or has weights that are not finite.
    """
    model = open_model(
        checkpoint.path, dtype=dtype, device=device, model_class=own_class(checkpoint.config, checkpoint.path)
    )
    for path, parameter in model.named_parameters():
        if not parameter.is_meta:
            check_finite(f"{name}: {path}", parameter)
    return model
