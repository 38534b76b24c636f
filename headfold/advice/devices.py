"""Devices that a model is served on: their memory, bandwidth and rate of products, as published or as measured here."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ..core.errors import UserError
from ..hf_models import available_memory, compute_dtype, default_device
from ..timing.machine import READ, product_rate, read_bandwidth

GIB = 2**30
_PRODUCT_SIZE = 2048


@dataclass(frozen=True, slots=True)
class Device:
    """One device. `memory` is in bytes, `bandwidth` in bytes per second, `rate` in floating-point operations per second."""

    name: str
    memory: float
    bandwidth: float
    rate: float
    """Of matrix products in 16 bits, without sparsity; on this machine in the dtype that it computes in."""
    source: str
    """The document that the figures are from, or how they were measured."""


def _published(name: str, gigabytes: int, gigabytes_per_second: int, teraflops: int, source: str) -> Device:
    # Memory is built in powers of two: 24 GB on a data sheet are 24 GiB.
    return Device(name, gigabytes * GIB, gigabytes_per_second * 1e9, teraflops * 1e12, source)


GPUS: Mapping[str, Device] = MappingProxyType(
    {
        device.name: device
        for device in (
            _published("t4", 16, 320, 65, "NVIDIA T4 Tensor Core GPU data sheet"),
            _published("a10", 24, 600, 125, "NVIDIA A10 Tensor Core GPU data sheet"),
            _published("l4", 24, 300, 121, "NVIDIA L4 Tensor Core GPU data sheet"),
            _published("l40s", 48, 864, 362, "NVIDIA L40S GPU data sheet"),
            _published("3090", 24, 936, 71, "NVIDIA Ampere GA102 GPU architecture"),
            _published("4090", 24, 1008, 165, "NVIDIA Ada GPU architecture"),
            _published("5090", 32, 1792, 209, "NVIDIA RTX Blackwell GPU architecture"),
            _published("a100-40gb", 40, 1555, 312, "NVIDIA A100 Tensor Core GPU data sheet"),
            _published("a100-80gb", 80, 2039, 312, "NVIDIA A100 Tensor Core GPU data sheet, SXM"),
            _published("h100", 80, 3350, 989, "NVIDIA H100 Tensor Core GPU data sheet, SXM"),
            _published("h100-pcie", 80, 2000, 756, "NVIDIA H100 Tensor Core GPU data sheet, PCIe"),
            _published("h200", 141, 4800, 989, "NVIDIA H200 Tensor Core GPU data sheet"),
            _published("b200", 180, 7700, 2250, "NVIDIA HGX B200 data sheet"),
            _published("mi300x", 192, 5300, 1307, "AMD Instinct MI300X data sheet"),
        )
    }
)
"""Published figures by the name that `--gpu` takes. Rates are those of products that sum in float32."""


def gpu_named(name: str) -> Device:
    """Return a device of `GPUS`.

    Raises:
        UserError: it is not listed.
    """
    found = GPUS.get(name.lower().replace("_", "-").removeprefix("rtx-").removeprefix("rtx"))
    if found is None:
        raise UserError(
            f"--gpu {name}: expected one of {', '.join(GPUS)}; choose the nearest, or run this on the machine"
        )
    return found


def this_machine(dtype: torch.dtype) -> Device:
    """Return the accelerator of this machine, or its CPU, with its free memory; bandwidth and rate are measured in about a second.

    Raises:
        UserError: there is too little memory for the measurement.
    """
    place = default_device()
    memory = available_memory(place)
    if memory < 2 * READ:
        raise UserError(
            f"inspect: expected {2 * READ / GIB:.0f} GiB of free memory to measure its bandwidth, got {memory / GIB:.1f} GiB; name a "
            "device with --gpu"
        )
    name = torch.cuda.get_device_name() if place == "cuda" else "this machine's CPU"
    rate = product_rate(_PRODUCT_SIZE, place, compute_dtype(dtype, place)[0])
    return Device(name, memory, read_bandwidth(place), rate, "measured now")
