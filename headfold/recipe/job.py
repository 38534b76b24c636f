"""One fold in its staging directory: what it has, what it still has to make, and the renaming at the end."""

import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration import num_tokens
from ..checkpoint.reader import Checkpoint, check_finite
from ..checkpoint.staging import JOB, commit, copy_side_files, disown, job_key, open_staging, write_json
from ..checkpoint.stats_file import StatsFile
from ..checkpoint.writer import output_bytes, rewrite
from ..core.errors import UserError
from ..core.fitted import FittedHeads
from ..core.plan import Plan
from ..evaluate.verify import Verification
from ..evaluate.verify import verify as compare_with_twin
from ..export.card import exported_card
from ..export.layouts import choose_layout
from ..export.pieces import Export
from ..export.rounding import Unrounded
from ..families.layout import planned_shapes, renamed
from ..families.spec import Site
from ..hf_models import exceeds_memory
from ..merge import parse_merge
from ..report import tables
from ..report.card import CardFacts, model_card
from ..runtime.load import own_class
from ..runtime.remote import auto_map, remote_files
from ..surgery import kept_weights, read_without_kept, site_tensors
from .command import command_of
from .config import config_of
from .exporting import write_layout
from .fitted import FittedFiles
from .measuring import Teacher
from .price import ServingCost, price
from .source import Progress, Source
from .twin import Twin
from .verifying import verification_sample

_WORK = ".headfold-work"


@dataclass(frozen=True, slots=True)
class FoldResult:
    """What a fold wrote and what was found on the way."""

    out: Path
    family: str
    num_heads: int
    kv_heads_before: int
    kv_heads_after: int
    """Of the site with most; `kv_heads_least` of that with fewest."""
    kv_heads_least: int
    before: ServingCost
    after: ServingCost
    plan: Plan
    refitted: bool
    healed: int
    """Tokens, or items, that every block was trained with; 0: not at all."""
    verification: Verification | None
    notes: list[str]
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in self.__slots__}
        verification = None if self.verification is None else asdict(self.verification)
        serving_costs = {"before": asdict(self.before), "after": asdict(self.after)}
        serving_costs |= {"kv_bytes_before": self.kv_bytes_before, "kv_bytes_after": self.kv_bytes_after}
        return {
            **facts,
            **serving_costs,
            "out": str(self.out),
            "plan": self.plan.to_json(),
            "verification": verification,
        }

    @property
    def kv_bytes_before(self) -> int:
        """Per token, over all layers, in the checkpoint's dtype."""
        return self.before.kv_bytes_per_token

    @property
    def kv_bytes_after(self) -> int:
        return self.after.kv_bytes_per_token


def _result(
    source: Source,
    out: Path,
    made: Plan,
    layout: str | None,
    refitted: bool,
    healed: int,
    verification: Verification | None,
    notes: list[str],
    seconds: dict[str, float],
) -> FoldResult:
    counts = made.num_kv_heads
    return FoldResult(
        out=out,
        family=source.checkpoint.config["model_type"],
        num_heads=max(s.num_heads for s in source.sites),
        kv_heads_before=max(s.num_kv_heads for s in source.sites),
        kv_heads_after=max(counts.values()),
        kv_heads_least=min(counts.values()),
        before=price(source),
        after=price(source, made, layout),
        plan=made,
        refitted=refitted,
        healed=healed,
        verification=verification,
        notes=notes,
        seconds=seconds,
    )


@dataclass(slots=True)
class Job:
    """One fold in its staging directory. What an earlier run of the same job left there is used again."""

    source: Source
    out: Path
    settings: dict[str, Any]
    force: bool
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refit_text: Mapping[str, str] = field(default_factory=dict)
    exported: Export | None = None
    staging: Path = field(init=False)

    def __post_init__(self) -> None:
        key = job_key(self.settings)
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

    def statistics(self, run: Teacher, given: StatsFile | None, needed: bool) -> StatsFile | None:
        """Those given, else those that an earlier run left, else measured now; None where nothing asks for any."""
        if given is not None or not needed:
            return given
        path = self.work / "stats.safetensors"
        with self.timed("calibrate"):
            if not path.exists():
                run.write_statistics(path)
            stats = StatsFile(path)
            run.use_sample(stats)
            return stats

    def carry_out(
        self, run: Teacher, plan: Plan, stats: StatsFile | None, *, refit: bool, heal: int, verify: bool
    ) -> FoldResult:
        """Refit, train every block with `heal` tokens, write, verify, rename."""
        self._layout(plan)  # refuses before anything is computed
        shrinks = any(plan.num_kv_heads[site.name] < site.num_kv_heads for site in self.source.sites)
        with self.timed("refit"):
            refits = self.refits(run, plan, stats) if refit and shrinks else None
        if heal and shrinks:
            with self.timed("heal"):
                refits = self.healed(run, plan, stats, refits, heal)
        run.close()
        with self.timed("write"):
            self.write(plan, stats, refits)
        with self.timed("verify"):
            verification = self.verify(run, plan, stats, refits) if verify else None
        if self.source.proven:
            model_type = self.source.checkpoint.config["model_type"]
            self.notes.append(f"no literal for {model_type}: its architecture was probed, and every law holds")
        if "headfold" in json.loads((self.staging / "config.json").read_text()):
            self.notes.append("runs in headfold's runtime: headfold.load, or transformers with trust_remote_code=True")
        if blind := [site.name for site in self.source.sites if _is_blind(site, plan, stats)]:
            self.notes.append(
                f"how far back attention looks was not seen at {len(blind)} of its sites, so it is assumed there"
            )
        notes = run.notes + self.notes
        done = (refit and shrinks, heal if shrinks else 0)
        result = _result(self.source, self.out, plan, self.settings["layout"], *done, verification, notes, self.seconds)
        self.finish(result, stats)
        return result

    def refits(self, run: Teacher, plan: Plan, stats: StatsFile | None) -> Mapping[str, FittedHeads]:
        """Heads refitted; `refit_text` says what they were fitted on, also where an earlier run fitted them."""
        fitted = FittedFiles(self.work / "refit")
        if any(site.name not in fitted for site in self.source.sites):
            run.refit(plan, stats, fitted)
        self.refit_text = fitted.facts
        return fitted

    def healed(
        self, run: Teacher, plan: Plan, stats: StatsFile | None, refits: Mapping[str, FittedHeads] | None, tokens: int
    ) -> Mapping[str, FittedHeads]:
        """Heads trained block by block, from where merge and refit end."""
        trained = FittedFiles(self.work / "heal")
        if any(site.name not in trained for site in self.source.sites):
            run.heal(plan, stats, refits, trained, tokens, self.settings["seed"])
        self.refit_text = trained.facts
        return trained

    def write(self, plan: Plan, stats: StatsFile | None, refits: Mapping[str, FittedHeads] | None) -> None:
        """Weights, config, plan and everything that lies beside the source's weights."""
        checkpoint, counts = self.source.checkpoint, plan.num_kv_heads
        sites = {site.name: site for site in self.source.sites}
        widths = plan.head_dim_multiples(sites.values())
        planned = {
            name: planned_shapes(site, counts[name], lambda n: checkpoint.tensors[n].shape, widths[name])
            for name, site in sites.items()
        }
        kept = {name: axis for site in sites.values() for name, axis in kept_weights(site, plan, refits).items()}
        shapes = {t: shape for of_site in planned.values() for t, shape in of_site.items() if t not in kept}
        instead = {old: new for name, site in sites.items() for old, new in renamed(site, counts[name]).items()}
        read = read_without_kept(kept, checkpoint.read, lambda n: checkpoint.tensors[n].shape)
        owner = {tensor: name for name, of_site in planned.items() for tensor in of_site}
        total, done = output_bytes(checkpoint, shapes, instead), 0

        config, layout = config_of(self.source, plan), self._layout(plan)
        target = self.work / "grouped" if layout else self.staging
        target.mkdir(exist_ok=True)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.progress("write", done, total)

        rewrite(
            checkpoint,
            target,
            shapes,
            owner,
            lambda name: site_tensors(sites[name], plan, read, stats, refits),
            advance,
            instead,
        )
        copy_side_files(checkpoint.path, target)
        if "headfold" in config:  # after the side files: a source that is a fold itself brings such a file along
            config["auto_map"] = auto_map(config)
            for name, text in remote_files(config).items():
                (target / name).write_text(text)
        write_json(target / "config.json", config)
        write_json(self.staging / "plan.json", plan.to_json())
        if layout:
            self.exported = write_layout(target, self.staging, layout, partial(self.progress, "export"))
            self.notes.append(f"layout {layout}: {self.exported.said}")

    def _layout(self, plan: Plan) -> str | None:
        return choose_layout(config_of(self.source, plan), self.settings["layout"], f"{self.source.name}/config.json")

    def verify(
        self, run: Teacher, plan: Plan, stats: StatsFile | None, refits: Mapping[str, FittedHeads] | None
    ) -> Verification | None:
        """Compare the written weights with the head-repeated twin, both under stock transformers.

        Raises:
            UserError: they differ; the output is left as `OUT.partial`, and the next run starts anew.
        """
        twin = Twin(self.source, plan, stats, refits)
        wide = any(width > 1 for width in plan.head_dim_multiples(self.source.sites).values())
        if wide and exceeds_memory(self.source.checkpoint, torch.promote_types(self.source.dtype, torch.float32)):
            self.notes.append(
                "wide heads are compared with their twin in memory, which this model exceeds: not verified"
            )
            return None
        sample = verification_sample(self.source, run, self.notes)
        size = num_tokens(sample)
        self.progress("verify", 0, size)
        config = json.loads((self.staging / "config.json").read_text())
        found = compare_with_twin(
            self.source.checkpoint.path,
            self.staging,
            twin,
            sample,
            renamed=twin.renamed,
            source_class=own_class(self.source.checkpoint.config),
            fold_class=own_class(config),
            unrounded=self._unrounded(),
            dressed=twin.install_heads if wide else None,
        )
        self.progress("verify", size, size)
        if not math.isfinite(found.tolerance):
            self._refuse_not_finite()
        if not found.passed:
            disown(self.staging)
            raise UserError(
                f"{self.staging}: expected the logits of the head-repeated twin within {found.tolerance:.2g}, got a "
                f"difference of {found.max_abs_difference:.2g}, first in {found.where}; not renamed to {self.out.name}"
            )
        return found

    def _unrounded(self) -> Mapping[str, Tensor] | None:
        if self.exported is None:
            return None
        dtype = torch.promote_types(self.source.dtype, torch.float32)
        return Unrounded(Checkpoint.open(self.work / "grouped"), self.exported, self.staging, dtype)

    def _refuse_not_finite(self) -> None:
        """Name the tensor that makes every logit NaN: a copied one, as the folded ones were looked at when they were made."""
        checkpoint = self.source.checkpoint
        for name in checkpoint.tensors:
            check_finite(f"{self.source.name}: {name}", checkpoint.read(name))

    def finish(self, result: FoldResult, stats: StatsFile | None) -> None:
        """The card, then the rename."""
        card = model_card(self.source.checkpoint.path, self._facts(result, stats))
        (self.staging / "README.md").write_text(exported_card(card, self.exported) if self.exported else card)
        shutil.rmtree(self.work)
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
            num_heads=tables.counts(*_range(site.num_heads for site in self.source.sites)),
            kv_heads_before=tables.counts(*_range(site.num_kv_heads for site in self.source.sites)),
            kv_heads_after=result.kv_heads_after,
            kv_heads_least=result.kv_heads_least,
            serving_costs=(result.before, result.after),
            method=self.settings["merge"],
            group=self.settings["group"],
            refit=result.refitted,
            healed=result.healed,
            calibration=stats.metadata if stats else {},
            refit_text=self.refit_text,
            command=command_of(self.settings, self.source.name, self.out.name),
            site_errors=errors or None,
            grouped_class=self._grouped_class(),
            verification=found and (
                f"largest difference of logits to the head-repeated twin {found.max_abs_difference:.2g} "
                f"(tolerance {found.tolerance:.2g}, {found.num_tokens} tokens, {found.dtype})"
            ),
        )  # fmt: skip

    def _grouped_class(self) -> str:
        """The auto class for the source's own task, where the output brings code along."""
        config = json.loads((self.staging / "config.json").read_text())
        name = f".Grouped{next(iter(config.get('architectures') or ['']))}"
        found = [auto for auto, target in (config.get("auto_map") or {}).items() if target.endswith(name)]
        return (found or ["AutoModel"])[0] if "headfold" in config else ""


def _is_blind(site: Site, plan: Plan, stats: StatsFile | None) -> bool:
    """Whether absorb would fit over distances that the statistics do not tell."""
    fits = (
        parse_merge(plan.sites[site.name].merge).record.fits_distances
        and site.key_freedom.frequencies
        and not site.key_freedom.normed
    )
    return bool(fits) and stats is not None and not stats.holds(site.name, "attended")


def _range(numbers: Iterable[int]) -> tuple[int, int]:
    """Least and greatest."""
    found = list(numbers)
    return min(found), max(found)
