"""Laws of the GGUF format by architecture: what is written of each family, and what is refused."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from grouped_models import CASES, EVEN, ONE, OTHER, SHUFFLED, THREE, UNEVEN, grouped, logits, tokens
from reference_llama_cpp import GRAPHS, Gguf
from safetensors.torch import load_file, save_file
from test_gguf import byte_level, changed, refusal
from tiny import tiny_checkpoint

import headfold
from headfold.core.errors import UserError
from headfold.exports.gguf_architectures import ARCHITECTURES
from headfold.serving.ask import installed
from headfold.serving.engine import engine_named
from headfold.verbs.check import check
from headfold.verbs.export import export

SQUARE = {"head_dim": 8, "hidden_size": 64}
LONG = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.5, 2.0, 4.0], "long_factor": [1.0, 1.5, 2.0, 4.0],
    "original_max_position_embeddings": 16}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "starcoder2": {"sliding_window": None}, "cohere": {"attention_bias": False, **SQUARE}, "nemotron": SQUARE,
    "gpt_neox": {"hidden_act": "gelu_new"},
}  # fmt: skip
"""Fields with which llama.cpp computes a tiny model of a type as transformers does."""
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, OWN.get(name, {})) for name in ARCHITECTURES if name not in ("llama", "mistral", "qwen2", "bert")},
    "phi3 with a share of each head": ("phi3", {"partial_rotary_factor": 0.75}),
    "phi3 with factors": ("phi3", {"rope_parameters": LONG}),
    "gpt_neox one after the other": ("gpt_neox", {"hidden_act": "gelu_new", "use_parallel_residual": False}),
    "gpt2 with a wide MLP": ("gpt2", {"n_inner": 72, "intermediate_size": 3}),
    "bloom with twelve heads": ("bloom", {"n_head": 12, "hidden_size": 48}),
}
JOINED = ("phi3", "gpt_neox", "gpt2", "bloom")
"""Types whose q, k and v are one tensor in the file."""


def source_of(form: str, path: Path, **fields: Any) -> Path:
    """A random original with a tokenizer."""
    name, own = FORMS[form]
    nested = {key: value for key, value in own.items() if isinstance(value, dict)}
    plain = {key: value for key, value in own.items() if key not in nested}
    shutil.copytree(tiny_checkpoint(name, torch.float32, **plain, **fields), path)
    changed(path / "config.json", lambda config: config.update(nested))
    byte_level(path)
    return path


def fold_of(source: Path, path: Path) -> Path:
    """Fold a model to half of its K/V heads."""
    headfold.fold(
        source,
        path,
        kv_heads="1/2",
        merge="mean",
        group="contiguous",
        refit=False,
        verify=False,
        layout="headfold",
    )
    return path


def exported(path: Path, out: Path) -> Gguf:
    """The file that is exported of a directory."""
    export(path, out, layout="gguf", quantise="f32")
    return Gguf(out)


@pytest.mark.parametrize("form", FORMS)
def test_every_architecture_computes_what_the_runtime_computes(form: str, tmp_path: Path) -> None:
    """As llama.cpp's graphs read the fields and tensors, which the test below finds by running them."""
    fold = fold_of(source_of(form, tmp_path / "source"), tmp_path / "folded")
    model, found = headfold.load(fold, dtype=torch.float64), exported(fold, tmp_path / "out.gguf")
    assert found.architecture == ARCHITECTURES[FORMS[form][0]].name and GRAPHS[found.architecture]
    assert found.field("attention.head_count") == 2 * found.field("attention.head_count_kv")
    assert (found.logits(tokens()) - logits(model)).abs().max() < 1e-5 * logits(model).abs().max()


@pytest.mark.parametrize("name", JOINED)
def test_an_original_is_written_too(name: str, tmp_path: Path) -> None:
    """Its q, k and v are one tensor on disk, with the rows of each head together in a GPT-NeoX and a BLOOM."""
    source = source_of(name, tmp_path / "source")
    model, found = headfold.load(source, dtype=torch.float64), exported(source, tmp_path / "out.gguf")
    assert found.field("attention.head_count") == found.field("attention.head_count_kv")
    assert (found.logits(tokens()) - logits(model)).abs().max() < 1e-5 * logits(model).abs().max()


def test_query_heads_are_sorted_by_their_groups_where_they_are_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["gpt_neox"]
    monkeypatch.setitem(
        CASES,
        "gpt_neox",
        case.__class__(case.model_class, case.module, {"hidden_act": "gelu_new", "rotary_pct": 0.4}, case.fused),
    )
    model = grouped("gpt_neox", [SHUFFLED, EVEN], tmp_path / "folded")
    byte_level(tmp_path / "folded")
    found = exported(tmp_path / "folded", tmp_path / "out.gguf")
    assert (found.logits(tokens()) - logits(model)).abs().max() < 1e-5 * logits(model).abs().max()


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_names_without_the_first_component(name: str, tmp_path: Path) -> None:
    """As the published checkpoints have them, with a mask beside the projections."""
    source = source_of(name, tmp_path / "source")
    old = load_file(source / "model.safetensors")
    new = {key.removeprefix("transformer."): tensor for key, tensor in old.items()}
    mask = {"h.0.attn.bias": torch.ones(1, 1, 4, 4)} if name == "gpt2" else {}
    save_file(new | mask, source / "model.safetensors", {"format": "pt"})
    fold = fold_of(source, tmp_path / "folded")
    assert not any(key.startswith("transformer.") for key in load_file(fold / "model.safetensors"))
    model, found = headfold.load(fold, dtype=torch.float64), exported(fold, tmp_path / "out.gguf")
    assert (found.logits(tokens()) - logits(model)).abs().max() < 1e-5 * logits(model).abs().max()


def test_joined_heads_and_positions_keep_their_bits(tmp_path: Path) -> None:
    source = source_of("gpt2", tmp_path / "source", hidden_size=64, num_attention_heads=4)
    fold = fold_of(source, tmp_path / "folded")
    export(fold, tmp_path / "out.gguf", layout="gguf", quantise="q4_0")
    kinds = Gguf(tmp_path / "out.gguf").kinds
    assert kinds["blk.0.attn_qkv.weight"] == "Q8_0" and kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["position_embd.weight"] == "F32"


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("phi3", {"sliding_window": 8}, "phi3 without its sliding window"),
        ("phi3", {"rope_parameters": {**LONG, "long_factor": [2.0] * 4}}, "do not depend on the length, got longrope"),
        ("phi3", {"hidden_act": "gelu"}, "phi3 has the activation silu only, got gelu"),
        ("gpt_neox", {"attention_bias": False}, "gptneox needs biases, got attention_bias false"),
        ("gpt_neox", {"hidden_act": "relu"}, "gptneox has the activation gelu only, got relu"),
        ("gpt2", {"scale_attn_weights": False}, "square root of head_dim, got scale_attn_weights false"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "for all layers, got scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"activation_function": "relu"}, "gpt2 has the activation gelu only, got relu"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "adds the residual before its norm"),
    ],
)  # fmt: skip
def test_settings_that_llama_cpp_would_read_as_others_are_refused(
    name: str, fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint(name, torch.float32), tmp_path / "folded")
    byte_level(tmp_path / "folded")
    changed(tmp_path / "folded/config.json", lambda config: config.update(fields))
    if "rope_parameters" in fields:
        changed(tmp_path / "folded/config.json", lambda config: config.pop("rope_scaling", None))
    assert said in refusal(tmp_path)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ((UNEVEN, UNEVEN), "has equal groups, and heads that fill the hidden size"),
        ((THREE, EVEN), "has one number of K/V heads for all layers, got 3, 2"),
        ((ONE, OTHER), "has one number of K/V heads for all layers, got 1, 3"),
    ],
)
def test_groups_that_these_architectures_do_not_have_are_refused(
    groups: Sequence[Sequence[int]], said: str, tmp_path: Path
) -> None:
    grouped("gpt_neox", groups, tmp_path / "folded")
    byte_level(tmp_path / "folded")
    assert said in refusal(tmp_path)


def listed(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """Change every site that a config lists."""

    def on(config: dict[str, Any]) -> None:
        for site in config["headfold"]["sites"]:
            change(site)

    return on


def test_slopes_by_head_leave_no_other_order(tmp_path: Path) -> None:
    fold_of(source_of("bloom", tmp_path / "source"), tmp_path / "folded")
    shutil.rmtree(tmp_path / "source")
    (tmp_path / "folded/plan.json").unlink()
    changed(tmp_path / "folded/config.json", listed(lambda site: site.update(kv_of_query=[0, 1, 2, 3] * 2)))
    assert "groups of neighbouring query heads" in refusal(tmp_path)


def test_heads_of_a_larger_head_dim_are_refused(tmp_path: Path) -> None:
    source = source_of("gpt2", tmp_path / "source")
    headfold.fold(source, tmp_path / "folded", kv_heads="1/4", head_dim_multiple=2, refit=False, verify=False,
        layout="headfold", calibration="self", tokens=256, context=16)  # fmt: skip
    shutil.rmtree(source)
    assert "fold with --head-dim-multiple 1" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["h.1.attn.c_proj.bias", "h.0.mlp.c_fc.weight", "wte.weight", "h.1.ln_1.weight"])
def test_a_missing_tensor_is_refused(name: str, tmp_path: Path) -> None:
    """llama.cpp may take a layer without a norm or a bias for one that has none."""
    fold = fold_of(source_of("gpt2", tmp_path / "source"), tmp_path / "folded")
    shutil.rmtree(tmp_path / "source")
    tensors = load_file(fold / "model.safetensors")
    del tensors[f"transformer.{name}"]
    save_file(tensors, fold / "model.safetensors", {"format": "pt"})
    assert "expected a tensor for" in refusal(tmp_path)
    save_file(tensors | {"transformer.wte.qzeros": torch.zeros(1)}, fold / "model.safetensors", {"format": "pt"})
    assert "has no such tensor" in refusal(tmp_path)


@pytest.mark.parametrize(
    "fields", [{"n_positions": -1}, {"n_head": 0}, {"n_layer": None}, {"n_embd": "x"}, {"n_head": 1.5}], ids=str
)
def test_odd_numbers_are_refused_in_one_line(fields: dict[str, Any], tmp_path: Path) -> None:
    source = source_of("gpt2", tmp_path / "folded")
    changed(source / "config.json", lambda config: config.update(fields))
    assert "\n" not in refusal(tmp_path)


def llama_cpp() -> Path:
    """A Python that has llama.cpp: this one, or that which LLAMA_CPP_PYTHON names."""
    python = Path(os.environ.get("LLAMA_CPP_PYTHON", sys.executable))
    try:
        installed(engine_named("llama-cpp"), python)
    except UserError:
        pytest.skip("no llama.cpp here: pip install llama-cpp-py-sync, or LLAMA_CPP_PYTHON names a Python that has it")
    return python


GELU_FROM_A_TABLE = 1e-6
"""Nats: llama.cpp looks GELU up in float16."""


@pytest.mark.parametrize("form", [form for form, (name, _) in FORMS.items() if name in JOINED])
def test_llama_cpp_computes_what_the_runtime_computes(form: str, tmp_path: Path) -> None:
    python = llama_cpp()
    fold = fold_of(source_of(form, tmp_path / "source", max_position_embeddings=128), tmp_path / "folded")
    (tmp_path / "text.txt").write_text("ABC12,=A" * 20)
    found = check(fold, engines={"llama-cpp": python}, text=tmp_path / "text.txt", tokens=60, new_tokens=16)
    (row,) = found.rows
    assert row.refused is None and row.found is not None and found.is_right
    assert row.found.num_same_greedy == 16 and row.found.same_tokens_of_text
    assert row.found.kl < (1e-11 if FORMS[form][0] == "phi3" else GELU_FROM_A_TABLE)
    assert row.kv_bytes_per_token == pytest.approx(found.kv_bytes_per_token, rel=0.2)


@pytest.mark.parametrize(("name", "written"), [("my-Phi-3-gqa", "my-phi 3-gqa"), ("other", "other")])
def test_the_name_of_a_model_moves_no_spaces(name: str, written: str, tmp_path: Path) -> None:
    """llama.cpp drops spaces after special tokens where the name says Phi 3, whatever the tokenizer does."""
    source = source_of("phi3", tmp_path / name)
    assert exported(source, tmp_path / "out.gguf").fields["general.name"] == written
    byte_level(source)

    def stripping(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["vocab"] |= {"<unk>": 59, "<|endoftext|>": 60}
        added = tokenizer["added_tokens"]
        added += [{**added[0], "id": n, "content": text} for text, n in (("<unk>", 59), ("<|endoftext|>", 60))]
        for token in added:
            token["rstrip"] = token["content"] in ("<pad>", "</s>")

    changed(source / "tokenizer.json", stripping)
    said = exported(source, tmp_path / "stripping.gguf").fields["general.name"]
    assert said == (name if "Phi-3" in name else f"phi-3 {name}")
    changed(source / "tokenizer.json", lambda t: t["added_tokens"][0].update(rstrip=False))
    with pytest.raises(UserError, match="the token </s> has rstrip"):
        exported(source, tmp_path / "third.gguf")
    assert json.loads((source / "config.json").read_text())["model_type"] == "phi3"
