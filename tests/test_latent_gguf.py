"""A fold to MLA as a GGUF file: computed as llama.cpp computes it, by attention over latents, it gives the logits of the stock class."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from latent_models import RANK, ROTARY_DIM, disguised, statistics
from reference_llama_cpp import Gguf
from safetensors.torch import load_file, save_file
from test_gguf import byte_level
from tiny import VOCABULARY, stock_logits, tiny_tokens
from torch import Tensor

import headfold
from headfold.core.errors import UserError
from headfold.latent.rotation import frequencies, rotated
from headfold.serving.ask import Answer, Request, ask, installed, installed_here
from headfold.serving.engine import engine_named
from headfold.verbs.export import export

NOPE, HEADS = 8, 8


@pytest.fixture(scope="module")
def fold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("latent")
    source = disguised(place / "source", torch.float32)
    byte_level(source)
    stats = statistics(source, place / "s.safetensors")
    headfold.fold(source, place / "fold", to="mla", kv_rank=RANK, rope_dim=ROTARY_DIM, refit=False, stats=stats)
    return place / "fold"


class LatentGguf(Gguf):
    """The graph of deepseek2 with dense layers: one cached row per token, read by queries that are taken into the latent."""

    def attention(self, layer: int, x: Tensor) -> Tensor:
        block, rank = f"blk.{layer}", self.field("attention.kv_lora_rank")
        assert self.field("attention.q_lora_rank") == 0 and self.field("attention.head_count_kv") == 1
        assert self.field("leading_dense_block_count") == self.field("block_count")
        rotary, length = self.field("rope.dimension_count"), self.field("attention.key_length_mla")
        assert (self.field("attention.key_length"), self.field("attention.value_length")) == (rank + rotary, rank)
        turns = frequencies(self.field("rope.freq_base"), rotary)
        q = self.linear(f"{block}.attn_q", x).unflatten(-1, (-1, length)).transpose(1, 2)
        latent, key = self.linear(f"{block}.attn_kv_a_mqa", x).split([rank, rotary], -1)
        latent = self.norm(f"{block}.attn_kv_a_norm", latent)[:, None]
        absorbed = q[..., :-rotary] @ self.tensors[f"{block}.attn_k_b.weight"].mT
        q = torch.cat([absorbed, rotated(q[..., -rotary:], turns)], -1)
        scores = q @ torch.cat([latent, rotated(key, turns)[:, None]], -1).mT * length**-0.5
        mask = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        read = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ latent
        values = read @ self.tensors[f"{block}.attn_v_b.weight"].mT
        assert values.shape[-1] == self.field("attention.value_length_mla")
        return self.linear(f"{block}.attn_output", values.transpose(1, 2).flatten(2))

    @property
    def graph(self) -> Any:
        from reference_llama_cpp import Graph

        return Graph()


def test_a_file_computes_what_the_stock_class_computes(fold: Path, tmp_path: Path) -> None:
    said = export(fold, tmp_path / "out.gguf", layout="gguf")
    assert said.model_class == "deepseek2" and "a latent of 6 and a rotary key of 4" in said.description
    found = LatentGguf(tmp_path / "out.gguf")
    assert found.kinds["blk.0.attn_k_b.weight"] == "F32" and found.tensors["blk.0.attn_k_b.weight"].shape == (
        HEADS,
        RANK,
        NOPE,
    )
    expected = stock_logits(fold, tiny_tokens())
    assert (found.logits(tiny_tokens()) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", ["bf16", "f16", "q8_0", "q4_0", "q4_0-pure"])
def test_small_numbers_are_never_in_a_format_of_float16(kind: str, fold: Path, tmp_path: Path) -> None:
    export(fold, tmp_path / "out.gguf", layout="gguf", quantise=kind)
    found, written = LatentGguf(tmp_path / "out.gguf"), load_file(fold / "model.safetensors")
    for layer in range(2):
        name = f"blk.{layer}.attn_kv_a_mqa.weight"
        assert found.kinds[name] == "BF16" and found.kinds[f"blk.{layer}.ffn_gate.weight"] != "F32"
        rows = written[f"model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight"].double()
        assert (found.tensors[name] - rows).abs().max() <= 2**-8 * rows.abs().max()
        assert torch.equal(found.tensors[name][:RANK].float(), rows[:RANK].bfloat16().float())


def changed(fold: Path, path: Path, tensors: dict[str, Tensor] | None = None, **fields: Any) -> Path:
    path.mkdir()
    for file in fold.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((fold / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(load_file(fold / "model.safetensors") | tensors, path / "model.safetensors", {"format": "pt"})
    return path


REFUSED: dict[str, dict[str, Any]] = {
    "the one form that a fold to MLA is exported in": dict(layout="decilm"), "got none": dict(layout=None),
    "ends in .gguf": dict(out="out"), "expected one of f32, bf16": dict(quantise="q2"),
    "a low rank of queries, experts or biases": dict(fields={"first_k_dense_replace": 1}),
    "silu, got default and gelu": dict(fields={"hidden_act": "gelu"}),
    "got 1e-05 and rope_interleave True": dict(fields={"rms_norm_eps": 1e-5}),
    "got 1e-06 and rope_interleave False": dict(fields={"rope_interleave": False}),
    "expected a DeepseekV3ForCausalLM": dict(fields={"architectures": ["DeepseekV3ForSequenceClassification"]}),
    "expected shape": dict(fields={"kv_lora_rank": RANK + 1}),
    "got float16": dict(tensors={"model.norm.weight": torch.ones(64, dtype=torch.float16)}),
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_written_is_refused_in_one_line(said: str, fold: Path, tmp_path: Path) -> None:
    how = {"out": "out.gguf", "fields": {}, "tensors": None, "layout": "gguf", "quantise": None} | REFUSED[said]
    path = changed(fold, tmp_path / "changed", how["tensors"], **how["fields"])
    with pytest.raises(UserError, match=said) as refused:
        export(path, tmp_path / how["out"], layout=how["layout"], quantise=how["quantise"])
    assert "\n" not in str(refused.value) and "UserError" not in str(refused.value)
    assert not (tmp_path / how["out"]).exists()


def test_check_says_where_the_page_on_mla_is(fold: Path) -> None:
    with pytest.raises(UserError, match="got one with latents"):
        headfold.check(fold)


def test_what_is_there_is_kept(fold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(UserError, match="out.gguf"):
        export(fold, tmp_path / "out.gguf", layout="gguf")
    assert (tmp_path / "out.gguf").read_text() == "mine"
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'headfold\[gguf\]'"):
        export(fold, tmp_path / "other.gguf", layout="gguf")


@pytest.mark.skipif("llama-cpp" not in installed_here(), reason="llama-cpp-py-sync is not installed")
def test_llama_cpp_itself_continues_as_the_stock_class_does(fold: Path, tmp_path: Path) -> None:
    export(fold, tmp_path / "out.gguf", layout="gguf", quantise="f32")
    tokens = tiny_tokens(1)[0].tolist()
    answer = ask(installed(engine_named("llama-cpp")), tmp_path / "out.gguf", Request(tokens, 8, "", VOCABULARY))
    assert isinstance(answer, Answer), answer
    expected = stock_logits(fold, torch.tensor([tokens]))[0].log_softmax(-1)
    assert (answer.logits.log_softmax(-1) - expected).abs().max() < 1e-4 * expected.abs().max()
    for token in answer.greedy:
        assert token == int(stock_logits(fold, torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)
