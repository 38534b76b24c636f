"""Open a checkpoint directory as a stock transformers model, whole or streamed from disk one linear at a time."""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from ..checkpoint.reader import Checkpoint, refuse_remote_code
from ..checkpoint.refusals import model_class
from ..core.errors import UserError
from ..parallel import num_local_processes
from .building import check_size, check_token_ids, fitting_class, library_errors, name_on_disk, quiet
from .readers import PROCESSORS, open_processor, open_tokenizer
from .rows import take_images_by_item
from .streamed import open_streamed, refuse_missing, refuse_unused

__all__ = [
    "DTYPES",
    "MEMORY_SHARE",
    "PROCESSORS",
    "PRODUCT",
    "available_memory",
    "check_device",
    "check_known_model",
    "check_model",
    "compute_dtype",
    "default_device",
    "dtype_named",
    "exceeds_memory",
    "named_class",
    "open_model",
    "open_processor",
    "open_tokenizer",
    "processor_flags",
    "product_seconds",
    "speeds",
    "quiet",
    "stored_dtype",
    "total_memory",
]

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRODUCT = 512, 1024, 1024
"""Rows, inner and outer size of the matrix product that decides whether a dtype is worth computing in."""

MEMORY_SHARE = 0.6
"""Share of the available memory that a whole model may take; the rest is for activations and the caller."""


DTYPES = ("bfloat16", "float16", "float32", "float64")


def dtype_named(name: str | None) -> torch.dtype | None:
    """Return the dtype of a name such as "float32"; None for None.

    Raises:
        UserError: not one of `DTYPES`.
    """
    if name not in (None, *DTYPES):
        raise UserError(f"--dtype {name}: expected one of {', '.join(DTYPES)}")
    return None if name is None else getattr(torch, name)


def default_device() -> str:
    """Return the accelerator, where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str | None) -> str:
    """Return the device to run on, by default the accelerator where there is one.

    Raises:
        UserError: torch does not know the device, or this machine does not have it.
    """
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (
        RuntimeError,
        AssertionError,
        ImportError,
    ) as error:  # their texts list all kinds that torch can be built for
        raise _no_device(name) from error
    if device.type == "meta":  # it holds shapes without numbers
        raise _no_device(name)
    return name


def _no_device(name: str) -> UserError:
    expected = "cpu, cuda, cuda:N or mps" if torch.backends.mps.is_available() else "cpu, cuda or cuda:N"
    present = f"; CUDA devices on this machine: {torch.cuda.device_count()}" if name.startswith("cuda") else ""
    return UserError(f"--device {name}: expected {expected}, got {name!r}{present}")


def compute_dtype(source: torch.dtype, device: str = "cpu") -> tuple[torch.dtype, str]:
    """Return the dtype to run a model of dtype `source` in, and why.

    It is the source's own, except that bf16 and fp16 run in float32 on a CPU that multiplies float32 matrices faster, which is more
    exact too. That is measured once: processors without matrix units for bf16 take several times as long.
    """
    if torch.device(device).type != "cpu" or source not in (torch.bfloat16, torch.float16):
        return source, f"computed in the checkpoint's own {_short(source)}"
    if product_seconds(source) <= product_seconds(torch.float32):
        return source, f"computed in the checkpoint's own {_short(source)}: {speeds(source)}"
    return torch.float32, f"{_short(source)} weights computed in float32: {speeds(source)}"


def speeds(dtype: torch.dtype) -> str:
    """Return how long this CPU multiplies matrices in a dtype and in float32, in words."""
    times = " and ".join(f"{product_seconds(each) * 1e3:.3g} ms in {_short(each)}" for each in (dtype, torch.float32))
    return f"this processor takes {times} to multiply the same two matrices"


@functools.cache
def product_seconds(dtype: torch.dtype) -> float:
    """Return the least seconds of three products of matrices of size `PRODUCT` on this CPU."""
    rows, inner, outer = PRODUCT
    a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(outer, inner, dtype=dtype)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        torch.nn.functional.linear(a, b)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def processor_flags() -> frozenset[str]:
    """Return the instruction-set flags of the first processor as Linux lists them; empty where there is no such list."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    listed = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    return frozenset(listed[0] if listed else ())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def available_memory(device: str = "cpu") -> int:
    """Return the bytes that can be allocated: what a GPU has free; on the CPU what the kernel gives without swapping, or less where
    the control group is smaller."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no group, or a group without a limit ("max")
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        free = min(free, max(limit, 0))
    return free


def total_memory(device: str = "cpu") -> int:
    """Return the bytes that a GPU has, or this machine, or its control group, whoever uses them now."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    total = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def open_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    overlay: Mapping[str, Tensor] | None = None,
    renamed: Mapping[str, str] | None = None,
    model_class: Any = None,
    memory_limit: int | None = None,
) -> "PreTrainedModel":
    """Open the model of a checkpoint directory in eval mode, without gradients, by the class that its config names.

    `dtype` is what it computes in (default: `compute_dtype` of the checkpoint's). `overlay` maps tensor names on disk to
    tensors, shapes as stored, that take the place of the stored ones; it may be lazy and is asked for one at a time; `renamed`
    gives the names on disk of parameters that transformers calls otherwise. `model_class` is used instead of the named one. A model that
    needs more than `memory_limit` bytes (default: `MEMORY_SHARE` of what is available) keeps its weights on disk and reads
    them at every forward pass, one module at a time: slow but bounded, and bitwise the same.

    Raises:
        UserError: remote code, an architecture that this transformers lacks, or tensors missing from the checkpoint.
    """
    checkpoint = Checkpoint.open(Path(path))
    dtype = dtype or compute_dtype(_main_dtype(checkpoint), device)[0]
    auto = check_model(checkpoint, model_class)
    model: Any
    with quiet():
        if exceeds_memory(checkpoint, dtype, device, memory_limit):
            model = open_streamed(auto, checkpoint, dtype, device, overlay or {}, **_experts(dtype))
        else:
            model = _whole(auto, checkpoint, dtype, overlay or {}, renamed or {})
            model = model.to(device)
    take_images_by_item(model)
    _name_decoder_start(model)
    _return_usual_outputs(model)
    check_token_ids(model, checkpoint.path)
    return model.eval().requires_grad_(False)


def check_model(checkpoint: Checkpoint, own_class: Any = None) -> Any:
    """Return the class that opens a checkpoint, `own_class` or the one that its config names, once it has been built without weights.

    Raises:
        UserError: there is none, transformers refuses the config, or the model is much larger than its checkpoint.
    """
    with quiet():
        auto = own_class or _auto_class(checkpoint)
        check_size(auto, checkpoint)
    return auto


def check_known_model(checkpoint: Checkpoint, own_class: Any = None) -> None:
    """Do the same for a class that transformers has. One that it lacks, of a classifier on a known body, can be folded but not run.

    Raises:
        UserError: as `check_model`; the config names no class at all.
    """
    import transformers

    name = model_class(checkpoint.config, f"{checkpoint.path}/config.json")
    if own_class is not None or hasattr(transformers, name):
        check_model(checkpoint, own_class)


def _name_decoder_start(model: Any) -> None:
    """Name a decoder's first token in the config, by which labels are shifted: transformers 5 may save it in the generation config
    alone. Where neither names one, it is the padding token, as for every published T5."""
    config, generation = model.config, getattr(model, "generation_config", None)
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        named = getattr(generation, "decoder_start_token_id", None)
        config.decoder_start_token_id = config.pad_token_id if named is None else named


def _return_usual_outputs(model: Any) -> None:
    """Let forward return its outputs by name, and no others than usual, whatever the checkpoint's config wants of it."""
    for name, usual in (("return_dict", True), ("output_hidden_states", False), ("output_attentions", False)):
        if hasattr(model.config, name):
            setattr(model.config, name, usual)


def exceeds_memory(
    checkpoint: Checkpoint, dtype: torch.dtype, device: str = "cpu", memory_limit: int | None = None, extra: int = 0,
    memory: Callable[[str], int] | None = None,
) -> bool:  # fmt: skip
    """Return whether `open_model` streams the checkpoint from disk, or would if `extra` bytes were needed beside it.

    `memory` is `available_memory`, or `total_memory` for an answer that does not depend on what else runs.
    """
    needed = sum(_num_elements(checkpoint, name) for name in checkpoint.tensors) * dtype.itemsize + extra
    if memory_limit is None:
        # All launched processes of a machine open it at once; each has a GPU of its own.
        takers = num_local_processes() if torch.device(device).type == "cpu" else 1
        memory_limit = int(MEMORY_SHARE * (memory or available_memory)(device) / takers)
    return needed > memory_limit


def stored_dtype(path: str | Path) -> torch.dtype:
    """Return the dtype that holds most of a checkpoint's numbers."""
    return _main_dtype(Checkpoint.open(Path(path)))


def _main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    totals: dict[torch.dtype, int] = {}
    for name, info in checkpoint.tensors.items():
        totals[info.dtype] = totals.get(info.dtype, 0) + _num_elements(checkpoint, name)
    return max(totals, key=totals.__getitem__)


def _num_elements(checkpoint: Checkpoint, name: str) -> int:
    return torch.Size(checkpoint.tensors[name].shape).numel()


def _auto_class(checkpoint: Checkpoint) -> Any:
    """Return the transformers class that opens the checkpoint, which is the one that its config names.

    Raises:
        UserError: the config names none, one that transformers does not have, or asks for code of its own. Where transformers has the
            architecture as well, its own is used.
    """
    import transformers

    where = f"{checkpoint.path}/config.json"
    if checkpoint.config.get("model_type") not in transformers.CONFIG_MAPPING:
        refuse_remote_code(checkpoint.config, where)
    if model_class(checkpoint.config, where).endswith("ForCausalLM"):
        return transformers.AutoModelForCausalLM
    return named_class({**checkpoint.config, "architectures": [fitting_class(checkpoint)]}, where)


def named_class(config: Mapping[str, Any], where: str) -> Any:
    """Return the class of transformers that a config names.

    Raises:
        UserError: it names none, or one that transformers does not have.
    """
    import transformers

    name = model_class(config, where)
    if (found := getattr(transformers, name, None)) is None:
        raise UserError(
            f"{where}: architectures: expected a model class of transformers {transformers.__version__}, got {name}; correct the config, "
            "or install the version that has it"
        )
    return found


def _experts(dtype: torch.dtype) -> dict[str, str]:
    """Return options for experts: the grouped product that transformers picks for them has no float64."""
    return {"experts_implementation": "eager"} if dtype == torch.float64 else {}


def _whole(
    auto: Any, checkpoint: Checkpoint, dtype: torch.dtype, overlay: Mapping[str, Tensor], renamed: Mapping[str, str]
) -> "PreTrainedModel":
    """Load with transformers itself, as any user would, then copy the overlay in."""
    path = checkpoint.path
    with library_errors(path, "transformers does not load this checkpoint"):
        model, info = auto.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # its own refusal names no tensor; ours follows
            **_experts(dtype),
        )
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{path}: {name}: expected shape {tuple(expected)} by the config, got {tuple(found)}; "
            "correct the config or the checkpoint"
        )
    refuse_missing(path, sorted(info["missing_keys"]))
    names = {
        renamed.get(name) or name_on_disk(name, model, checkpoint): parameter
        for name, parameter in model.named_parameters()
    }
    refuse_unused(path, sorted(overlay.keys() - names.keys()))
    with torch.no_grad():
        for name in overlay:
            parameter = names[name]
            value = overlay[name]
            assert value.shape == parameter.shape, (name, value.shape, parameter.shape)
            parameter.copy_(value)
    return model
