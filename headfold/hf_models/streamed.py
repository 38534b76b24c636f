"""Models that are larger than memory: their weights stay on disk and are read as the modules run."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.reader import Checkpoint
from ..core.errors import UserError, listed
from .building import build_model, name_on_disk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHTS = "_headfold_weights"
"""Attribute of a streamed model: what it reads from disk."""


def open_streamed(
    auto: Any, checkpoint: Checkpoint, dtype: torch.dtype, device: str, overlay: Mapping[str, Tensor], **options: Any
) -> "PreTrainedModel":
    """Build a model of the class `auto` on the meta device with real buffers, whose modules fetch their weights as they run.

    Raises:
        UserError: transformers does not build the model, or tensors are missing from the checkpoint.
    """
    from accelerate import init_empty_weights
    from accelerate.hooks import attach_align_device_hook

    path = checkpoint.path
    with init_empty_weights(include_buffers=False):
        model = build_model(auto, checkpoint, dtype=dtype, **options)
    model.eval()
    weights = vars(model)[_WEIGHTS] = _Weights(model, checkpoint, dtype, torch.device(device), overlay)
    refuse_missing(path, [name for name, on_disk in weights.names.items() if on_disk is None], _REGROUPED)
    attach_align_device_hook(model, execution_device=torch.device(device), offload=True, weights_map=weights)
    return model


@contextmanager
def weights_held(model: "PreTrainedModel") -> Iterator[Callable[[str], None]]:
    """Return a context in which whatever a streamed model fetches from disk is kept where it runs, so that a block that runs on many
    batches is read once; and a function that drops what is kept outside of the module at a path.
    """
    weights = vars(model).get(_WEIGHTS)
    if weights is None:
        yield lambda path: None
        return
    held: dict[str, Tensor] = {}
    weights.held = held

    def keep_only(path: str) -> None:
        for name in [name for name in held if not name.startswith(f"{path}.")]:
            del held[name]

    try:
        yield keep_only
    finally:
        weights.held = None


def is_streamed(model: "PreTrainedModel") -> bool:
    """Return whether the model's weights stay on disk between forward passes."""
    return next(iter(model.parameters())).device.type == "meta"


def input_device(model: "PreTrainedModel") -> torch.device:
    """Return the device of the model's inputs; a streamed model moves them itself."""
    return torch.device("cpu") if is_streamed(model) else next(iter(model.parameters())).device


class _Weights(Mapping[str, Tensor]):
    """Parameter name → its value, read from disk when asked for, or once while values are held."""

    def __init__(
        self,
        model: "PreTrainedModel",
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        overlay: Mapping[str, Tensor],
    ) -> None:
        self.held: dict[str, Tensor] | None = None
        parameters = model.named_parameters(remove_duplicate=False)
        self.names = {name: name_on_disk(name, model, checkpoint) for name, _ in parameters}
        self._checkpoint, self._dtype, self._device, self._overlay = checkpoint, dtype, device, overlay
        refuse_unused(checkpoint.path, sorted(overlay.keys() - set(self.names.values())))

    def __getitem__(self, name: str) -> Tensor:
        if self.held is None:
            return self._read(name)
        if name not in self.held:
            self.held[name] = self._read(name).to(self._device)
        return self.held[name]

    def _read(self, name: str) -> Tensor:
        on_disk = self.names[name]
        assert on_disk is not None  # `refuse_missing` has seen to that
        stored = self._overlay[on_disk] if on_disk in self._overlay else self._checkpoint.read(on_disk)
        return stored.to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def refuse_unused(path: Path, unused: list[str]) -> None:
    """Refuse a checkpoint whose attention has tensors, such as biases, that its model does not read by the config.

    Raises:
        UserError: names the first of them.
    """
    if unused:
        raise UserError(
            f"{path}: the checkpoint has tensors that the model does not take by its config: {listed(unused)}; "
            "correct the config"
        )


_REGROUPED = "; if it is complete, transformers regroups its tensors on loading, and it must fit into memory whole"


def refuse_missing(path: Path, missing: list[str], hint: str = "; is it complete?") -> None:
    """Refuse a checkpoint that lacks tensors of these names.

    Raises:
        UserError: names the first of them.
    """
    if missing:
        raise UserError(f"{path}: the model needs tensors that the checkpoint lacks: {listed(missing)}{hint}")
