"""Toy models to experiment on: small, with random weights, computed in float64 throughout."""

import contextlib
import inspect
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core.errors import UserError
from ..hf_models import quiet
from ..trusted_code import trusted_code
from .shrink import VOCABULARY, Config, Geometry, shrink

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound=nn.Module)
LOGIT_SCALE = 1.5
"""Standard deviation of q and k elements. Attention logits then spread by about its square, so that attention is far from
uniform."""
EPSILON = 1e-20
"""Replaces the epsilons of norms, with which a scale of K would change the logits slightly."""
_QUERY_OR_KEY = re.compile(r"q_proj|k_proj|qkv|c_attn|query|key|[qk]_lin|w[qk]\b|Wqkv", re.IGNORECASE)


class InFloat64(TorchFunctionMode):
    """Computes in float64 what a model computes in float32 for any dtype of its weights, such as norms and softmax."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func in (Tensor.float, Tensor.half, Tensor.bfloat16) else func
        return func(*map(_in_double, args), **{name: _in_double(value) for name, value in (kwargs or {}).items()})


def _in_double(value: Any) -> Any:
    low = (torch.float32, torch.float16, torch.bfloat16)
    return torch.float64 if isinstance(value, torch.dtype) and value in low else value


@contextlib.contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Compute everything in float64: new tensors too, and parameters that a class always makes in float32."""
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
    """Says in one line why an architecture cannot be folded, or could not be shown to be foldable."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture: its config, as published or as its class assumes, and the transformers class that builds it."""

    model_type: str
    config: Config
    model_class: str
    geometry: Geometry = Geometry()
    overrides: Mapping[str, Any] | None = None

    def toy_config(self) -> Any:
        """Return the config of the toy model."""
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[self.model_type].from_dict(
            shrink(self.config, self.geometry) | dict(self.overrides or {})
        )

    def with_geometry(self, **sizes: int) -> "Architecture":
        """Return the architecture with other toy sizes."""
        return replace(self, geometry=replace(self.geometry, **sizes))

    def build(self, seed: int = 0, device: str = "cpu") -> "PreTrainedModel":
        """Return a toy model with random weights in float64; on the device `meta`, its shapes only.

        Raises:
            Unproven: the class does not build at toy size.
        """
        try:
            model = _make(self.model_class, self.toy_config(), device)
        except Exception as error:  # a class may fail in any way on sizes that it was not made for
            raise Unproven(f"no toy model of it can be built: {type(error).__name__}: {_one_line(error)}") from error
        if device != "meta":
            randomize(model, seed)
        return model.eval().requires_grad_(False)


def _make(model_class: str, config: Any, device: str) -> "PreTrainedModel":
    import transformers

    code = trusted_code(config.model_type)
    made: Any = getattr(transformers, model_class) if code is None else code.model_class
    with quiet(), torch.device(device):
        return made._from_config(config, dtype=torch.float64, experts_implementation="eager")


def randomize(model: nn.Module, seed: int) -> None:
    """Draw every parameter: matrices scaled by fan-in, biases with standard deviation 0.3, gains around the old ones."""
    generator = torch.Generator().manual_seed(seed)
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        if id(parameter) not in looked_up:
            noise = _drawn(name, parameter.data, noise)
        parameter.data.copy_(noise)
    sharpen(model)


def sharpen(model: Model) -> Model:
    """Set the epsilons of norms to nearly zero (`EPSILON`)."""
    for module in model.modules():
        for epsilon in {"eps", "epsilon", "variance_epsilon"} & vars(module).keys():
            setattr(module, epsilon, EPSILON)
    return model


def _drawn(name: str, old: Tensor, noise: Tensor) -> Tensor:
    if name.endswith("bias"):
        return 0.3 * noise
    if old.ndim < 2:
        return old.nan_to_num() + 0.3 * noise.clamp(-2, 2)
    return noise * (LOGIT_SCALE if _QUERY_OR_KEY.search(name) else 1.0) / old.shape[-1] ** 0.5


def tokens(num_sequences: int = 2, length: int = 14, seed: int = 0) -> Int[Tensor, "sequence position"]:
    """Return random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (num_sequences, length), generator=generator)


def output_of(model: "PreTrainedModel") -> Tensor:
    """Return the model's logits or, if it has no head, its last hidden states."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    output = model(input_ids=tokens(), **options)
    return output.logits if "logits" in output else output.last_hidden_state


@torch.no_grad()
def logits(model: "PreTrainedModel") -> Float[Tensor, "sequence position vocabulary"]:
    """Return the model's output for random tokens, computed in float64 throughout.

    Raises:
        Unproven: the model fails.
    """
    try:
        with in_float64(model):
            return output_of(model)
    except Exception as error:  # as when it is built
        raise Unproven(f"its toy model does not run: {type(error).__name__}: {_one_line(error)}") from error


@dataclass(frozen=True, slots=True)
class ToyModel:
    """A toy model with the config and tensors that `save_pretrained` writes for it."""

    model: "PreTrainedModel"
    config: Config
    tensors: Mapping[str, Tensor]
    logits: Float[Tensor, "sequence position vocabulary"]

    @classmethod
    def of(cls, architecture: Architecture, seed: int = 0) -> "ToyModel":
        """Build a toy model of an architecture, and save it to see its files.

        Raises:
            Unproven: it does not build or run, or its logits are not finite.
        """
        model = architecture.build(seed)
        with tempfile.TemporaryDirectory(prefix="headfold-detect-") as directory, quiet():
            model.save_pretrained(directory)
            config = json.loads((Path(directory) / "config.json").read_text())
            tensors = load_file(Path(directory) / "model.safetensors")
        found = logits(model)
        if not torch.isfinite(found).all():
            raise Unproven("its toy model has logits that are not finite, so that changes cannot be observed")
        return cls(model, config, tensors, found)

    def on_disk(self, parameter: str) -> str:
        """Return the name under which a parameter is stored; if that is not its own, it is found by its values.

        Raises:
            Unproven: no tensor has these values, or several.
        """
        value = self.model.get_parameter(parameter)
        if parameter in self.tensors and torch.equal(self.tensors[parameter], value):
            return parameter
        same = [name for name, t in self.tensors.items() if t.shape == value.shape and torch.equal(t, value)]
        if len(same) != 1:
            raise Unproven(
                f"{parameter} is not stored as it is in the model; expected one tensor of the checkpoint with its values"
            )
        return same[0]
