"""What the original outputs on batches, computed once where a batch is seen again."""

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .divergence import compared_alone

KEPT_BYTES = 2**30
"""Memory for what is kept of batches that are seen again."""

Given = Mapping[str, Any]
"""What a model is called with."""


class Answers:
    """Runs the original on batches. Of a batch whose number is given something is kept, as far as memory is set aside for it:

    - of a model whose encoder is not folded, the output of that;
    - of a model whose logits are those of its output embedding as they are, the states that this reads;
    - of all others their output.
    """

    def __init__(self, original: Any, options: Given, *, shares_encoder: bool) -> None:
        self._original, self._options = original, options
        self._encoder: nn.Module | None = original.get_encoder() if shares_encoder else None
        self._head: nn.Module | None = _output_embedding(original)
        self._encoded: dict[int, Any] = {}
        self._states: dict[int, Tensor] = {}
        self._outputs: dict[int, SimpleNamespace] = {}
        self._room = KEPT_BYTES

    @torch.no_grad()
    def of(self, given: Given, number: int | None) -> tuple[SimpleNamespace, Given]:
        """Return what is compared of the original's output on a batch, and what the student is called with."""
        if number in self._outputs:
            return self._outputs[number], given
        if number in self._states:
            assert self._head is not None
            return SimpleNamespace(logits=self._head(self._states[number])), given
        if self._encoder is not None:
            # It has the larger part of the work, and its output the smaller part of the memory.
            given = _decoded(given, self._encoding(given, number))
            return compared_alone(self._original(**given, **self._options)), given
        output, states = self._run(given)
        compared = compared_alone(output)
        if states is not None and compared.__dict__.keys() == {"logits"}:
            self._keep(self._states, number, states, states)
        else:
            self._keep(self._outputs, number, compared, *vars(compared).values())
        return compared, given

    def _encoding(self, given: Given, number: int | None) -> Any:
        """Return the output of the encoder, in the form that the decoder is given it in."""
        if number in self._encoded:
            return self._encoded[number]
        assert self._encoder is not None
        taken = inspect.signature(self._encoder.forward).parameters
        encoded = self._encoder(**{name: value for name, value in given.items() if name in taken})
        self._keep(self._encoded, number, encoded, *(each for each in encoded.values() if isinstance(each, Tensor)))
        return encoded

    def _run(self, given: Given) -> tuple[Any, Tensor | None]:
        """Return the original's output, and the input of its output embedding if no more than that makes the logits."""
        if self._head is None:
            return self._original(**given, **self._options), None
        seen: list[tuple[Tensor, Tensor, int]] = []

        def see(module: nn.Module, inputs: tuple[Tensor, ...], made: Tensor) -> None:
            if inputs:
                seen.append((inputs[0], made, made._version))

        with self._head.register_forward_hook(see):
            output = self._original(**given, **self._options)
        if len(seen) != 1:
            return output, None
        ((states, made, version),) = seen
        # Logits that are scaled or capped after it are another tensor, or this one changed in place.
        whole = getattr(output, "logits", None) is made and made._version == version
        return output, states if whole else None

    def _keep(self, kept: dict[int, Any], number: int | None, value: Any, *tensors: Tensor) -> None:
        """Keep what holds these tensors, as far as there is room."""
        size = sum(tensor.nbytes for tensor in tensors)
        if number is not None and number not in kept and size <= self._room:
            self._room -= size
            kept[number] = value


def _output_embedding(original: Any) -> nn.Module | None:
    try:
        found = original.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # of classes that are not stock
        return None
    return found if isinstance(found, nn.Module) else None


def _decoded(given: Given, encoded: Any) -> dict[str, Any]:
    """Return what a model is called with whose encoder need not run."""
    kept = {name: given[name] for name in ("attention_mask", "decoder_input_ids") if name in given}
    return {**kept, "encoder_outputs": encoded}
