"""Models with random weights and any number of K/V heads, of a named shape or a checkpoint's: what a fold will gain, before it is made.

Sizes are those of the published configs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.config import read_config_file
from ..checkpoint.reader import Checkpoint
from ..checkpoint.refusals import NO_CODE
from ..core.errors import UserError
from ..families import family_of
from ..families.folded import folded_config
from ..families.spec import sites
from ..hf_models import available_memory, named_class, quiet
from ..hf_models.building import library_errors, open_config
from ..runtime.load import own_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _llama(hidden: int, inner: int, layers: int, heads: int, vocabulary: int = 32000) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "max_position_embeddings": 1 << 17,
    }  # fmt: skip


def _t5(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 32128, "d_model": hidden,
        "d_kv": 64, "d_ff": inner, "num_layers": layers, "num_decoder_layers": layers, "num_heads": heads,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "is_encoder_decoder": True,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def _gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 1 << 15,
        "n_embd": hidden, "n_layer": layers, "n_head": heads,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "attention": {**_llama(512, 64, 2, 32, 256), "head_dim": 128},
    "llama-2-7b": _llama(4096, 11008, 32, 32),
    "llama-2-13b": _llama(5120, 13824, 40, 40),
    "t5-large": _t5(1024, 2816, 24, 16),
    "t5-xl": _t5(2048, 5120, 24, 32),
    "t5-xxl": _t5(4096, 10240, 24, 64),
    "gpt2-xl": _gpt2(1600, 48, 25),
}
"""Published MHA models (T5 as in version 1.1; positions extended, so that any context can be timed), and `attention`: two layers with
little else than attention in them.
"""

BLOCK = 1 << 16
LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers",
)  # fmt: skip
"""Names of the number of layers in configs."""


def shape_config(shape: str, *, layers: int | None = None) -> dict[str, Any]:
    """Return the config of a named shape or of a checkpoint directory, reduced to `layers` layers.

    Raises:
        UserError: neither a name nor a directory with a config.json; more layers than it has.
    """
    file = Path(shape) / "config.json"
    if shape not in SHAPES and not file.is_file():
        raise UserError(
            f"{shape}: expected a directory with a config.json or one of the shapes {', '.join(SHAPES)}; got neither"
        )
    config = dict(SHAPES[shape]) if shape in SHAPES else _read(file)
    named = [name for name in LAYERS if isinstance(config.get(name), int)]
    if layers is not None and not named:
        raise UserError(f"{file}: expected a count of layers ({', '.join(LAYERS)}), found none; leave --layers out")
    for name in named:
        if layers is None:
            break
        if not 1 <= layers <= config[name]:
            raise UserError(f"{shape}: expected 1 to {config[name]} layers, got {layers}")
        config[name] = layers
        config.pop("layer_types", None)
    return config


def _read(file: Path) -> dict[str, Any]:
    config = read_config_file(file)
    if own_class(config, file) is None:
        named_class(config, str(file))
    return config


def random_model(
    config: Mapping[str, Any],
    kv_heads: int | None,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    like: "PreTrainedModel | None" = None,
    where: str = "shape",
) -> "PreTrainedModel":
    """Return a model of this config with `kv_heads` K/V heads at every decoder site (None: its own) and arbitrary weights.

    Parameters of the same size as those of `like`, another such model, are shared with it.

    Raises:
        UserError: an architecture that headfold does not know, or a count that does not divide its heads.
    """
    import transformers
    from transformers.initialization import no_init_weights

    config = dict(config) if kv_heads is None else _grouped(config, kv_heads, where)
    model_class = own_class(config) or getattr(transformers, config["architectures"][0])
    if like is None:
        _require_memory(model_class, config, dtype, device, where)
    with quiet(), no_init_weights(), torch.device(device):
        made = model_class._from_config(open_config(config, where, model_class.config_class), dtype=dtype)
    known = {} if like is None else dict(like.named_parameters())
    for path, module in made.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            shared = known.get(f"{path}.{name}")
            if shared is not None and shared.shape == parameter.shape:
                setattr(module, name, shared)
            else:
                _fill(parameter.data)
    made.tie_weights()
    return made.eval()


def _require_memory(model_class: Any, config: Mapping[str, Any], dtype: torch.dtype, device: str, where: str) -> None:
    with quiet(), torch.device("meta"):
        sizes = [p.numel() for p in _built(model_class, config, where).parameters()]
    needed, free = sum(sizes) * dtype.itemsize, available_memory(device)
    if needed > free:
        raise UserError(
            f"{where}: its weights take {needed / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free; give fewer --layers"
        )


def _fill(parameter: Tensor) -> None:
    """Fill a parameter with numbers of a usual size, quickly, by repeating one block; gains and biases are 1."""
    if parameter.dim() == 1:
        parameter.fill_(1)
        return
    flat = parameter.view(-1)
    block = torch.randn(min(BLOCK, flat.numel()), device=flat.device).to(flat.dtype) * parameter.shape[-1] ** -0.5
    whole = flat.numel() // len(block) * len(block)
    flat[:whole].view(-1, len(block)).copy_(block)
    flat[whole:].copy_(block[: flat.numel() - whole])


def _grouped(config: Mapping[str, Any], kv_heads: int, where: str) -> dict[str, Any]:
    """Return the config of a fold to so many K/V heads, in equal groups of neighbours."""
    family = family_of(dict(config), where, NO_CODE)
    found = sites(family, config, _tensors(config, where), where)
    decoding = [site for site in found if site.stack != "encoder"] or found
    for site in decoding:
        if not 1 <= kv_heads <= site.num_kv_heads or site.num_kv_heads % kv_heads:
            raise UserError(
                f"{where}: expected a count of K/V heads that divides its {site.num_kv_heads}, got {kv_heads}; choose another"
            )
    return folded_config(family, config, decoding, {site.name: kv_heads for site in decoding})


def _tensors(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return tensors by name: those on disk, or those that the stock class of a named shape would save."""
    if where not in SHAPES and list(Path(where).glob("*.safetensors")):
        return Checkpoint.open(Path(where)).tensors
    import transformers

    model_class = getattr(transformers, config["architectures"][0])
    with quiet(), torch.device("meta"):
        return _built(model_class, config, where).state_dict()


def _built(model_class: Any, config: Mapping[str, Any], where: str) -> Any:
    opened = open_config(config, where, model_class.config_class)
    with library_errors(where, "transformers cannot build this model", "correct config.json"):
        return model_class(opened)
