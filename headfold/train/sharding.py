"""Training with weights sharded over processes (FSDP2), as the launcher's environment asks of accelerate."""

import os
from pathlib import Path

import torch

from ..core.errors import UserError
from ..parallel import is_main
from .trainer import Uptrainer


def load_everywhere() -> None:
    """Make every process load whole models before they are sharded.

    By default accelerate loads the first process's only and copies the trained model from there: a teacher would remain empty.
    """
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def check_sharding(trainer: Uptrainer, optimizer: str, last: Path | None) -> None:
    """Check that weights are sharded where the launcher asks for it, in a supported way, and as in the checkpoint to resume from.

    Raises:
        UserError: they are not.
    """
    sharded = trainer.is_fsdp_enabled
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not sharded:
        raise UserError("FSDP: accelerate shards models on accelerators only, not on CPUs; launch without it")
    if sharded and not trainer.accelerator.is_fsdp2:
        raise UserError("FSDP: expected its second version; set fsdp_version: 2")
    if sharded and optimizer == "adafactor":
        raise UserError(
            "--optimizer adafactor: its state cannot be sharded; give --optimizer adamw, or launch without FSDP"
        )
    if last is not None and any(last.glob("pytorch_model_fsdp*")) != sharded:
        expected, before = ("of shards", "without") if sharded else ("that is whole", "with")
        raise UserError(f"{last}: expected a checkpoint {expected}; launch {before} FSDP, as before")


def gathered(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of a sharded model, whole on rank 0; every tensor passes through all ranks."""
    state = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if is_main():
            state[name] = whole.cpu()
    return state
