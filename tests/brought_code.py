"""A tiny language model whose class lies beside its weights, in two files of code of its own, as models of the hub bring them."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONFIGURATION = """\
from transformers import PreTrainedConfig


class OwnConfig(PreTrainedConfig):
    model_type = "own_tiny"

    def __init__(self, vocab_size=7, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, **others):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.head_dim = others.pop("head_dim", hidden_size // num_attention_heads)
        self.max_position_embeddings = others.pop("max_position_embeddings", 64)
        super().__init__(**others)
"""
MODELING = """\
import os
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_own import OwnConfig

if "OWN_TINY_RAN" in os.environ:
    Path(os.environ["OWN_TINY_RAN"]).touch()


def rotated(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class OwnAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dim, size = config.head_dim, config.hidden_size
        self.q_proj = nn.Linear(size, config.num_attention_heads * self.dim, bias=False)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.dim, size, bias=False)

    def forward(self, hidden_states):
        batch, length, _ = hidden_states.shape
        q, k, v = (p(hidden_states).view(batch, length, -1, self.dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        frequency = 100.0 ** -(torch.arange(0, self.dim, 2, dtype=q.dtype, device=q.device) / self.dim)
        angle = torch.arange(length, dtype=q.dtype, device=q.device)[:, None] * frequency.repeat(2)
        q, k = (rotated(x, angle.cos(), angle.sin()) for x in (q, k))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        weights = (q @ k.transpose(2, 3) / self.dim**0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(batch, length, -1))


class OwnLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm, self.self_attn = nn.LayerNorm(config.hidden_size), OwnAttention(config)
        self.mlp = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.self_attn(self.norm(hidden_states))
        return hidden_states + self.mlp(hidden_states).tanh()


class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OwnLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids, **others):
        hidden_states = self.embed(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, labels=None, **others):
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids)))
"""
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModel": "modeling_own.OwnModel",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}


def own_checkpoint(place: Path, modeling: str = MODELING, **config: Any) -> Path:
    """Write a checkpoint with random weights, its code, a tokenizer of single letters, and a text beside it; return its directory."""
    place.mkdir(parents=True)
    (place / "configuration_own.py").write_text(CONFIGURATION)
    (place / "modeling_own.py").write_text(modeling)
    code = _module(place, "modeling_own")
    torch.manual_seed(0)
    model = code.OwnForCausalLM(code.OwnConfig(dtype="float32", **config))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape) * (1.5 if "q_proj" in name or "k_proj" in name else 1) / 7
    model.save_pretrained(place)
    written = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**written, "auto_map": AUTO_MAP}))
    words = {letter: number for number, letter in enumerate(["<s>", "<u>", "a", "b", "c", "d", "e"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<u>", bos_token="<s>").save_pretrained(place)
    (place.parent / "text.txt").write_text("abcdeedcbaacebd" * 60)
    return place


def _module(place: Path, name: str) -> ModuleType:
    """Import a file of the checkpoint as a part of a package, not by transformers."""
    package = f"own_tiny_{abs(hash(place))}"
    sys.modules[package] = ModuleType(package)
    sys.modules[package].__path__ = [str(place)]
    spec = importlib.util.spec_from_file_location(f"{package}.{name}", place / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
