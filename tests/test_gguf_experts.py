"""GGUF files of mixtures of experts: Qwen's are taken apart into a tensor for each expert, others are refused by name."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import one_line
from grades import assert_bitwise
from test_cli import run  # noqa: F401 (a fixture)
from test_sources import tensors_of
from tiny import VOCABULARY, stock_model, tiny_checkpoint, tiny_tokens
from tokenizers import pre_tokenizers

from headfold.core.errors import UserError
from headfold.sources.plain import open_plain

LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp", "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip
"""Names of a checkpoint and of llama.cpp."""
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def stacked(source: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint as llama.cpp's converter names and stacks them."""
    tensors, found = tensors_of(source), {}
    for name, tensor in tensors.items():
        _, _, number, rest = name.split(".", 3) if name.startswith("model.layers.") else ("", "", "", "")
        if not rest:
            found[TOP[name]] = tensor
        elif ".experts." not in rest:
            module, _, kind = rest.rpartition(".")
            found[f"blk.{number}.{LAYER[module]}.{kind}"] = (
                tensor.squeeze(0) if "shared_expert_gate" in rest else tensor
            )
        elif ".experts.0." in rest:
            every = [tensors[name.replace(".experts.0.", f".experts.{expert}.")] for expert in range(4)]
            found[f"blk.{number}.ffn_{rest.split('.')[3].removesuffix('_proj')}_exps.weight"] = torch.stack(every)
    return {name: tensor.numpy() for name, tensor in found.items()}


def written(path: Path, architecture: str, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A GGUF file as the gguf package writes it."""
    file = gguf.GGUFWriter(path, architecture)
    file.add_block_count(config["num_hidden_layers"])
    file.add_context_length(config["max_position_embeddings"])
    file.add_embedding_length(config["hidden_size"])
    file.add_feed_forward_length(config["intermediate_size"])
    file.add_head_count(config["num_attention_heads"])
    file.add_head_count_kv(config["num_key_value_heads"])
    file.add_key_length(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    file.add_layer_norm_rms_eps(config["rms_norm_eps"])
    file.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    file.add_vocab_size(VOCABULARY)
    file.add_expert_count(4)
    file.add_expert_used_count(2)
    file.add_expert_feed_forward_length(20)
    file.add_expert_shared_feed_forward_length(20)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 4]
    words = ["<pad>", "<s>", "</s>", *letters, letters[0] + letters[1]]
    file.add_tokenizer_model("gpt2")
    file.add_token_list(words)
    file.add_token_types([3] * 3 + [1] * (VOCABULARY - 3))
    file.add_token_merges([f"{letters[0]} {letters[1]}"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    for name, tensor in tensors.items():
        file.add_tensor(name, tensor)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def mixture(name: str, path: Path) -> tuple[Path, Path]:
    """A tiny mixture of experts, and its GGUF file."""
    source = tiny_checkpoint(name, torch.float32)
    config = json.loads((source / "config.json").read_text())
    return source, written(path / "tiny.gguf", name.replace("_", ""), config, stacked(source))


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
def test_experts_are_taken_apart(name: str, tmp_path: Path) -> None:
    """Under the names of published checkpoints, whatever transformers joins when it loads them; their sizes are read too."""
    source, file = mixture(name, tmp_path)
    plain = open_plain(str(file))
    found, expected = tensors_of(plain.path), tensors_of(source)
    assert {*found} == {*expected} and any(".experts.3.down_proj" in tensor for tensor in found)
    for tensor, values in expected.items():
        assert_bitwise(found[tensor], values)
    read = json.loads((plain.path / "config.json").read_text())
    assert read["moe_intermediate_size"] == 20 and 4 in (read.get("num_experts"), read.get("num_local_experts"))
    with torch.no_grad():
        logits = [stock_model(path, torch.float32)(tiny_tokens()).logits for path in (plain.path, source)]
    if name == "qwen2_moe":  # of Qwen 3, llama.cpp always normalises the weights of the experts; this config does not
        assert_bitwise(*logits)


def test_a_fold_of_experts_in_a_gguf_file(run: Any, tmp_path: Path) -> None:  # noqa: F811
    _, file = mixture("qwen3_moe", tmp_path)
    ran = run("fold", file, tmp_path / "out", "--kv-heads", "2", "--tokens", "512", "--context", "32")
    assert ran.code == 0 and "verified" in ran.out, ran.err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_key_value_heads"] == 2


def test_other_mixtures_are_refused_by_name(tmp_path: Path) -> None:
    """Mixtral has the architecture of Llama in GGUF files."""
    source = tiny_checkpoint("qwen2_moe", torch.float32)
    config = json.loads((source / "config.json").read_text())
    tensors = {name: array for name, array in stacked(source).items() if "shexp" not in name and ".bias" not in name}
    file = written(tmp_path / "mixtral.gguf", "llama", config, tensors)
    with pytest.raises(UserError) as error:
        open_plain(str(file))
    one_line(error, "mixtral.gguf: expected tensors that transformers reads from GGUF", "a mixture of 4 experts of the architecture llama",
             "such as Mixtral", "_exps.weight", "start from the checkpoint")  # fmt: skip


def test_experts_of_another_size_than_the_file_says_are_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen3_moe", torch.float32)
    config, tensors = json.loads((source / "config.json").read_text()), stacked(source)
    name = "blk.1.ffn_up_exps.weight"
    file = written(tmp_path / "tiny.gguf", "qwen3moe", config, tensors | {name: tensors[name][:, :10]})
    with pytest.raises(UserError) as error:
        open_plain(str(file))
    one_line(error, f"tiny.gguf: {name}: expected the shape (4, 20, 48)", "got (4, 10, 48)")
    assert [*(tmp_path / "cache").rglob("*.safetensors")] == []
