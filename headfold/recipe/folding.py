"""Fold a model end to end: calibrate, plan, refit, write, verify, and only then put it into its place."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import planning
from ..checkpoint.reader import check_finite
from ..checkpoint.staging import JOB, commit, copy_side_files, disown, open_staging, refuse_overlap, write_json
from ..checkpoint.stats_file import StatsFile
from ..checkpoint.writer import output_bytes, rewrite
from ..core.errors import UserError
from ..core.plan import Plan
from ..corpus import open_corpus
from ..corpus.windows import token_windows
from ..evaluate.verify import Verification
from ..evaluate.verify import verify as compare_with_twin
from ..families.layout import planned_shapes
from ..families.spec import folded_config
from ..report.card import CardFacts, model_card
from ..stock import open_tokenizer
from ..surgery import kept_weights, reading_without, site_tensors
from .deciding import needs_statistics, plan_source
from .measuring import DEFAULT_CALIBRATION, DEFAULT_TOKENS, OriginalRun, default_device
from .source import Opened, Progress, open_source, open_stats, silent
from .twin import Twin

VERIFY_TOKENS = 256
"""Length of each of the two windows on which a fold is compared with its twin."""

_WORK = ".headfold-work"


@dataclass(frozen=True, slots=True)
class FoldResult:
    """What a fold wrote and what was found on the way."""

    out: Path
    family: str
    num_heads: int
    kv_heads_before: int
    kv_heads_after: int
    kv_bytes_before: int
    """Per token, over all layers, in the checkpoint's dtype."""
    kv_bytes_after: int
    plan: Plan
    refitted: bool
    verification: Verification | None
    notes: list[str]
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in self.__slots__}
        verification = None if self.verification is None else asdict(self.verification)
        return {**facts, "out": str(self.out), "plan": self.plan.to_json(), "verification": verification}


def fold(
    model: str | Path,
    out: str | Path,
    *,
    kv_heads: str | int | None = None,
    plan: str | Path | None = None,
    group: str = "swap",
    merge: str = "absorb",
    refit: bool = True,
    calibration: str | None = None,
    tokens: int | None = None,
    context: int | None = None,
    stats: str | Path | None = None,
    seed: int = 0,
    force: bool = False,
    verify: bool = True,
    device: str | None = None,
    progress: Progress | None = None,
) -> FoldResult:
    """Write `model` again as `out`, with `kv_heads` K/V heads, or as the file `plan` says.

    The result is a checkpoint directory that stock engines load, with plan.json and a card. It grows as `OUT.partial` and is
    renamed when it is whole and, unless `verify=False`, equal to its head-repeated twin under stock transformers; the same
    call after a kill goes on from there and gives the same bytes. Statistics and refit use the same text: `calibration`, else
    what `stats` or `plan` were measured on, else the default.

    Raises:
        UserError: what cannot be folded, read or written; a fold that differs from its twin (nothing is renamed then).
    """
    if (kv_heads is None) == (plan is None):
        raise UserError("fold: expected either kv_heads or plan, got both or none; give one")
    source = open_source(model)
    refuse_overlap(source.checkpoint.path, Path(out))
    given = open_stats(stats, source)
    ready = _ready_plan(plan, source)
    if ready is None:
        planning.parse_kv_heads(kv_heads, source.sites[0].num_groups)
        needs_data = needs_statistics(group, merge)
    else:
        group, merge = ready.group, next(iter(ready.sites.values())).merge
        needs_data = needs_statistics("contiguous", merge)
    said = given.metadata if given is not None else ready.calibration if ready else {}
    same_text = (calibration, tokens, context) == (None, None, None)
    calibration, tokens, context, text_seed = _text(calibration, tokens, context, seed, said)
    settings = {
        "version": version("headfold"), "source": source.checkpoint.fingerprint(), "kv_heads": str(kv_heads),
        "plan": ready and ready.to_json(), "group": group, "merge": merge, "refit": refit, "calibration": calibration,
        "tokens": tokens, "context": context, "seed": seed, "stats": given and given.metadata,
    }  # fmt: skip
    job = _Job(source, Path(out), settings, force, progress or silent)
    run = OriginalRun(source, calibration, tokens, context, text_seed, device or default_device(), job.progress)
    if same_text:
        run.use_windows(given)
    with job.worth_keeping():
        statistics = job.statistics(run, given, needs_data)
        with job.timed("plan"):
            made = ready or plan_source(source, kv_heads, group, merge, statistics, seed, job.progress)
        return job.carry_out(run, made, statistics, refit=refit, verify=verify)


def _text(
    calibration: str | None, tokens: int | None, context: int | None, seed: int, said: Mapping[str, str]
) -> tuple[str, int, int | None, int]:
    """Source, tokens, context and seed of the calibration text: as asked for, else as `said` of statistics, else the default.

    The seed of the text is not that of the fold: the same text serves folds of any seed.
    """
    if calibration is None and said.keys() >= {"source", "seed", "tokens", "context"}:
        return said["source"], tokens or int(said["tokens"]), context or int(said["context"]), int(said["seed"])
    return calibration or DEFAULT_CALIBRATION, tokens or DEFAULT_TOKENS, context, seed


def _ready_plan(path: str | Path | None, source: Opened) -> Plan | None:
    if path is None:
        return None
    ready = Plan.load(Path(path))
    ready.check_source(source.checkpoint.fingerprint(), source.sites)
    return ready


def _result(
    source: Opened,
    out: Path,
    made: Plan,
    refitted: bool,
    verification: Verification | None,
    notes: list[str],
    seconds: dict[str, float],
) -> FoldResult:
    site = source.sites[0]
    return FoldResult(
        out=out,
        family=source.checkpoint.config["model_type"],
        num_heads=site.num_heads,
        kv_heads_before=site.num_groups,
        kv_heads_after=made.num_groups,
        kv_bytes_before=source.kv_bytes_per_token(site.num_groups),
        kv_bytes_after=source.kv_bytes_per_token(made.num_groups),
        plan=made,
        refitted=refitted,
        verification=verification,
        notes=notes,
        seconds=seconds,
    )


@dataclass(slots=True)
class _Job:
    """One fold in its staging directory. What an earlier run of the same job left there is used again."""

    source: Opened
    out: Path
    settings: dict[str, Any]
    force: bool
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refit_text: Mapping[str, str] = field(default_factory=dict)
    staging: Path = field(init=False)

    def __post_init__(self) -> None:
        key = hashlib.sha256(json.dumps(self.settings, sort_keys=True, default=str).encode()).hexdigest()
        self.staging = open_staging(self.out, key, self.force)
        self.work.mkdir(exist_ok=True)

    @property
    def work(self) -> Path:
        """Where statistics and refits wait while the output grows; gone before it is renamed."""
        return self.staging / _WORK

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[stage] = round(time.monotonic() - started, 3)

    @contextmanager
    def worth_keeping(self) -> Iterator[None]:
        """After a refusal, remove a staging directory in which there is nothing yet for another run to go on from."""
        try:
            yield
        except UserError:
            if not any(entry.is_file() and entry.name != JOB for entry in self.staging.rglob("*")):
                shutil.rmtree(self.staging)
            raise

    def statistics(self, run: OriginalRun, given: StatsFile | None, needed: bool) -> StatsFile | None:
        """Those given, else those that an earlier run left, else measured now; None where nothing asks for any."""
        if given is not None or not needed:
            return given
        path = self.work / "stats.safetensors"
        with self.timed("calibrate"):
            if not path.exists():
                run.write_statistics(path)
            stats = StatsFile(path)
            run.use_windows(stats)
            return stats

    def carry_out(
        self, run: OriginalRun, plan: Plan, stats: StatsFile | None, *, refit: bool, verify: bool
    ) -> FoldResult:
        """Refit, write, verify, rename."""
        shrinks = plan.num_groups < self.source.sites[0].num_groups
        with self.timed("refit"):
            refits = self.refits(run, plan, stats) if refit and shrinks else None
        run.close()
        with self.timed("write"):
            self.write(plan, stats, refits)
        with self.timed("verify"):
            verification = self.verify(plan, stats, refits) if verify else None
        notes = run.notes + self.notes
        result = _result(self.source, self.out, plan, refits is not None, verification, notes, self.seconds)
        self.finish(result, stats)
        return result

    def refits(self, run: OriginalRun, plan: Plan, stats: StatsFile | None) -> Mapping[str, Tensor]:
        """By names on disk; `refit_text` says what they were fitted on, also where an earlier run fitted them."""
        path = self.work / "refit.safetensors"
        if not path.exists():
            fitted = {name: tensor.contiguous().cpu() for name, tensor in run.refit(plan, stats).items()}
            save_file(fitted, path.with_suffix(".partial"), run.text_facts())
            path.with_suffix(".partial").replace(path)
        with safe_open(path, "pt") as file:
            self.refit_text = dict(sorted(file.metadata().items()))
        return load_file(path)

    def write(self, plan: Plan, stats: StatsFile | None, refits: Mapping[str, Tensor] | None) -> None:
        """Weights, config, plan and everything that lies beside the source's weights."""
        checkpoint = self.source.checkpoint
        sites = {site.name: site for site in self.source.sites}
        planned = {
            name: planned_shapes(site, plan.num_groups, lambda n: checkpoint.tensors[n].shape)
            for name, site in sites.items()
        }
        kept = {name: axis for site in sites.values() for name, axis in kept_weights(site, plan, refits).items()}
        shapes = {t: shape for of_site in planned.values() for t, shape in of_site.items() if t not in kept}
        read = reading_without(kept, checkpoint.read, lambda n: checkpoint.tensors[n].shape)
        owner = {tensor: name for name, of_site in planned.items() for tensor in of_site}
        total, done = output_bytes(checkpoint, shapes), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.progress("write", done, total)

        rewrite(
            checkpoint,
            self.staging,
            shapes,
            owner,
            lambda name: site_tensors(sites[name], plan, read, stats, refits),
            advance,
        )
        write_json(self.staging / "config.json", folded_config(self.source.family, checkpoint.config, plan.num_groups))
        write_json(self.staging / "plan.json", plan.to_json())
        copy_side_files(checkpoint.path, self.staging)

    def verify(self, plan: Plan, stats: StatsFile | None, refits: Mapping[str, Tensor] | None) -> Verification:
        """Compare the written weights with the head-repeated twin, both under stock transformers.

        Raises:
            UserError: they differ; the output is left as `OUT.partial`, and the next run starts anew.
        """
        twin = Twin(self.source, plan, stats, refits)
        windows = self._verify_windows()
        self.progress("verify", 0, windows.numel())
        found = compare_with_twin(self.source.checkpoint.path, self.staging, twin, windows)
        self.progress("verify", windows.numel(), windows.numel())
        if not math.isfinite(found.tolerance):
            self._refuse_not_finite()
        if not found.passed:
            disown(self.staging)
            raise UserError(
                f"{self.staging}: expected the logits of the head-repeated twin within {found.tolerance:.2g}, got a "
                f"difference of {found.max_abs_difference:.2g}, first in {found.where}; not renamed to {self.out.name}"
            )
        return found

    def _refuse_not_finite(self) -> None:
        """Name the tensor that makes every logit NaN: a copied one, as the folded ones were looked at when they were made."""
        checkpoint = self.source.checkpoint
        for name in checkpoint.tensors:
            check_finite(f"{self.source.name}: {name}", checkpoint.read(name))

    def _verify_windows(self) -> Tensor:
        """Two windows of real tokens; of token numbers drawn at random where there is no tokenizer to make real ones."""
        config = self.source.checkpoint.config
        length = min(VERIFY_TOKENS, config.get("max_position_embeddings") or VERIFY_TOKENS)
        try:
            tokenizer = open_tokenizer(self.source.checkpoint.path)
        except UserError:
            self.notes.append("no tokenizer beside the checkpoint: verified on random token numbers")
            generator = torch.Generator().manual_seed(0)
            return torch.randint(config["vocab_size"], (2, length), generator=generator)
        return token_windows(open_corpus("stdlib", seed=0).documents, tokenizer, 2 * length, length, 0)

    def finish(self, result: FoldResult, stats: StatsFile | None) -> None:
        """The card, then the rename."""
        shutil.rmtree(self.work)
        (self.staging / "README.md").write_text(model_card(self.source.checkpoint.path, self._facts(result, stats)))
        commit(self.staging, self.out, self.force)

    def _facts(self, result: FoldResult, stats: StatsFile | None) -> CardFacts:
        planned = {name: site for name, site in result.plan.sites.items() if site.error and site.energy}
        errors = {
            name: (site.error.key / site.energy.key, site.error.value / site.energy.value)
            for name, site in planned.items()
        }
        found = result.verification
        return CardFacts(
            base_model=self.source.name,
            family=result.family,
            num_heads=result.num_heads,
            kv_heads_before=result.kv_heads_before,
            kv_heads_after=result.kv_heads_after,
            kv_bytes_before=result.kv_bytes_before,
            kv_bytes_after=result.kv_bytes_after,
            method=self.settings["merge"],
            group=self.settings["group"],
            refit=result.refitted,
            calibration=stats.metadata if stats else {},
            refit_text=self.refit_text,
            command=self._command(),
            site_errors=errors or None,
            verification=found and (
                f"largest difference of logits to the head-repeated twin {found.max_abs_difference:.2g} "
                f"(tolerance {found.tolerance:.2g}, {found.num_tokens} tokens, {found.dtype})"
            ),
        )  # fmt: skip

    def _command(self) -> str:
        """What makes this fold again, in the words of the command line."""
        asked = self.settings
        name = self.source.name if not Path(self.source.name).exists() else Path(self.source.name).name
        words = ["headfold fold", name, self.out.name]
        if asked["plan"]:
            words += ["--plan plan.json"]
        else:
            words += [f"--kv-heads {asked['kv_heads']}", f"--group {asked['group']}", f"--merge {asked['merge']}"]
        words += ["--refit" if asked["refit"] else "--no-refit"]
        words += [f"--calibration {asked['calibration']}", f"--tokens {asked['tokens']}"]
        words += [f"--context {asked['context']}"] if asked["context"] else []
        words += ["--stats stats.safetensors"] if asked["stats"] else []
        words += [f"--seed {asked['seed']}"]
        return " ".join(words)
