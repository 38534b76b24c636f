"""A checkpoint opens the same whole or streamed, an overlay replaces what is stored, and refusals are one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from grades import assert_bitwise, assert_differs
from safetensors.torch import save_file
from tiny import TINY, stock_logits, stock_model, tiny_checkpoint, tiny_tokens
from torch import Tensor
from transformers.utils import logging

import headfold
from headfold import hf_models
from headfold.checkpoint.reader import Checkpoint
from headfold.core.errors import UserError
from headfold.hf_models.streamed import is_streamed

STREAMED = sorted(set(TINY) - {"mixtral", "granitemoe", "granitemoeshared", "olmoe", "qwen2_moe", "qwen3_moe"})
"""Models whose tensors on disk are the parameters of the module; experts are stacked on loading."""


@pytest.fixture
def headless(tmp_path: Path) -> Path:
    """A base model saved without its language-model head: names on disk lack the first component."""
    stock_model(tiny_checkpoint("llama")).model.save_pretrained(tmp_path)
    return tmp_path


def outputs(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        result = model(input_ids=tiny_tokens())
    return result.logits if "logits" in result else result.last_hidden_state


def stored(path: Path, part: str) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors if part in name}


@pytest.mark.parametrize("name", TINY)
def test_whole_is_what_transformers_itself_loads(name):
    path = tiny_checkpoint(name)
    model = hf_models.open_model(path)
    assert_bitwise(outputs(model), stock_logits(path))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float64) for name in STREAMED), ("llama", torch.float32), ("llama", torch.bfloat16)],
)
def test_streamed_is_bitwise_the_whole_model(name, dtype):
    path = tiny_checkpoint(name)
    streamed = hf_models.open_model(path, dtype=dtype, memory_limit=0)
    assert is_streamed(streamed)
    assert_bitwise(outputs(streamed), outputs(hf_models.open_model(path, dtype=dtype)))
    assert all(parameter.is_meta for parameter in streamed.parameters())  # nothing stays behind after the pass


def test_a_base_model_opens_whole_and_streamed(headless):
    whole, streamed = (hf_models.open_model(headless, memory_limit=limit) for limit in (None, 0))
    assert_bitwise(outputs(whole), stock_model(tiny_checkpoint("llama")).model(tiny_tokens()).last_hidden_state)
    assert_bitwise(outputs(streamed), outputs(whole))


def test_a_base_opens_from_a_checkpoint_with_a_head(tmp_path):
    """The other way round: the config names no causal model, names on disk have the component `model.` more."""
    shutil.copytree(tiny_checkpoint("llama"), tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, architectures=["LlamaModel"])
    whole, streamed = (hf_models.open_model(tmp_path, memory_limit=limit) for limit in (None, 0))
    assert type(whole).__name__ == "LlamaModel"
    assert_bitwise(outputs(streamed), outputs(whole))


def test_a_head_whose_base_was_saved_alone_finds_its_tensors(headless):
    """The config says causal, names lack `model.`, and the head is the embedding: what transformers resolves, so do we."""
    edit_config(headless, architectures=["LlamaForCausalLM"], tie_word_embeddings=True)
    assert_bitwise(*(outputs(hf_models.open_model(headless, memory_limit=limit)) for limit in (None, 0)))


@pytest.mark.parametrize("memory_limit", [None, 0])
@pytest.mark.parametrize("name", ["llama", "llama-bias-gqa", "phi3"])
def test_overlay_is_the_checkpoint_with_those_tensors(name, memory_limit, tmp_path):
    path = tiny_checkpoint(name)
    changed = {key: tensor.flip(0) for key, tensor in stored(path, "layers.1.self_attn").items()}
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    save_file(stored(path, "") | changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    overlaid = outputs(hf_models.open_model(path, overlay=changed, memory_limit=memory_limit))
    assert_bitwise(overlaid, stock_logits(tmp_path))
    assert_differs(overlaid, stock_logits(path))


def test_regrouped_experts_do_not_stream_and_say_so():
    with pytest.raises(UserError, match="regroups.*memory"):
        hf_models.open_model(tiny_checkpoint("mixtral"), memory_limit=0)


def test_memory_decides_unless_told(monkeypatch):
    path = tiny_checkpoint("llama")
    num_bytes = sum(tensor.nbytes for tensor in stored(path, "").values())
    for available, streamed in [
        (num_bytes / hf_models.MEMORY_SHARE + 8, False),
        (num_bytes / hf_models.MEMORY_SHARE - 8, True),
    ]:
        monkeypatch.setattr(hf_models, "available_memory", lambda device, available=available: int(available))
        assert is_streamed(hf_models.open_model(path)) == streamed


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_low_precision_is_computed_in_what_multiplies_faster(monkeypatch, faster):
    monkeypatch.setattr(hf_models, "product_seconds", lambda dtype: 0.01 if dtype == faster else 0.02)
    dtype, reason = hf_models.compute_dtype(torch.bfloat16)
    assert dtype == faster and "bfloat16" in reason and "10 ms" in reason and "20 ms" in reason
    assert hf_models.compute_dtype(torch.float16)[0] == (torch.float32 if faster == torch.float32 else torch.float16)
    assert hf_models.compute_dtype(torch.float64)[0] == torch.float64
    assert hf_models.compute_dtype(torch.bfloat16, "cuda")[0] == torch.bfloat16


def test_the_product_is_measured():
    assert 0 < hf_models.product_seconds(torch.float32) < 60


def test_stored_dtype_is_that_of_most_numbers(tmp_path):
    model = stock_model(tiny_checkpoint("llama"), torch.bfloat16)
    model.model.norm.float()
    model.save_pretrained(tmp_path)
    assert hf_models.stored_dtype(tmp_path) == torch.bfloat16


def test_memory_is_measured_in_bytes():
    assert 2**26 < hf_models.available_memory() < 2**50


def test_loading_is_quiet_and_puts_the_loggers_back(capfd):
    path, before = tiny_checkpoint("llama"), logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    capfd.readouterr()
    hf_models.open_model(path)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.WARNING, True)
    assert capfd.readouterr() == ("", "")
    logging.set_verbosity(before)


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("memory_limit", [None, 0])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, "its own code"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"num_hidden_layers": 3}, r"lacks: model.layers.2.*and \d+ more"),
        ({"model_type": "no-such-model"}, "no-such-model"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_line(changes, message, memory_limit, tmp_path):
    shutil.copytree(tiny_checkpoint("llama"), tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as refusal:
        hf_models.open_model(tmp_path, memory_limit=memory_limit)
    assert "\n" not in str(refusal.value)


def test_stock_code_is_used_where_a_checkpoint_brings_its_own_too(tmp_path):
    """As Phi-3's first checkpoints do."""
    shutil.copytree(tiny_checkpoint("llama"), tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, auto_map={"AutoModelForCausalLM": "modeling.Own"})
    assert type(hf_models.open_model(tmp_path)).__name__ == "LlamaForCausalLM"


def test_a_tensor_of_another_shape_than_the_config_says_is_named(tmp_path):
    shutil.copytree(tiny_checkpoint("llama"), tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, intermediate_size=7)
    with pytest.raises(UserError, match=r"mlp\.\w+_proj\.weight: expected shape \(.*7.*\) by the config, got"):
        hf_models.open_model(tmp_path)


@pytest.mark.parametrize("named", ["generation_config", "nowhere"])
def test_a_decoder_starts_from_a_token_that_its_config_does_not_name(named, tmp_path):
    """transformers 5 may save it beside the config, and T5 does not shift labels without it; a fold is verified all the same."""
    source = tmp_path / "t5"
    shutil.copytree(tiny_checkpoint("t5"), source)
    config = json.loads((source / "config.json").read_text())
    config["decoder_start_token_id"] = None
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").unlink(missing_ok=True)
    if named == "generation_config":
        (source / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 5}))
    assert hf_models.open_model(source).config.decoder_start_token_id == (
        5 if named == "generation_config" else config["pad_token_id"]
    )
    result = headfold.fold(source, tmp_path / "out", kv_heads=4, merge="mean", group="contiguous", refit=False)
    assert result.verification is not None and result.verification.passed


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected a tokenizer"):
        hf_models.open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(UserError, match="not valid JSON") as refusal:
        hf_models.open_tokenizer(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "meta", "hpu", "cpu:x", ""])
def test_a_device_that_is_none_is_refused_in_a_short_line(name):
    """Without the kinds of devices that torch can be built for."""
    with pytest.raises(UserError) as refusal:
        hf_models.check_device(name)
    said = str(refusal.value)
    assert "expected cpu, cuda" in said and f"got {name!r}" in said and len(said) < 120 and "\n" not in said
    assert hf_models.check_device("cpu") == "cpu" and hf_models.check_device(None) == hf_models.default_device()
