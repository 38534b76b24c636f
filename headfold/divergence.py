"""How far the output of a model is from another's on the same batch: as a loss to train on, and as far as the same function may be."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .core.errors import UserError
from .corpus.pairs import IGNORED

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-5}
"""Largest difference of logits, relative to their root mean square, by the dtype that both models compute in.

bf16 and fp16 checkpoints are verified in float32, which represents their weights exactly, so that rounding cannot hide a wrong head.
Fold and twin then have the same weights; only the order of sums may differ, where a product with fewer rows or an attention kernel
for repeated heads associates otherwise. The bound is three times the change of logits when the whole attention kernel of a random
40-layer model is exchanged (3e-5; 4e-6 on a trained one of 6 layers). In float64 the float32 norms of stock models are the limit,
hence 1e-5. A wrong or misplaced head changes logits by about their own size.
"""

ROWS_OF = 2**24
"""Logits whose distributions are computed at once."""


def output_error(student: Any, teacher: Any, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return KL(teacher ‖ student) in nats, mean over positions that are not padding (Hinton et al. 2015, 1503.02531, at temperature 1).

    `student` and `teacher` are a model's outputs. Models without logits have the relative error of their embeddings (CLIP) or of their
    last hidden states instead.

    Raises:
        UserError: the outputs differ in kind or shape, or are of a kind that is not known.
    """
    found, error = _compared(student)
    pairs = [(own, getattr(teacher, name, None)) for name, own in found.items()]
    return torch.stack([error(own, other, labels, mask) for own, other in pairs]).mean()


def compared_alone(output: Any) -> SimpleNamespace:
    """Return what `output_error` reads of a model's output, without what else it holds."""
    return SimpleNamespace(**_compared(output)[0])


def _compared(output: Any) -> tuple[dict[str, Tensor], Callable[..., Tensor]]:
    """Return what is compared of an output, by name, and the function that compares it."""
    for names, error in ((_LOGITS, _logit_error), (_EMBEDDINGS, _embedding_error), (_STATES, _state_error)):
        found = {name: tensor for name in names if (tensor := getattr(output, name, None)) is not None}
        if found:
            return found, error
    raise UserError(
        f"distillation: expected an output with logits or hidden states, got {', '.join(output)}; give --heal-by block"
    )


_LOGITS = ("logits", "prediction_logits", "start_logits", "end_logits")
_EMBEDDINGS = ("text_embeds", "image_embeds")
_STATES = ("last_hidden_state",)


def _logit_error(student: Tensor, teacher: Any, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    if teacher is None or teacher.shape != student.shape:
        raise UserError(
            "--distill: expected the model that this was folded from, got one whose logits have another shape"
        )
    kept = _kept(student, labels, mask)
    return kl_divergence(student, teacher, None if kept is None else kept.bool())


def _embedding_error(student: Tensor, teacher: Any, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    return relative_error(student, teacher)


def _state_error(student: Tensor, teacher: Any, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    kept = _kept(student, labels, mask)
    return relative_error(*(without_padding(states, kept) for states in (student, teacher)))


def _kept(output: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Return which positions of an output count: those with labels in a decoder, else those that are not padding; None for all."""
    masks = (label_mask(labels), mask)
    return next((each for each in masks if each is not None and each.shape == output.shape[:-1]), None)


def without_padding(states: Tensor, kept: Tensor | None) -> Tensor:
    """Return the states with zeros at the positions where the mask, if it has their shape, is false."""
    return states if kept is None or kept.shape != states.shape[:2] else states * kept[..., None].to(states.dtype)


def label_mask(labels: Tensor | None) -> Tensor | None:
    """Return which positions have a label, where there is a label per position."""
    return None if labels is None or labels.ndim != 2 else labels != IGNORED


def kl_divergence(
    student: Float[Tensor, "*position vocab"],
    teacher: Float[Tensor, "*position vocab"],
    kept: Bool[Tensor, "*position"] | None,
) -> Float[Tensor, ""]:
    """Return KL(teacher ‖ student) in nats, mean over the positions in `kept`, computed in float32 or better."""
    if kept is not None:
        student, teacher = student[kept], teacher[kept]
    return _Divergence.apply(student.flatten(0, -2), teacher.flatten(0, -2))


class _Divergence(torch.autograd.Function):
    """KL divergence with its gradient in closed form, (q − p) / count: stores one tensor of the size of the logits, where autograd
    stores four, and computes it for some rows at a time.
    """

    @staticmethod
    def forward(ctx: Any, student: Float[Tensor, "position vocab"], teacher: Float[Tensor, "position vocab"]) -> Tensor:
        rows = max(1, ROWS_OF // student.shape[-1])
        gradient = torch.empty_like(student if ctx.needs_input_grad[0] else student[:0])
        total = 0.0
        for at in range(0, len(student), rows):
            log_q, log_p = (_log_softmax(t[at : at + rows]) for t in (student, teacher))
            p = log_p.exp()
            total += float(log_p.sub_(log_q).mul_(p).sum())
            if ctx.needs_input_grad[0]:
                gradient[at : at + rows] = log_q.exp_().sub_(p)
        ctx.save_for_backward(gradient)
        return torch.tensor(
            total / len(student), dtype=torch.promote_types(student.dtype, torch.float32), device=student.device
        )

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        # Divided here, where the loss may be scaled: float16 has no room for a share of one position in thousands.
        return gradient * (above[0] / len(gradient)), None


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def relative_error(student: Tensor, teacher: Tensor) -> Float[Tensor, ""]:
    """Return Σ ‖ŷ − y‖² / Σ ‖y‖².

    Raises:
        UserError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise UserError(
            f"--distill: expected the model that this was folded from, got one with {teacher.shape[-1]} dims instead of {student.shape[-1]}"
        )
    student, teacher = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (student, teacher))
    return (student - teacher).square().sum() / teacher.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


def tolerance_of(expected: Tensor, dtype: torch.dtype) -> float:
    """Return how much an output computed in `dtype` may differ from an expected one, absolute."""
    return TOLERANCE[dtype] * expected.double().square().mean().sqrt().item()


def difference_and_tolerance(found: Tensor, expected: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest difference of two outputs computed in `dtype`, and the tolerance for it, both absolute."""
    return (found - expected).abs().max().item(), tolerance_of(expected, dtype)
