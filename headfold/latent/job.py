"""Fold a model to MLA: calibrate, choose the shape, fit every site, write, verify, and only then rename the output into its place."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..calibration import batches, is_packed_text
from ..checkpoint.cards import write_card
from ..checkpoint.reader import Checkpoint
from ..checkpoint.staging import copy_side_files, job_key, write_json, wrong_output
from ..checkpoint.upload import upload
from ..checkpoint.writer import output_bytes, rewrite
from ..conversion.calibration_config import CalibrationConfig, CalibrationRequest
from ..conversion.fold_request import data_from
from ..conversion.plans import check_statistics
from ..conversion.provenance import fold_command, fold_options
from ..conversion.site_files import SiteFiles
from ..conversion.source import Source
from ..conversion.teacher import Teacher
from ..conversion.verification import verification_sample
from ..core.errors import UserError
from ..core.json_input import read_object
from ..core.progress import Progress, counter, no_progress
from ..evaluate.verify import Verification, compare_with_twin
from ..families.layout import read_heads
from ..families.spec import Site
from ..hf_models import exceeds_memory
from ..hf_models.building import open_config
from ..outputs import StagedJob, staged
from ..recipes.recipe import NAME as RECIPE
from ..recipes.recipe import recipe_text
from ..refine.blocks import walk
from ..stats_file import StatsFile
from .assemble import assembled
from .attention import LatentAttention
from .card import latent_card
from .choice import choose_shape, possible_shapes
from .fit import fit
from .moments import site_moments
from .recorded import RecordedLatent
from .refit import refitted
from .request import LatentRequest, check_source
from .result import LatentResult
from .site import Latent
from .target import (
    EMBEDDING,
    HEAD,
    Shape,
    read_site,
    residual_scale,
    scaled_tensors,
    site_shapes,
    site_tensors,
    target_config,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOOSER = 10
"""Times the tolerance of a grouped fold: sums through a latent have terms that are larger than their result, and round accordingly."""
STATISTICS = frozenset({"second", "scatter", "attended"})
_STATISTICS, _SHAPE = "stats.safetensors", "shape.json"
_ERROR = "error"
"""The predicted error of a site, beside its tensors."""


@dataclass(slots=True)
class LatentFold:
    """One fold to MLA: what was asked for, and the original."""

    source: Source
    request: LatentRequest
    data: CalibrationRequest
    stats: StatsFile | None
    drawn: Mapping[str, Tensor] | None = None
    refit: bool = True
    verify: bool = True
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype | None = None
    progress: Progress = no_progress

    def run(
        self, out: Path, force: bool, push_to_hub: str | None, notes: list[str], say: Callable[[str], None]
    ) -> LatentResult:
        """Write the fold to `out`; it grows as `OUT.partial`, from which the same call goes on after a kill.

        Raises:
            UserError: a model, a size or data that cannot be used, or a wrong fold.
        """
        check_source(self.source)
        shapes = possible_shapes(self.source, self.request)
        if self.stats is not None:
            check_statistics(self.source, self.stats, STATISTICS - {"attended"})  # without it, distances are assumed
        config = self._calibration()
        settings = self._settings(config)
        teacher = Teacher(self.source, config, self.device, self.dtype, self.progress, self.drawn, notes)
        if config is not None and not self.data.names_data:
            teacher.use_sample(self.stats)
        publish = None if push_to_hub is None else partial(upload, out, push_to_hub)
        with staged(out, job_key(settings), force, publish) as staging:
            job = StagedJob(staging, publish=publish)
            sites = SiteFiles(job.work / "sites")
            with job.timed("calibrate"):
                stats = self._statistics(teacher, job.work / _STATISTICS)
            with job.timed("choose"):
                shape = self._shape(shapes, stats, job.work / _SHAPE)
            with job.timed("fit"):
                errors = self._fit(teacher, stats, shape, sites)
            facts = dict(stats.metadata)
            teacher.close()
            with job.timed("write"):
                self._write(staging, shape, sites)
            with job.timed("verify"):
                verification = self._verified(staging, shape, teacher) if self.verify else None
            result = self._result(out, shape, errors, verification, teacher.notes, job.seconds)
            self._write_facts(staging, out, result, settings, facts)
            said = job.committed(out, force, say)
        return replace(result, notes=[*result.notes, *said])

    def _calibration(self) -> CalibrationConfig | None:
        """Return the calibration data, None where no step needs them."""
        if self.stats is not None and not self.refit and not self.data.names_data:
            return None
        recorded = self.stats.metadata if self.stats else {}
        config = CalibrationConfig.resolve(self.source, self.data, recorded)
        if config.kind != "text":
            raise UserError(f"fold --to mla: expected packed text as calibration data, got {config.kind}; name a text")
        return config

    def _settings(self, config: CalibrationConfig | None) -> dict[str, Any]:
        """Return whatever decides the output: two calls with equal settings are one job, and the second resumes the first."""
        size = self.request.rank or str(self.request.share)
        return {
            "version": version("headfold"), "source": self.source.checkpoint.fingerprint(), "to": "mla", "kv_rank": size,
            "rope_dim": self.request.rotary_dim, "refit": self.refit, "data": config and asdict(config), "seed": self.seed,
            "stats": self.stats and self.stats.metadata, "dtype": str(self.dtype).removeprefix("torch.") if self.dtype else None,
        }  # fmt: skip

    def _options(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of `headfold.fold` that make the fold again; those of grouped folds keep their defaults."""
        earlier = CalibrationRequest.recorded(self.stats.metadata) if self.stats else None
        unused = {
            "plan": None,
            "kv_heads": "",
            "head_dim_multiple": 1,
            "group": "",
            "merge": "",
            "heal": 0,
            "encoder": False,
        }
        of_source = {"adapter": self.source.plain.adapter, "data_from": data_from(self.data, earlier)}
        found = fold_options({**unused, **settings, **of_source})
        size = {name: settings[name] for name in ("to", "kv_rank", "rope_dim") if settings[name] is not None}
        return {**size, **{name: value for name, value in found.items() if name not in (*unused, "refit_by")}}

    def _write_facts(
        self, staging: Path, out: Path, result: LatentResult, settings: Mapping[str, Any], data: Mapping[str, str]
    ) -> None:
        """Write the card and the recipe."""
        source, options = self.source, self._options(settings)
        command = fold_command(options, source.name, out.name)
        write_card(staging, latent_card(source, result, command, data))
        text = recipe_text(source.name, settings["source"], settings["version"], options)
        (staging / RECIPE).write_text(text, encoding="utf-8", errors="replace")

    def _statistics(self, teacher: Teacher, path: Path) -> StatsFile:
        if self.stats is not None:
            return self.stats
        if not path.exists():
            teacher.write_statistics(path, STATISTICS)
        found = StatsFile(path)
        teacher.use_sample(found)
        return found

    def _shape(self, shapes: list[Shape], stats: StatsFile, path: Path) -> Shape:
        if not path.exists():
            write_json(path, asdict(choose_shape(self.source, shapes, stats)))
        return Shape(**read_object(path))

    def _fit(self, teacher: Teacher, stats: StatsFile, shape: Shape, fitted: SiteFiles) -> dict[str, float]:
        """Fit every site that is not fitted yet, and return the predicted error of each."""
        done, sites = counter(self.progress, "fit", len(self.source.sites)), self.source.sites
        if not self.refit:
            for site in sites:
                self._keep(site, stats, shape, fitted, None)
                done(1)
            return self._errors(fitted)
        if not is_packed_text(teacher.sample):
            raise UserError(
                "fold --to mla: expected packed text as calibration data, got texts one by one; name a text"
            )
        windows = [batch["input_ids"] for batch in batches(teacher.sample)]
        with torch.no_grad():
            for (_, visit), site in zip(walk(teacher.model, sites, windows), sites, strict=True):
                self._keep(site, stats, shape, fitted, [visit(number) for number in range(len(windows))])
                done(1)
        return self._errors(fitted)

    def _keep(self, site: Site, stats: StatsFile, shape: Shape, fitted: SiteFiles, calls: list[Any] | None) -> None:
        if site.name in fitted:
            return
        heads = read_heads(site, self.source.read_finite)
        moments = site_moments(heads, stats[site.name])
        found = fit(moments, shape.rank, shape.turns)
        latent = assembled(heads, moments, found, shape.rotary_dim).to(torch.float32)
        if calls is not None:
            inputs = [args[0] if args else keywords["hidden_states"] for (args, keywords), _ in calls]
            outputs = [output for _, output in calls]
            latent = latent.to(inputs[0].device)
            latent = refitted(RecordedLatent(site, heads, latent, shape.turns, inputs, outputs), latent)
        whole = {name: tensor.cpu() for name, tensor in latent.tensors().items()}
        fitted.put(site.name, {**whole, _ERROR: torch.tensor(found.error, dtype=torch.float64)}, {})

    def _errors(self, fitted: SiteFiles) -> dict[str, float]:
        return {site.name: _read(fitted, site)[1] for site in self.source.sites}

    def _write(self, staging: Path, shape: Shape, fitted: SiteFiles) -> None:
        """Write weights, config and everything that lies beside the source's weights."""
        checkpoint, config = self.source.checkpoint, self._complete_config()
        sites = {_prefix(site): site for site in self.source.sites}
        factors = scaled_tensors(config, checkpoint.tensors)
        scale = residual_scale(config["rms_norm_eps"])
        instead: dict[str, tuple[str, ...]] = {}
        if HEAD not in checkpoint.tensors:
            factors = {EMBEDDING: 1.0} | factors
            instead[EMBEDDING] = (EMBEDDING, HEAD)
        shapes = {name: checkpoint.tensors[name].shape for name in factors}
        owner = {name: name for name in factors}
        for name in instead.get(EMBEDDING, ()):
            shapes[name], owner[name] = shapes[EMBEDDING], EMBEDDING
        for prefix, site in sites.items():
            made = site_shapes(shape, site.num_heads, config["hidden_size"], prefix)
            shapes |= made
            owner |= dict.fromkeys(made, prefix)
            instead[f"{prefix}.k_proj.weight"] = (
                f"{prefix}.kv_a_proj_with_mqa.weight",
                f"{prefix}.kv_a_layernorm.weight",
            )
            instead[f"{prefix}.v_proj.weight"] = (f"{prefix}.kv_b_proj.weight",)

        def produce(name: str) -> dict[str, Tensor]:
            if name in factors:
                read = self.source.read_finite(name)
                precise = read.to(torch.promote_types(read.dtype, torch.float32))
                found = {name: (precise * factors[name]).to(read.dtype)}
                return found | ({HEAD: read} if HEAD in owner and name == EMBEDDING else {})
            found = site_tensors(_read(fitted, sites[name])[0], name, scale)
            if bad := [each for each, tensor in found.items() if not torch.isfinite(tensor).all()]:
                raise UserError(f"{bad[0]} is not finite after folding; check the source for NaN weights")
            return {each: tensor.to(self.source.dtype).contiguous() for each, tensor in found.items()}

        total = output_bytes(checkpoint, shapes, instead)
        rewrite(checkpoint, staging, shapes, owner, produce, counter(self.progress, "write", total), instead)
        copy_side_files(checkpoint.path, staging)
        write_json(staging / "config.json", target_config(config, shape))

    def _complete_config(self) -> dict[str, Any]:
        """Return the source's config with all fields of its class: published ones leave out what it assumes."""
        config: dict[str, Any] = open_config(self.source.config, f"{self.source.name}/config.json").to_dict()
        return config

    def _verified(self, staging: Path, shape: Shape, teacher: Teacher) -> Verification | None:
        """Compare the stock class on the written files with the original model whose attention computes the same weights plainly."""
        source = self.source
        if exceeds_memory(source.checkpoint, torch.promote_types(source.dtype, torch.float32)):
            teacher.notes.append(
                "not verified: a fold to MLA is compared in memory, and this model is larger than that"
            )
            return None
        sample = verification_sample(source, teacher, teacher.notes)
        twin = partial(self._twin, Checkpoint.open(staging), shape)
        found = compare_with_twin(source.checkpoint.path, staging, {}, sample, make_twin=twin, progress=self.progress)
        found = replace(found, tolerance=LOOSER * found.tolerance)
        found = replace(found, passed=found.max_abs_difference <= found.tolerance)
        if not found.passed:
            raise wrong_output(
                staging,
                f"expected the logits of a plain computation within {found.tolerance:.2g}, got a difference of "
                f"{found.max_abs_difference:.2g}, first in {found.where}",
            )
        return found

    def _twin(self, written: Checkpoint, shape: Shape, model: "PreTrainedModel") -> "PreTrainedModel":
        config = self._complete_config()
        for site in self.source.sites:
            latent = read_site(written.read, shape, _prefix(site), residual_scale(config["rms_norm_eps"]))
            model.set_submodule(site.module, LatentAttention(latent, shape.turns))
        for name, factor in scaled_tensors(config, written.tensors).items():
            parameter = model.get_parameter(name)
            parameter.data = written.read(name).to(parameter.dtype) / factor
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(written.read(HEAD).to(head.weight.dtype), requires_grad=False)  # no longer tied
        return model

    def _result(
        self, out: Path, shape: Shape, errors: dict[str, float], verification: Verification | None, notes: list[str],
        seconds: dict[str, float],
    ) -> LatentResult:  # fmt: skip
        source, site = self.source, self.source.sites[0]
        cached = shape.cached * len(source.sites) * source.dtype.itemsize
        return LatentResult(
            out, source.name, source.config["model_type"], site.num_heads, site.num_kv_heads, shape, source.kv_bytes_per_token(), cached,
            errors, self.refit, verification, notes, seconds,
        )  # fmt: skip


def _read(fitted: SiteFiles, site: Site) -> tuple[Latent, float]:
    """Return a fitted site and its predicted error.

    Raises:
        UserError: the file is corrupt.
    """
    tensors = fitted.tensors(site.name)
    try:
        error = tensors.pop(_ERROR).item()
        return Latent.of(tensors), error
    except (LookupError, TypeError, ValueError, RuntimeError) as wrong:
        raise fitted.corrupt(site.name) from wrong


def _prefix(site: Site) -> str:
    """Return the path of a site's module on disk."""
    return site.weights["o"].rpartition(".")[0]
