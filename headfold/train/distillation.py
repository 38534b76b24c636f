"""Distillation from the original: its next-token (or class) distribution and the outputs of its attention sites."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..calibration import decoder_inputs
from ..core.errors import UserError
from ..divergence import label_mask, output_error, relative_error, without_padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SITE_WEIGHT = 1.0
"""Weight of the mean relative error of the attention outputs, beside the KL in nats."""


class Distillation:
    """Computes KL(teacher ‖ student), mean over positions, + `weight` · mean over sites of Σ ‖ŷ − y‖² / Σ ‖y‖².

    Both models run on the same batch, each on its own hidden states; y and ŷ are the outputs of a site's output projection in
    teacher and student. The first term is `divergence.output_error`, the second is hidden-state distillation restricted to attention
    outputs.
    """

    def __init__(
        self,
        teacher: "PreTrainedModel",
        student: nn.Module,
        outputs: Sequence[str],
        weight: float = SITE_WEIGHT,
        *,
        teacher_outputs: Sequence[str] | None = None,
    ) -> None:
        """Registers hooks on the output projections, which stay until `close`, and disables the student's dropout for good.

        `outputs` are the paths of the output projections in the student, `teacher_outputs` those in the teacher (default: the same).

        Raises:
            UserError: the teacher is of another architecture or vocabulary.
        """
        teacher_outputs = outputs if teacher_outputs is None else teacher_outputs
        self.teacher, self.weight = teacher.eval().requires_grad_(False), weight
        self._in_decoder = [
            getattr(teacher.config, "is_encoder_decoder", False) and "decoder" in path.split(".")
            for path in teacher_outputs
        ]
        disable_dropout(student)
        self._outputs: dict[str, list[Tensor]] = {"teacher": [], "student": []}
        self._compares = False
        missing = [path for path in teacher_outputs if path not in dict(teacher.named_modules())]
        if missing:
            raise UserError(f"--distill: expected the model that this was folded from, got one without {missing[0]}")
        sizes = [getattr(model.config, "vocab_size", None) for model in (student, teacher)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"--distill: expected a teacher with the student's vocabulary of {sizes[0]} tokens, got {sizes[1]}"
            )
        depths = [getattr(model.config, "num_hidden_layers", None) for model in (student, teacher)]
        if depths[0] != depths[1]:
            raise UserError(
                f"--distill: expected the model that this was folded from, of {depths[0]} layers, got one of {depths[1]}"
            )
        self._hooks = [
            model.get_submodule(path).register_forward_hook(self._recorder(name))
            for name, model, paths in (("teacher", teacher, teacher_outputs), ("student", student, outputs))
            for path in paths
        ]

    def _recorder(self, name: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
            # Neither where a teacher writes text, nor in the recomputation of gradient checkpointing.
            if self._compares and torch._C._current_graph_task_id() == -1:
                self._outputs[name].append(output)

        return record

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of one batch, and its parts for logging. `model` is the student, possibly wrapped by the Trainer.

        Raises:
            UserError: the outputs of teacher and student differ in shape.
        """
        labels = inputs.get("labels")
        given = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        if getattr(self.teacher.config, "is_encoder_decoder", False):
            given["decoder_input_ids"] = decoder_inputs(self.teacher, inputs["labels"])
        for found in self._outputs.values():
            found.clear()
        self._compares = True
        try:
            with torch.no_grad():
                teacher_output = self.teacher(**given)
            student_output = model(**given)
        finally:
            self._compares = False
        divergence = output_error(student_output, teacher_output, labels, given.get("attention_mask"))
        sites = torch.stack(self._site_errors(label_mask(labels), given.get("attention_mask")))
        parts = {"kl": divergence.detach(), "site_error": sites.mean().detach()}
        return divergence + self.weight * sites.mean(), parts

    def _site_errors(self, labelled: Tensor | None, mask: Tensor | None) -> list[Tensor]:
        """Return the relative error of each site, over positions that are not padding; in a decoder over positions with labels."""
        errors = []
        for s, t, decodes in zip(self._outputs["student"], self._outputs["teacher"], self._in_decoder, strict=True):
            errors.append(
                relative_error(*(without_padding(states, labelled if decodes else mask) for states in (s, t)))
            )
        return errors


def disable_dropout(model: nn.Module) -> None:
    """Set all dropout rates of a model to 0, as the teacher has no dropout: with it a short training of a T5 ends worse than it began."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # classes that hand the rate to a function
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)
