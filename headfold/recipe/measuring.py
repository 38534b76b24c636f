"""What needs the original running: its calibration text, statistics, refit and healing."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import calibration as calibrating
from ..checkpoint.reader import Checkpoint, check_finite
from ..checkpoint.stats_file import StatsFile, write_stats
from ..core.errors import UserError
from ..core.fitted import FittedHeads
from ..core.heads import Heads
from ..core.plan import Plan
from ..core.stats import SiteStats
from ..corpus.samples import draw_sample, kind_of
from ..corpus.windows import draw_windows, fingerprint
from ..families.spec import Site
from ..hf_models import compute_dtype, open_model, open_tokenizer, stored_dtype
from ..parallel import agreed, everyone, together
from ..refine import heal, refit
from ..runtime.load import own_class
from ..surgery import kept_weights, query_order, site_heads
from .fitted import FittedFiles
from .source import Progress, Source, context_limit, open_source, refuse_existing, silent

DEFAULT_CALIBRATION = "self"
DEFAULT_TOKENS = 65_536
DEFAULT_ITEMS = {"pairs": 2048, "sentences": 2048, "images": 512, "captions": 512, "audio": 512}
"""Of what is not one stream of text. On a small T5 2,048 pairs lose a tenth less than 512; large images of that number would not fit."""
HEALING_BYTES = 2**31
"""Of hidden states, attentions' inputs and answers in float32, while one block after another is healed on text."""
MORE_ITEMS = 4
"""Times as many other items as calibration has are healed on, at most."""
MAX_CONTEXT = 1024
"""Longest calibration window; shorter where the model's own context is."""


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """What calibration measured and where it lies."""

    path: Path
    source: str
    fingerprint: str
    tokens: int
    sites: int
    seconds: float
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "tokens_per_second": round(self.tokens / self.seconds, 1)}


def calibrate(
    model: str | Path,
    stats: str | Path,
    *,
    calibration: str | None = None,
    tokens: int | None = None,
    items: int | None = None,
    columns: Sequence[str] = (),
    context: int | None = None,
    seed: int = 0,
    force: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> CalibrationResult:
    """Run `model` over calibration tokens and write the statistics that plans and merges need to the file `stats`.

    `calibration` is any source of `headfold.corpus` that suits the model: text for a language model (`tokens` of it), pairs for
    an encoder-decoder, sentences, images or sound (`items` of them, from the named `columns`). `context` is the length of its
    windows, or where its texts are cut (default: the model's own, at most `MAX_CONTEXT`). Files of several runs add
    (`headfold.checkpoint.stats_file.add_stats`).

    Raises:
        UserError: a source that cannot be folded or read, or a file in the way without `force`.
    """
    path = Path(stats)
    refuse_existing(path, force)
    source = open_source(model)
    data = CalibrationData.chosen(source, calibration, tokens, items, tuple(columns), context, seed)
    run = Teacher(source, data, device or default_device(), progress or silent)
    started = time.monotonic()
    metadata = run.write_statistics(path)
    seconds = time.monotonic() - started
    return CalibrationResult(
        path, data.source, metadata["fingerprint"], int(metadata["tokens"]), len(source.every_site), seconds, run.notes
    )


def default_device() -> str:
    """The accelerator, where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """Which data, before any of it is read. `tokens` counts packed text, `items` everything else."""

    kind: str
    """As `headfold.corpus.samples.kind_of` says."""
    source: str
    tokens: int
    items: int
    columns: tuple[str, ...]
    context: int | None
    seed: int

    @classmethod
    def chosen(
        cls,
        opened: Source,
        source: str | None,
        tokens: int | None,
        items: int | None,
        columns: tuple[str, ...],
        context: int | None,
        seed: int,
    ) -> "CalibrationData":
        """Defaults filled in.

        Raises:
            UserError: no source for a model that cannot write its own text.
        """
        kind = kind_of(opened.checkpoint.config)
        if source is None and kind != "text":
            wanted = {
                "pairs": "pairs of text", "sentences": "sentences", "images": "images", "captions": "images with texts",
                "audio": "sound",
            }[kind]  # fmt: skip
            raise UserError(
                f"{opened.name}: calibrates on {wanted}, and there is no default for those; pass --calibration SOURCE"
            )
        numbers = (tokens or DEFAULT_TOKENS, items or DEFAULT_ITEMS.get(kind, 0))
        return cls(kind, source or DEFAULT_CALIBRATION, *numbers, columns, context, seed)

    def facts(self, sample: Mapping[str, Tensor]) -> dict[str, str]:
        """For the record, and enough to draw the same again."""
        first = next(iter(sample.values()))
        amount = first.numel() if self.kind == "text" else len(first)
        length = {"context": str(first.shape[1])} if first.ndim == 2 else {}
        columns = {"columns": ",".join(self.columns)} if self.columns else {}
        said = {"kind": self.kind, "source": self.source, "tokens": str(amount), "seed": str(self.seed)}
        return {**said, **length, **columns, "fingerprint": fingerprint(sample)}


def running(name: str, checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> Any:
    """The original as its own class runs it.

    Raises:
        UserError: it does not load, or has weights that are not finite.
    """
    model = open_model(checkpoint.path, dtype=dtype, device=device, model_class=own_class(checkpoint.config))
    for path, parameter in model.named_parameters():
        if not parameter.is_meta:
            check_finite(f"{name}: {path}", parameter)
    return model


@dataclass(slots=True)
class Teacher:
    """What needs the running original: its calibration data, statistics, refit, healing; the model is opened at most once."""

    source: Source
    data: CalibrationData
    device: str
    progress: Progress
    notes: list[str] = field(default_factory=list)
    _model: Any = None
    _sample: Mapping[str, Tensor] | None = None

    @property
    def model(self) -> Any:
        if self._model is None:
            dtype, why = compute_dtype(stored_dtype(self.source.checkpoint.path), self.device)
            self.notes.append(why)
            name, checkpoint = self.source.name, self.source.checkpoint
            with together("open", name, self.source.every_site, checkpoint.fingerprint(), dtype, self.device):
                self._model = everyone(partial(running, name, checkpoint, dtype, self.device))
        return self._model

    def use_sample(self, stats: StatsFile | None) -> None:
        """Take the calibration data from where earlier statistics were written, if it is there."""
        if stats is not None:
            self._sample = stats.sample()

    def close(self) -> None:
        """Let go of the model's memory."""
        with together("close"):
            self._model = None

    def window_length(self) -> int:
        limit, asked = context_limit(self.source.checkpoint.config) or MAX_CONTEXT, self.data.context
        if asked is not None and asked > limit:
            raise UserError(f"--context {asked}: the model's own context is {limit}; choose at most that")
        return asked or min(limit, MAX_CONTEXT)

    @property
    def sample(self) -> Mapping[str, Tensor]:
        """Calibration data, drawn once."""
        if self._sample is None:
            self._sample = self._text() if self.data.kind == "text" else self._items()
        return self._sample

    def _text(self) -> dict[str, Tensor]:
        data = self.data
        advance = self._count("sample", data.tokens)
        windows = draw_windows(
            data.source,
            tokenizer=open_tokenizer(self.source.checkpoint.path),
            model=self.model if data.source == "self" else None,
            num_tokens=data.tokens,
            context=self.window_length(),
            seed=data.seed,
            progress=advance,
        )
        self.progress("sample", data.tokens, data.tokens)
        return {"input_ids": windows}

    def _items(self) -> dict[str, Tensor]:
        data = self.data
        return draw_sample(
            data.kind,
            data.source,
            path=self.source.checkpoint.path,
            num_items=data.items,
            context=self.window_length(),
            seed=data.seed,
            columns=data.columns,
        )

    def _count(self, stage: str, total: int) -> Callable[[int], None]:
        done = 0
        self.progress(stage, 0, total)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.progress(stage, done, total)

        return advance

    def write_statistics(self, path: Path) -> dict[str, str]:
        """Calibrate, write the file, return its metadata."""
        sample, model = self.sample, self.model
        advance = self._count("calibrate", calibrating.total_tokens(sample))
        with together("collect", sample):
            sums = calibrating.collect(model, self.source.every_site, sample, advance)
        metadata = {"model": self.source.checkpoint.fingerprint(), **self.facts()}
        write_stats(path, sums, metadata, sample)
        return metadata

    def facts(self) -> dict[str, str]:
        """What the calibration data is, for the record."""
        return self.data.facts(self.sample)

    def refit(self, plan: Plan, stats: Mapping[str, SiteStats] | None, fitted: FittedFiles) -> None:
        """Refit the heads that are not yet there to the original's answers; what their merge made of W_q and W_k is kept too."""
        total = calibrating.total_tokens(self.sample) * refit.num_passes()
        self._fit("refit", refit.refit, total, plan, stats, None, fitted)

    def heal(
        self,
        plan: Plan,
        stats: Mapping[str, SiteStats] | None,
        refits: Mapping[str, FittedHeads] | None,
        healed: FittedFiles,
        tokens: int,
        seed: int,
    ) -> None:
        """Train the heads that are not yet there, each block alone with so many tokens, from where merge and `refits` end."""
        run = self._with_more_data(tokens)
        total = heal.cost(run.sample, tokens)
        run._fit("heal", partial(heal.heal, tokens=tokens, seed=seed), total, plan, stats, refits, healed)

    def _with_more_data(self, tokens: int) -> "Teacher":
        """The same with as much of the same source as blocks are healed with, as far as that fits in memory; what the model would have to
        write itself stays as it is. Measured on a small Llama at 2 of 8 heads: a rise of 0.0225 from 524 k tokens seen once, of 0.0259 from
        65 k seen eight times."""
        have, width = calibrating.total_tokens(self.sample), self._width()
        most = HEALING_BYTES // (3 * 4 * width) if self.data.kind == "text" else MORE_ITEMS * have
        times = min(tokens, most) / have
        if self.data.source == "self" or times <= 1:
            return self
        more = replace(self.data, tokens=int(times * have), items=math.ceil(times * self.data.items))
        return replace(self, data=more, _model=self.model, _sample=None)

    def _width(self) -> int:
        """Of the hidden states."""
        return max(self.source.checkpoint.tensors[f"{site.weights['o']}.weight"].shape[0] for site in self.source.sites)

    def _fit(
        self,
        stage: str,
        fit: Callable[..., Any],
        tokens: int,
        plan: Plan,
        stats: Mapping[str, SiteStats] | None,
        refits: Mapping[str, FittedHeads] | None,
        fitted: FittedFiles,
    ) -> None:
        """`fit` on every site that is not yet in `fitted`; it runs `tokens` through each."""
        read, model = self.source.checkpoint.read, self.model
        merged: dict[str, Heads] = {}
        sites = {site.name: site for site in self.source.sites}

        def merge(site: Site) -> Heads:
            merged.clear()  # one at a time
            merged[site.name] = agreed(partial(site_heads, site, plan, read, stats, refits))
            return merged[site.name]

        def keep(name: str, found: FittedHeads) -> None:
            whole = found if kept_weights(sites[name], plan) else found.completed(merged[name])
            fitted.put(name, whole, self.facts())

        advance = self._count(stage, tokens * len(sites))
        order, done = partial(query_order, plan=plan), frozenset(fitted)
        with together("fit", fit, [*sites], self.sample, plan, done):
            fit(model, self.source.sites, merge, self.sample, order=order, skip=done, keep=keep, progress=advance)
