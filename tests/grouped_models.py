"""Tiny random models as `fold` leaves them for headfold's runtime, with any groups in any layer."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from grades import assert_tight, assert_tight_through_float32_norms
from torch import Tensor

from headfold.runtime.modeling_headfold import grouped_class
from headfold.runtime.remote import BASE, auto_map
from headfold.verbs.export import export

HEADS, DIM, WIDTH, VOCABULARY, LAYERS = 6, 10, 60, 61, 2
EVEN, SHUFFLED, UNEVEN, OTHER, ONE = (
    (0, 0, 0, 1, 1, 1),
    (0, 1, 0, 1, 1, 0),
    (0, 0, 1, 0, 2, 1),
    (0, 1, 2, 0, 0, 0),
    (0,) * 6,
)
"""Query head → K/V head. `OTHER` has the largest group of all."""
THREE = (0, 0, 1, 1, 2, 2)

_SMALL = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=72,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
_GPTJ = dict(
    vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64, bos_token_id=1, eos_token_id=2
)
_NATIVE = "model.layers.{}.self_attn"


@dataclass(frozen=True, slots=True)
class Case:
    """A tiny model of one class, and where its sites lie."""

    model_class: str
    module: str = _NATIVE
    fields: Mapping[str, Any] = field(default_factory=dict)
    fused: str = ""

    def config(self, groups: Sequence[Sequence[int]], implementation: str) -> Any:
        small = _GPTJ if self.model_class.startswith("GPTJ") else _SMALL
        config = getattr(transformers, self.model_class).config_class(**{**small, **self.fields})
        config.headfold = {"sites": [self.site(layer, g) for layer, g in enumerate(groups)]}
        config._attn_implementation = implementation
        return config

    def site(self, layer: int, kv_of_query: Sequence[int]) -> dict[str, Any]:
        count = max(kv_of_query) + 1
        contiguous = list(kv_of_query) == [head * count // HEADS for head in range(HEADS)]
        return {
            "module": self.module.format(layer), "q": "q_proj", "k": "k_proj", "v": "v_proj",
            "heads": HEADS, "kv_heads": count, "head_dim": DIM,
            **({"fused": self.fused} if self.fused else {}),
            **({} if contiguous else {"kv_of_query": list(kv_of_query)}),
        }  # fmt: skip


_NEOX = dict(module="gpt_neox.layers.{}.attention", fused="query_key_value")
CASES = {
    "gpt_neox": Case("GPTNeoXForCausalLM", fields=dict(rotary_pct=0.4, hidden_dropout=0.1), **_NEOX),
    "gpt_neox-odd": Case("GPTNeoXForCausalLM", fields=dict(rotary_pct=0.61, rotary_emb_base=500, attention_bias=False,
        tie_word_embeddings=True, hidden_act="relu", layer_norm_eps=1e-2), **_NEOX),
    "gptj": Case("GPTJForCausalLM", "transformer.h.{}.attn", dict(rotary_dim=6)),
    "gptj-odd": Case("GPTJForCausalLM", "transformer.h.{}.attn", dict(rotary_dim=2, n_inner=44, activation_function="relu",
        layer_norm_epsilon=1e-2, tie_word_embeddings=True)),
    "llama": Case("LlamaForCausalLM", fields=dict(rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
    "llama-bias": Case("LlamaForCausalLM", fields=dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "mistral": Case("MistralForCausalLM", fields=dict(sliding_window=5, head_dim=DIM)),
    "mistral-full": Case("MistralForCausalLM", fields=dict(sliding_window=None)),
    "qwen2": Case("Qwen2ForCausalLM"),
    "qwen3": Case("Qwen3ForCausalLM", fields=dict(head_dim=DIM)),
    "serial": Case("GPTNeoXForCausalLM", fields=dict(use_parallel_residual=False), **_NEOX),
    "opt": Case("OPTForCausalLM", "model.decoder.layers.{}.self_attn", dict(ffn_dim=44, word_embed_proj_dim=WIDTH)),
    "seed_oss": Case("SeedOssForCausalLM", fields=dict(head_dim=DIM)),
}  # fmt: skip
PHI = ("gpt_neox", "gpt_neox-odd", "gptj", "gptj-odd")
DROPOUTS = {name: {0.0, 0.1} if name in ("gpt_neox", "seed_oss") else {0.0} for name in CASES}
EXACT_NORMS = frozenset(PHI)
"""The others' norms round to float32 on the way."""


def grouped(name: str, groups: Sequence[Sequence[int]], path: Path, dtype: torch.dtype = torch.float64) -> Any:
    """A random model as headfold's runtime runs it, saved as `fold` leaves it."""
    case = CASES[name]
    model = grouped_class(case.model_class)(case.config(groups, "headfold")).to(dtype).eval()
    torch.manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() == 1 else 2.0 / parameter.shape[-1] ** 0.5)
    model.config.architectures = [case.model_class]
    model.config.auto_map = auto_map(model.config.to_dict())
    model.save_pretrained(path)
    assert (path / f"{BASE}.py").is_file()
    (path / "README.md").write_text(
        "---\nlicense: mit\n---\n\n# tiny\n\nsmall\n\n## Use\n\noutdated\n\n## Made by\n\nme\n"
    )
    (path / "tokenizer.json").write_text("{}")
    return model


def tokens(length: int = 9) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(tokens() if ids is None else ids).logits


def opened(path: Path, **keywords: Any) -> Any:
    """As any user would, and every tensor has its place."""
    found = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True, **keywords)
    model, info = found
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def same(name: str) -> Callable[[Tensor, Tensor], None]:
    return assert_tight if name in EXACT_NORMS else assert_tight_through_float32_norms


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def both(name: str, groups: Sequence[Sequence[int]], path: Path, layout: str) -> tuple[Any, Any]:
    """A grouped model, and what its export is opened as with the code beside it."""
    model = grouped(name, groups, path / "folded")
    export(path / "folded", path / "out", layout=layout, verify=False)
    return model, opened(path / "out", trust_remote_code=True)


def padded_batch() -> dict[str, Tensor]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": tokens(), "attention_mask": mask}
