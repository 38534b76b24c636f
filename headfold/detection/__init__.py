"""Floor 7: detect how an unknown architecture's attention works, and prove the family literal that follows.

The projections are found on a toy model, every transformation that may leave its logits unchanged is tried on it, and the
resulting literal must pass all laws of a family.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.config import CONFIG, read_config
from ..checkpoint.refusals import refuse_remote_code
from ..core.errors import UserError, suggest
from ..core.progress import Progress, no_progress
from ..families.spec import Family
from ..trusted_code import trusted_code
from .establish import establish_family
from .literal import source_of
from .toy import Architecture, Unproven

__all__ = ["Detection", "Unproven", "detect", "prove", "source_of"]


@dataclass(frozen=True, slots=True)
class Detection:
    """The result of detecting one architecture."""

    model_type: str
    architecture: str
    """The name of its transformers class."""
    family: Family | None
    """The literal; None unless every law holds."""
    reason: str
    """Why there is none; empty if there is one."""
    findings: tuple[str, ...]
    """One line for each fact, in the order in which they were found."""
    laws: Mapping[str, float] = field(default_factory=dict)
    """Law → the change of the logits, relative to the largest."""

    def to_json(self) -> dict[str, Any]:
        """Return the facts, whether the literal is proven, and its source."""
        facts = {name: getattr(self, name) for name in ("model_type", "architecture", "reason", "findings", "laws")}
        return {**facts, "proven": self.family is not None, "literal": self.source}

    @property
    def source(self) -> str:
        """The literal as a file of `headfold/families/`; empty if there is none."""
        if self.family is None:
            return ""
        return source_of(self.family, f"What headfold detect found for {self.model_type}: {self.findings[-2]}.")

    @property
    def position(self) -> str:
        """The transformations of K that are free, in a few words."""
        if self.family is None:
            return ""
        (attention,), rope = self.family.attentions, self.family.position
        if rope is None:
            return "any matrix: no position on K" + (", fixed order (ALiBi)" if attention.order == "fixed" else "")
        what = "signs (q/k-norm)" if attention.k_norm else "complex numbers"
        parts = [what, "neighbouring dims" if rope.interleaved else "halves"]
        parts += ["part of each head can rotate"] if rope.fraction or rope.dim else []
        parts += ["any matrix in layers without position"] if rope.layers else []
        return ", ".join(parts)


def detect(model: str | Path, progress: Progress = no_progress) -> Detection:
    """Detect the family of a checkpoint, by its config, or of a `model_type` with its default config, from experiments on a toy
    model. No existing literal is used.

    Raises:
        UserError: neither a directory with a config.json nor a `model_type` of transformers.
    """
    architecture = architecture_of(model)
    first = _detect_once(architecture, progress)
    if first.family is not None or first.findings:
        return first
    # No attention was found: some classes derive head_dim from the hidden size.
    sizes = architecture.geometry
    second = _detect_once(architecture.with_geometry(head_dim=sizes.hidden_size // sizes.num_heads), progress)
    return second if second.findings else first


def _detect_once(architecture: Architecture, progress: Progress) -> Detection:
    findings: list[str] = []
    try:
        family, laws = establish_family(architecture, findings, progress)
    except UserError as refusal:
        return Detection(architecture.model_type, architecture.model_class, None, str(refusal), tuple(findings))
    except Exception as error:  # an unknown model may fail in any way, and then nothing is proven
        reason = f"an experiment on it failed: {type(error).__name__}: {' '.join(str(error).split())}"
        return Detection(architecture.model_type, architecture.model_class, None, reason, tuple(findings))
    return Detection(architecture.model_type, architecture.model_class, family, "", tuple(findings), laws)


def prove(directory: str | Path) -> Family:
    """Return the literal of a checkpoint whose `model_type` no family lists, if every law holds for it.

    Raises:
        UserError: says in one line why not.
    """
    found = detect(directory)
    if found.family is None:
        raise UserError(f"{directory}/config.json: model_type {found.model_type!r} cannot be folded: {found.reason}")
    return found.family


def architecture_of(model: str | Path) -> Architecture:
    """Return the architecture to experiment on.

    Raises:
        UserError: as `detect`.
    """
    from transformers import CONFIG_MAPPING

    config = read_config(Path(model)) if (Path(model) / CONFIG).is_file() else {}
    model_type = str(config.get("model_type", model))
    if model_type not in CONFIG_MAPPING:
        refuse_remote_code(config, f"{model}/{CONFIG}")
        raise UserError(
            f"{model}: expected a checkpoint directory or a model_type; {suggest(model_type, CONFIG_MAPPING)}"
        )
    try:
        assumed = CONFIG_MAPPING[model_type]().to_dict()
    except Exception as error:
        raise UserError(f"{model}: transformers builds no default config of {model_type!r}: {error}") from error
    return Architecture(model_type, {**assumed, **config}, _model_class(model_type, config))


def _model_class(model_type: str, config: Mapping[str, Any]) -> str:
    """Return the name of the class for causal language models of the type, else for masked ones: names on disk are those of a
    model with its head.

    For an encoder-decoder it is the class that its config names.
    """
    import transformers

    named = next(iter(config.get("architectures") or []), "")
    if (code := trusted_code(model_type)) is not None:
        return code.model_class.__name__
    if config.get("is_encoder_decoder") and hasattr(transformers, named):
        return named
    for auto in ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"):
        names = getattr(transformers.models.auto.modeling_auto, auto)
        if model_type in names:
            return names[model_type]
    raise UserError(
        f"{model_type}: expected a language model or an encoder of text; transformers has none of that type"
    )
