"""An implementation of decode attention in C++ (`decode.cpp`), compiled once per machine and user where there is a compiler; optional.

On processors without bf16 matrix units torch's kernels read a bf16 cache at a small share of the memory bandwidth, and this one at a
larger one while few query rows share a head; with many rows arithmetic is the limit (`benchmarks/decode.py` measures both). torch's own
loader of extensions is not used: it needs ninja, and waits forever on the lock of a build that was killed.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.user_cache import cache_home, refuse_what_others_write
from ..hf_models import processor_flags
from .decoding import CANDIDATES, Unsuited, sdpa

SOURCE = Path(__file__).with_name("decode.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")
PATIENCE = 120
"""Seconds that a build may take; it takes about three."""
LEAST_STRETCH = 256
"""Number of keys below which splitting them over threads is slower."""
FUNCTIONS = {torch.bfloat16: "headfold_decode_bfloat16", torch.float32: "headfold_decode_float32"}
_log = logging.getLogger("headfold")

_Integers = ctypes.c_int64 * 3


class _Problem(ctypes.Structure):
    """The struct of `decode.cpp`. Queries, bias and output are (batch, group, row, dim or key), keys and values (batch, group, key,
    dim).

    Strides are in elements: of keys and values for batch, group and key; of the bias for batch, group and row.
    """

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "bias", "output")),
        *((name, ctypes.c_int64) for name in ("batch", "groups", "rows", "keys", "dim", "splits", "threads")),
        *((name, _Integers) for name in ("key_strides", "value_strides", "bias_strides")),
        ("scale", ctypes.c_float),
    )


def kernel(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return attention of (batch, group, row, dim) over (batch, group, key, dim) as (batch, row, group, dim), in bfloat16 or float32
    on a CPU.

    Raises:
        Unsuited: there is no compiler, or the tensors are of another kind.
    """
    built, reason = library()
    dim = query.shape[-1]
    if built is None or query.device.type != "cpu" or query.dtype not in FUNCTIONS or dim % built.headfold_width():
        raise Unsuited(reason or f"{query.dtype}, heads of {dim} on {query.device.type}")
    same = key.shape == value.shape and key.shape[-1] == dim and key.dtype == value.dtype == query.dtype
    if not same or dropout or is_causal or not key.numel() or key.stride(-1) != 1 or value.stride(-1) != 1:
        return sdpa(module, query, key, value, mask, scaling, dropout, is_causal)
    batch, groups, rows = query.shape[:3]
    query, output = query.contiguous(), torch.empty_like(query, memory_format=torch.contiguous_format)
    bias = None if mask is None else _bias(mask, key.shape[2]).expand(batch, groups, rows, -1)
    threads = torch.get_num_threads()
    splits = -(-2 * threads // (batch * groups)) if batch * groups < 2 * threads else 1
    problem = _Problem(
        *(tensor.data_ptr() for tensor in (query, key, value)),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        *(batch, groups, rows, key.shape[2], dim, max(1, min(splits, key.shape[2] // LEAST_STRETCH)), threads),
        *(_Integers(*tensor.stride()[:3]) if tensor is not None else _Integers() for tensor in (key, value, bias)),
        dim**-0.5 if scaling is None else scaling,
    )
    getattr(built, FUNCTIONS[query.dtype])(ctypes.byref(problem))
    return output.transpose(1, 2), None


def _bias(mask: Tensor, keys: int) -> Tensor:
    """Return the float32 bias that is added to the logits: one number per key, contiguous."""
    if mask.dtype == torch.bool:
        lowest = torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, lowest)
    return mask.float().expand(*mask.shape[:-1], keys).contiguous()


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """Return the compiled kernel, or None and the reason why there is none."""
    try:
        built = ctypes.CDLL(str(_built()), mode=os.RTLD_NOW)
        for name in FUNCTIONS.values():
            getattr(built, name).restype = None
        _ = built.headfold_width  # looked up now, as the others are
    except subprocess.CalledProcessError as error:
        found: tuple[ctypes.CDLL | None, str] = (
            None,
            f"{error.cmd[0]} failed: {(error.stderr.strip() or 'silent').splitlines()[0]}",
        )
    # RuntimeError: a user without a home. AttributeError: a library without these functions.
    except (OSError, RuntimeError, AttributeError, subprocess.TimeoutExpired) as error:
        found = None, str(error).splitlines()[0]
    else:
        found = built, ""
    _log.debug("decode kernel: %s", found[1] or found[0])
    return found


def _built() -> Path:
    """Return the path of the library in the user's cache, compiled now if it is missing for this source, compiler and processor."""
    if os.environ.get("HEADFOLD_KERNEL") == "0":
        raise OSError("HEADFOLD_KERNEL=0 in the environment")
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    about = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=True, timeout=PATIENCE
    ).stdout
    # A home directory may be shared by unlike machines.
    identity = "\n".join([SOURCE.read_text(), *FLAGS, *compiler, about, *sorted(processor_flags())])
    caches = cache_home()
    path = caches / f"decode-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=caches) as work:
            compiled, linked = Path(work) / "decode.o", Path(work) / "decode.so"
            # Linked without OpenMP's own library: the names are found in the one that torch has loaded, so its threads are used.
            for step in ([*FLAGS, "-c", str(SOURCE), "-o"], ["-shared", str(compiled), "-o"]):
                made = linked if step[0] == "-shared" else compiled
                command = [*compiler, *step, str(made)]
                subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
            linked.chmod(0o700)
            linked.replace(path)
    refuse_what_others_write(path, path.lstat(), stat.S_IWGRP)
    return path


CANDIDATES["kernel"] = kernel
