"""Floor 7: a family that proves itself. Find an unknown architecture's attention, try what it leaves free, test the laws."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import UserError, suggest
from ..families.spec import Family
from .establish import established
from .literal import source_of
from .toy import Subject, Unproven

__all__ = ["Probed", "Unproven", "probe", "prove", "source_of"]


@dataclass(frozen=True, slots=True)
class Probed:
    """What was seen of one architecture."""

    model_type: str
    architecture: str
    family: Family | None
    """The literal, where every law holds."""
    reason: str
    """Why there is none; empty where there is."""
    seen: tuple[str, ...]
    laws: Mapping[str, float] = field(default_factory=dict)
    """Law → how far the logits moved, relative to the largest."""

    def to_json(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in ("model_type", "architecture", "reason", "seen", "laws")}
        return {**facts, "proven": self.family is not None, "literal": self.source}

    @property
    def source(self) -> str:
        """The literal as a file of `headfold/families/`; empty where there is none."""
        if self.family is None:
            return ""
        return source_of(self.family, f"What headfold probe found of {self.model_type}: {self.seen[-2]}.")

    @property
    def position(self) -> str:
        """In a few words, what of K is free."""
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


def probe(model: str | Path) -> Probed:
    """Experiment on a toy model of a checkpoint's config, or of what a `model_type` assumes. No literal is looked at.

    Raises:
        UserError: neither a directory with a config.json nor a `model_type` of transformers.
    """
    subject = subject_of(model)
    first = _tried(subject)
    if first.family is not None or first.seen:
        return first
    # Nothing was even found: some classes tie the size of a head to the width.
    sizes = subject.geometry
    second = _tried(subject.with_geometry(head_dim=sizes.width // sizes.num_heads))
    return second if second.seen else first


def _tried(subject: Subject) -> Probed:
    seen: list[str] = []
    try:
        family, laws = established(subject, seen)
    except UserError as refusal:
        return Probed(subject.model_type, subject.architecture, None, str(refusal), tuple(seen))
    except Exception as error:  # anything can happen in a model that nobody has seen, and it is no proof
        reason = f"an experiment on it broke off: {type(error).__name__}: {' '.join(str(error).split())}"
        return Probed(subject.model_type, subject.architecture, None, reason, tuple(seen))
    return Probed(subject.model_type, subject.architecture, family, "", tuple(seen), laws)


def prove(directory: str | Path) -> Family:
    """The literal of a checkpoint whose `model_type` no family claims, if every law holds for it.

    Raises:
        UserError: one line, why it does not.
    """
    found = probe(directory)
    if found.family is None:
        raise UserError(f"{directory}/config.json: model_type {found.model_type!r} cannot be folded: {found.reason}")
    return found.family


def subject_of(model: str | Path) -> Subject:
    """What to experiment on.

    Raises:
        UserError: as `probe`.
    """
    from transformers import CONFIG_MAPPING

    file = Path(model) / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    model_type = str(config.get("model_type", model))
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{model}: expected a checkpoint directory or a model_type; {suggest(model_type, CONFIG_MAPPING)}"
        )
    try:
        assumed = CONFIG_MAPPING[model_type]().to_dict()
    except Exception as error:
        raise UserError(f"{model}: transformers builds no default config of {model_type!r}: {error}") from error
    return Subject(model_type, {**assumed, **config}, _architecture(model_type, config))


def _architecture(model_type: str, config: Mapping[str, Any]) -> str:
    """The causal language model of the type, else the masked one: names on disk are those of a model with its head.

    An encoder-decoder is what its config names.
    """
    import transformers

    named = next(iter(config.get("architectures") or []), "")
    if config.get("is_encoder_decoder") and hasattr(transformers, named):
        return named
    for auto in ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"):
        names = getattr(transformers.models.auto.modeling_auto, auto)
        if model_type in names:
            return names[model_type]
    raise UserError(
        f"{model_type}: expected a language model or an encoder of text; transformers has none of that type"
    )
