"""The model that is experimented on: toy size, random weights, all in float64."""

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core.errors import UserError
from .shrink import VOCABULARY, Config, Geometry, shrink

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGIT_SCALE = 1.5
"""Standard deviation of q and k elements: attention logits spread by about its square, far from uniform attention."""
EPSILON = 1e-20
_ASKS = re.compile(r"q_proj|k_proj|qkv|c_attn|query|key|[qk]_lin|w[qk]\b|Wqkv", re.IGNORECASE)


class InFloat64(TorchFunctionMode):
    """What a model computes in float32 whatever the dtype of its weights, norms and softmax, is computed in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func in (Tensor.float, Tensor.half, Tensor.bfloat16) else func
        return func(*map(_doubled, args), **{name: _doubled(value) for name, value in (kwargs or {}).items()})


def _doubled(value: Any) -> Any:
    low = (torch.float32, torch.float16, torch.bfloat16)
    return torch.float64 if isinstance(value, torch.dtype) and value in low else value


@contextlib.contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Everything: new tensors too, and parameters that a class makes in float32 whatever is asked for."""
    before, low = torch.get_default_dtype(), [p for p in model.parameters() if p.dtype == torch.float32]
    torch.set_default_dtype(torch.float64)
    for parameter in low:
        parameter.data = parameter.data.double()
    try:
        with InFloat64():
            yield
    finally:
        torch.set_default_dtype(before)
        for parameter in low:
            parameter.data = parameter.data.float()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class Unproven(UserError):
    """Why an architecture cannot be folded, or is not seen to be foldable: one line."""


@dataclass(frozen=True, slots=True)
class Subject:
    """An architecture: its config as published or as its class assumes, and the class that builds it."""

    model_type: str
    config: Config
    architecture: str
    geometry: Geometry = Geometry()
    overrides: Mapping[str, Any] | None = None

    def toy_config(self) -> Any:
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[self.model_type].from_dict(
            shrink(self.config, self.geometry) | dict(self.overrides or {})
        )

    def with_geometry(self, **sizes: int) -> "Subject":
        return replace(self, geometry=replace(self.geometry, **sizes))

    def build(self, seed: int = 0, device: str = "cpu") -> "PreTrainedModel":
        """A toy model with random weights in float64; on `meta`, shapes alone."""
        try:
            model = _make(self.architecture, self.toy_config(), device)
        except Exception as error:  # a class may fail in any way on sizes that it was not made for
            raise Unproven(f"no toy model of it can be built: {type(error).__name__}: {_one_line(error)}") from error
        if device != "meta":
            randomise(model, seed)
        return model.eval().requires_grad_(False)


def _make(architecture: str, config: Any, device: str) -> "PreTrainedModel":
    import transformers

    from ..hf_models import quiet

    with quiet(), torch.device(device):
        options = {"dtype": torch.float64, "experts_implementation": "eager"}
        return getattr(transformers, architecture)._from_config(config, **options)


def randomise(model: nn.Module, seed: int) -> None:
    """Draw every parameter anew: fan-in scaled matrices, biases of 0.3, gains around the old one, epsilons of nothing."""
    generator = torch.Generator().manual_seed(seed)
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        if id(parameter) not in looked_up:
            noise = _drawn(name, parameter.data, noise)
        parameter.data.copy_(noise)
    sharpen(model)


def sharpen(model: nn.Module) -> nn.Module:
    """Epsilons of nothing: they keep a scale on K from being exactly free under a norm."""
    for module in model.modules():
        for epsilon in {"eps", "epsilon", "variance_epsilon"} & vars(module).keys():
            setattr(module, epsilon, EPSILON)
    return model


def _drawn(name: str, old: Tensor, noise: Tensor) -> Tensor:
    if name.endswith("bias"):
        return 0.3 * noise
    if old.ndim < 2:
        return old.nan_to_num() + 0.3 * noise.clamp(-2, 2)
    return noise * (LOGIT_SCALE if _ASKS.search(name) else 1.0) / old.shape[-1] ** 0.5


def tokens(num_sequences: int = 2, length: int = 14, seed: int = 0) -> Tensor:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (num_sequences, length), generator=generator)


def answer(model: "PreTrainedModel") -> Tensor:
    """Its logits or, where it has no head, its last hidden states."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    said = model(input_ids=tokens(), **options)
    return said.logits if "logits" in said else said.last_hidden_state


@torch.no_grad()
def logits(model: "PreTrainedModel") -> Float[Tensor, "sequence position vocabulary"]:
    """What the model says to random tokens, computed in float64 throughout."""
    try:
        with in_float64(model):
            return answer(model)
    except Exception as error:  # as when it is built
        raise Unproven(f"its toy model does not run: {type(error).__name__}: {_one_line(error)}") from error
