"""The time of a new token split into reading weights, attention, the cache, and the rest."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from ..runtime.cache import GrowingLayer, GrowingSlidingLayer
from .generation import Setting, generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("weights", "attention", "cache", "rest")
"""Linear layers; attention between the projections; writing into the cache; norms, positions, choosing a token, and Python."""
WEIGHTED = (nn.Linear, Conv1D)
TRACED = 8
"""Number of new tokens in a trace."""


class Stopwatches:
    """Accumulates seconds by part; time spent inside a nested part counts for that part only."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inside: list[float] = []
        self._device = device

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time added to `part`."""

        def run(*arguments: Any, **keywords: Any) -> Any:
            started = self._now()
            self._inside.append(0.0)
            try:
                return function(*arguments, **keywords)
            finally:
                elapsed = self._now() - started
                self.seconds[part] += elapsed - self._inside.pop()
                if self._inside:
                    self._inside[-1] += elapsed

        return run

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def breakdown(model: "PreTrainedModel", setting: Setting, *, grows: bool) -> dict[str, float]:
    """Return the seconds of a new token by part (`PARTS`), mean over all tokens after the first.

    Attention that is not called by a name (`eager`) cannot be separated; it counts as rest.
    """
    watches = Stopwatches(model.device)
    with _watching(model, watches):
        timing = generate(model, setting, grows=grows, on_first=watches.seconds.clear)
    seen = [part for part in PARTS[:-1] if part != "attention" or watches.seconds[part]]
    found = {part: watches.seconds[part] / len(timing.tokens) for part in seen}
    return {**found, "rest": max(0.0, sum(timing.tokens) / len(timing.tokens) - sum(found.values()))}


def weights_read(model: "PreTrainedModel", setting: Setting, *, grows: bool) -> int:
    """Return the bytes of the linear layers that a new token runs through, each counted once."""
    read: dict[int, int] = {}
    weighted = [module for module in model.modules() if isinstance(module, WEIGHTED)]

    def note(module: nn.Module, *_: Any) -> None:
        weight = module.get_parameter("weight")
        read[weight.data_ptr()] = weight.nbytes

    hooks = [module.register_forward_hook(note) for module in weighted]
    try:
        generate(model, replace(setting, context=1, batch=1, new_tokens=2), grows=grows, on_first=read.clear)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(read.values())


@contextlib.contextmanager
def _watching(model: "PreTrainedModel", watches: Stopwatches) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, WEIGHTED):
                vars(module)["forward"] = watches.timed("weights", module.forward)
                stack.callback(delattr, module, "forward")
        for layer in (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer, GrowingSlidingLayer):
            _replace(stack, layer, "update", watches.timed("cache", layer.update))
        name = model.config._attn_implementation
        if name in ALL_ATTENTION_FUNCTIONS:
            before = ALL_ATTENTION_FUNCTIONS[name]
            ALL_ATTENTION_FUNCTIONS[name] = watches.timed("attention", before)
            stack.callback(ALL_ATTENTION_FUNCTIONS.__setitem__, name, before)
        yield


def _replace(stack: contextlib.ExitStack, owner: type, name: str, made: Any) -> None:
    stack.callback(setattr, owner, name, vars(owner)[name])
    setattr(owner, name, made)


def write_trace(path: Path, model: "PreTrainedModel", setting: Setting, *, grows: bool) -> None:
    """Write a trace of a few new tokens by torch's profiler, for chrome://tracing or Perfetto."""
    from torch.profiler import ProfilerActivity, profile

    short = replace(setting, new_tokens=TRACED, skip_prefill=True)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if model.device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        generate(model, short, grows=grows)
    path.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(path))
