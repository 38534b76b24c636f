"""A model directory of CTranslate2: encoder-decoders (T5, BART, Marian, Whisper) and models of Llama's kind, with any groups.

A stack of CTranslate2 has one number of query heads, a layer its own number of K/V heads, in equal groups. Groups of different sizes are
filled up with zero query heads, and layers with zero K/V heads where their numbers do not divide. CTranslate2 repeats K/V heads before it
caches them: the weights of a fold are smaller, its cache is not. Rotary tables other than the plain one are written as one factor per
frequency. Tokens that generation_config.json forbids, as Marian's padding, get a bias of minus infinity.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.disk import disk_errors, require_space
from ...checkpoint.reader import Checkpoint
from ...checkpoint.staging import copy_side_files, wrong_output
from ...core.errors import UserError
from ...core.progress import Progress, counter
from ...ct2.comparison import difference_in_ct2
from ...ct2.decoders import llama, phi
from ...ct2.model import ACTIVATIONS, Model
from ...ct2.pairs import bart, t5, whisper
from ...ct2.tokens import forbidden, set_tokens, set_whisper, tokens_why_not, vocabulary
from ...hf_models import open_tokenizer
from ...runtime.load import load
from ...runtime.remote import BASE
from ..card import copy_plan_and_card
from ..ct2_heads import reordered, stacks
from ..folded import Folded, stock_config
from ..formats import EngineFormat, Written
from ..gguf_architectures import short_window


@dataclass(frozen=True, slots=True)
class Kind:
    """How the models of a type are described: by which function, for which class, with which activations."""

    describe: Callable[[Model], Any]
    model_class: str
    activation: str = "hidden_act"
    """The config field."""
    activations: Collection[str] = tuple(ACTIVATIONS)


KINDS: Mapping[str, Kind] = {
    "t5": Kind(t5, "T5ForConditionalGeneration", "dense_act_fn"),
    "mt5": Kind(t5, "MT5ForConditionalGeneration", "dense_act_fn"),
    "umt5": Kind(t5, "UMT5ForConditionalGeneration", "dense_act_fn"),
    "bart": Kind(bart, "BartForConditionalGeneration", "activation_function"),
    "mbart": Kind(bart, "MBartForConditionalGeneration", "activation_function"),
    "marian": Kind(bart, "MarianMTModel", "activation_function"),
    "whisper": Kind(whisper, "WhisperForConditionalGeneration", "activation_function", ("gelu",)),
    "llama": Kind(llama, "LlamaForCausalLM"),
    "mistral": Kind(llama, "MistralForCausalLM"),
    "qwen2": Kind(llama, "Qwen2ForCausalLM"),
    "qwen3": Kind(llama, "Qwen3ForCausalLM"),
    "gemma": Kind(llama, "GemmaForCausalLM"),
    "phi": Kind(phi, "PhiForCausalLM"),
}
NUMBER_TYPES = ("float32", "float16", "bfloat16", "int16", "int8", "int8_float32", "int8_float16", "int8_bfloat16")
CACHE = "CTranslate2 repeats K/V heads before it caches them: weights shrink, its cache does not"


def why_not(checkpoint: Checkpoint, source: Folded) -> str | None:
    """Return why CTranslate2 cannot run the fold as headfold does."""
    try:
        import ctranslate2  # noqa: F401
    except ImportError:
        return "the format needs ctranslate2: pip install 'headfold[ct2]'"
    kind, name = KINDS[source.model_type], source.config["architectures"][0].removeprefix("PerLayer")
    if name != kind.model_class:
        return f"expected the class {kind.model_class}, got {name}"
    config = stock_config(source)
    used = getattr(config, kind.activation)
    if used not in kind.activations:
        return f"CTranslate2 does not run {name} with the activation {used}"
    return _model_why_not(source, config) or _tokens_why_not(checkpoint, config)


def _model_why_not(source: Folded, config: Any) -> str | None:
    if source.entries:
        return _rotary_why_not(source, config)
    for name, layers in stacks(source).items():
        if source.model_type in ("t5", "mt5") and name.endswith(".self") and len({heads.slots for heads in layers}) > 1:
            return (
                f"expected groups of the same sizes in all layers of the {name.partition('.')[0]}, which share a table of biases by "
                "query head, got others; fold with equal groups"
            )
    if not getattr(config, "share_encoder_decoder_embeddings", True):
        return "expected one vocabulary for source and target, got two"
    return None


def _rotary_why_not(source: Folded, config: Any) -> str | None:
    rope = config.rope_parameters
    if any("slots" in site for site in (source.config.get("headfold") or {}).get("sites", [])):
        return (
            f"expected a rotary table for the larger head_dim, got {rope['rope_type']}; fold with --head-dim-multiple 1"
        )
    if short_window(config) is not None:
        return "CTranslate2 lets a prompt attend beyond its sliding window; use vLLM or transformers"
    if rope["rope_type"] == "dynamic" or rope.get("short_factor") != rope.get("long_factor"):
        return f"expected rotary frequencies that do not depend on the length, got {rope['rope_type']}"
    if rope["rope_type"] != "default" and rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"expected plain rotary frequencies where a share of a head is rotated, got {rope['rope_type']}"
    if getattr(config, "use_bidirectional_attention", None) or getattr(config, "qk_layernorm", None):
        return "CTranslate2 has neither bidirectional attention here nor norms of Q and K in a Phi"
    return None


def _tokens_why_not(checkpoint: Checkpoint, config: Any) -> str | None:
    tokenizer = open_tokenizer(checkpoint.path)
    return tokens_why_not(tokenizer, vocabulary(tokenizer, config.vocab_size), config)


def write(
    checkpoint: Checkpoint, source: Folded, path: Path, number_type: str | None, progress: Callable[[int, int], None]
) -> Written:
    """Write the model, its vocabulary, and the files of the tokenizer; all tensors are in memory."""
    total = sum(math.prod(info.shape) * info.dtype.itemsize for info in checkpoint.tensors.values())
    progress(0, total)
    opened, tokenizer = load(checkpoint.path), open_tokenizer(checkpoint.path)
    config, kind = stock_config(source), KINDS[source.model_type]
    tensors = {name: _held(name, tensor, number_type or "") for name, tensor in opened.state_dict().items()}
    heads = stacks(source, scaled=kind.describe is not t5)
    model = Model(source.family, config, heads, reordered(tensors, heads))
    spec = kind.describe(model)
    _forbid(spec.decoder, forbidden(opened.generation_config))
    set_tokens(spec, tokenizer, vocabulary(tokenizer, config.vocab_size), config)
    if source.model_type == "whisper":
        set_whisper(spec, config, opened.generation_config, model.heads["decoder.cross"])
    else:
        spec.config.layer_norm_epsilon = _epsilon(config)
    spec.validate()
    spec.optimize(quantization=number_type)
    size = sum(value.num_bytes() for value in spec.variables().values() if not isinstance(value, str))
    with disk_errors(path, size):
        require_space(path, size)
        spec.save(str(path))
    copy_side_files(checkpoint.path, path)
    (path / f"{BASE}.py").unlink(missing_ok=True)
    progress(total, total)
    said = f"{spec.name} of CTranslate2, numbers {number_type or 'as in the checkpoint'}: {model.said}; {CACHE}"
    rest = "all other tensors are the original's" if number_type is None else f"all tensors are {number_type}"
    copy_plan_and_card(checkpoint.path, path, f"{said}.", rest)
    return Written(spec.name, said)


def compare(checkpoint: Checkpoint, directory: Path, progress: Progress) -> tuple[float, float]:
    """Return the largest difference of logits or log probabilities from headfold's runtime, both in float32, and the tolerance.

    Raises:
        UserError: they differ by more; the output stays in `directory`.
    """
    advance = counter(progress, "verify", 1)
    difference, tolerance = difference_in_ct2(load(checkpoint.path, dtype=torch.float32), directory)
    advance(1)
    if not difference <= tolerance:
        raise wrong_output(
            directory,
            f"expected the logits of {checkpoint.path} within {tolerance:.2g} in CTranslate2, got a difference of {difference:.2g}",
        )
    return difference, tolerance


def _held(name: str, tensor: Tensor, number_type: str) -> Tensor:
    """Return a tensor in a dtype that CTranslate2 has.

    Raises:
        UserError: it is not finite, or overflows float16 where that is asked for.
    """
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    if not math.isfinite(largest):
        raise UserError(f"{name}: expected finite numbers, got NaN or infinity; fold again from good weights")
    if number_type.endswith("float16") and "bfloat16" not in number_type and largest > torch.finfo(torch.float16).max:
        raise UserError(f"{name}: expected numbers that float16 holds, got {largest:g}; use --quantise bfloat16")
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _epsilon(config: Any) -> float:
    """Return the epsilon of the norms; classes without such a field have torch's."""
    names = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")
    return float(next((getattr(config, name) for name in names if hasattr(config, name)), 1e-5))


def _forbid(decoder: Any, ids: list[int]) -> None:
    """Give tokens that are never said a bias of minus infinity."""
    if not ids:
        return
    projection = decoder.projection
    weight = projection.weight
    bias = projection.bias.clone() if projection.has_bias() else weight.new_zeros(len(weight))
    bias[ids] = -torch.inf
    projection.bias = bias


FORMAT = EngineFormat(
    name="ct2",
    suffix="",
    model_types=tuple(KINDS),
    number_types=NUMBER_TYPES,
    why_not=why_not,
    write=write,
    compare=compare,
)
