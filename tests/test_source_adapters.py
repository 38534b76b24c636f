"""A LoRA adapter is merged as peft merges it, and one that does not belong to the model is refused in one line."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import one_line
from grades import assert_bitwise, assert_tight
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import stock_model, tiny_checkpoint
from torch import Tensor
from wrapped_models import wrapped_checkpoint

import headfold
from headfold.checkpoint.reader import Checkpoint
from headfold.core.errors import UserError
from headfold.sources.plain import open_plain

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # which peft still reads
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def adapted(base: Path, out: Path, **how: Any) -> dict[str, Tensor]:
    """Save a random adapter of a model, and return the weights of the merged model as peft makes them."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, **how}
    model = get_peft_model(stock_model(base, torch.float64), LoraConfig(**settings))
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name or parameter.requires_grad:
            noise = torch.randn(parameter.shape, dtype=torch.float64)
            near = "magnitude" in name or "modules_to_save" in name
            parameter.data = parameter.data.double() * (1 + 0.1 * noise) if near else 0.3 * noise
    model.save_pretrained(out)
    return {name: tensor.detach() for name, tensor in model.merge_and_unload().state_dict().items()}


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 11, "o_proj": 3}}),
    "dora": ("llama", {"use_dora": True}),
    "whole modules": ("llama", {"modules_to_save": ["lm_head"]}),
    "biases": ("llama-bias-gqa", {"bias": "all"}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "transposed dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_is_merged_as_peft_merges_it(case: str, tmp_path: Path) -> None:
    name, how = ADAPTERS[case]
    base = tiny_checkpoint(name)
    expected = adapted(base, tmp_path / "adapter", **how)
    plain = open_plain(str(base), str(tmp_path / "adapter"))
    found, before = Checkpoint.open(plain.path), load_file(base / "model.safetensors")
    assert {*found.tensors} == {*before} and plain.origin == "the LoRA adapter adapter merged"
    changed = 0
    for tensor in before:
        read = found.read(tensor)
        assert_tight(read, expected[tensor])
        changed += not torch.equal(read, before[tensor])
    assert changed >= 3


PREFIX = "base_model.model."
OLD_NAMES = {
    "llava": {
        "model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.vision_model.",
        "lm_head.": "language_model.lm_head.",
    },
    "qwen2_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
}  # fmt: skip
"""What transformers called the modules of wrappers before version 4.52, as published checkpoints still do."""


@pytest.mark.parametrize("name", OLD_NAMES)
@pytest.mark.parametrize("names", ["old on disk", "new on disk", "old in the adapter"])
def test_an_adapter_of_a_wrapper(name: str, names: str, tmp_path: Path) -> None:
    """peft names modules as they run, in whichever version of transformers."""
    base = Path(shutil.copytree(wrapped_checkpoint(name), tmp_path / "base"))
    expected = adapted(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "qkv", "lm_head"])
    model = stock_model(base, torch.float64)
    before = {own: tensor.clone() for own, tensor in model.state_dict().items()}
    if names == "old on disk":
        assert not any("model.language_model" in own for own in load_file(base / "model.safetensors"))
    else:
        save_file(before, base / "model.safetensors")
    if names == "old in the adapter":
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        found = load_file(file)
        for new, old in OLD_NAMES[name].items():
            found = {key.replace(f"{PREFIX}{new}", f"{PREFIX}{old}"): tensor for key, tensor in found.items()}
        assert not any(f"{PREFIX}model.language_model" in key for key in found)
        save_file(found, file)
    merged = stock_model(open_plain(str(base), str(tmp_path / "adapter")).path, torch.float64).state_dict()
    assert {*merged} == {*expected}
    for own, tensor in expected.items():
        assert_tight(merged[own], tensor)
    changed = {own for own in before if not torch.equal(before[own], merged[own])}
    assert any("vis" in own for own in changed) and any("language_model" in own for own in changed)


def test_an_adapter_of_pickled_tensors(tmp_path: Path) -> None:
    base = tiny_checkpoint("llama")
    expected = adapted(base, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    found = Checkpoint.open(open_plain(str(base), str(tmp_path / "adapter")).path)
    assert_tight(found.read("lm_head.weight"), expected["lm_head.weight"])


def test_what_is_made_of_a_model_in_memory_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No later run would find it in the cache."""
    base, how = tiny_checkpoint("llama"), {"kv_heads": 2, "merge": "mean", "group": "contiguous", "refit": False}
    adapted(base, tmp_path / "adapter")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    headfold.fold(stock_model(base, torch.float64), tmp_path / "in memory", adapter=tmp_path / "adapter", **how)
    assert [*(tmp_path / "cache").rglob("*.safetensors")] == [] == [*(tmp_path / "temporary").iterdir()]
    headfold.fold(base, tmp_path / "directory", adapter=tmp_path / "adapter", **how)
    card = (tmp_path / "directory" / "README.md").read_text()
    assert f"This is `{base.name}` with the LoRA adapter `adapter` merged into it, and with 2 instead of" in card
    assert "attention are the original's as it was read (see below)." in card and "byte for byte" not in card
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("in memory", "directory"))
    assert {*found} == {*expected}
    for name in expected:
        assert_bitwise(found[name], expected[name])


def test_another_adapter_makes_another_checkpoint(tmp_path: Path) -> None:
    base = tiny_checkpoint("llama")
    adapted(base, tmp_path / "one")
    adapted(base, tmp_path / "two")
    places = [open_plain(str(base), str(tmp_path / name)).path for name in ("one", "two", "one")]
    assert places[0] == places[2] != places[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "adapter"
    adapted(tiny_checkpoint("llama"), out)
    return out


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / "adapter"))


def config(**fields: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = path / "adapter_model.safetensors"
        found = load_file(file)
        change(found)
        save_file(found, file)

    return apply


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def elsewhere(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """A module's matrices, for a layer that there is not."""
    names = (KEY, KEY.replace("_A", "_B"))
    return {name.replace("layers.0", "layers.7"): found[name].clone() for name in names}


SPOILT = {
    "no adapter": (lambda path: (path / "adapter_config.json").unlink(), ["adapter_config.json"]),
    "no weights": (lambda path: (path / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors", "got none"]),
    "another kind": (config(peft_type="IA3"), ["peft_type", "IA3", "merge_and_unload"]),
    "no alpha": (config(lora_alpha=None), ["lora_alpha", "got None"]),
    "a pattern that is none": (config(alpha_pattern={"(": 3}), ["alpha_pattern"]),
    "a base that was changed": (config(init_lora_weights="pissa"), ["init_lora_weights", "pissa"]),
    "layers that are repeated": (config(layer_replication=[[0, 2]]), ["layer_replication", "merge_and_unload"]),
    "a field of later days": (config(use_quantum=True), ["use_quantum"]),
    "half a pair": (tensors(lambda found: found.pop(KEY)), ["layers.0.self_attn.q_proj", "lora_A and lora_B"]),
    "nan": (tensors(lambda found: found[KEY].fill_(float("nan"))), [KEY, "NaN"]),
    "two ranks": (tensors(lambda found: found.update({KEY: torch.ones(3, 48)})), ["one rank", "(3, 48)"]),
    "another tuner's tensor": (tensors(lambda found: found.update({f"{KEY}.lora_C": torch.ones(1)})), ["lora_C"]),
    "modules of another model": (
tensors(lambda found: found.update(elsewhere(found))), ["layers.7.self_attn.q_proj", "lacks", "was made for"],
    ),
    "magnitudes of no dora": (config(use_dora=True), ["use_dora", "magnitude"]),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_an_adapter_that_is_not_merged_is_refused(case: str, adapter: Path, tmp_path: Path) -> None:
    spoil, words = SPOILT[case]
    spoil(adapter)
    with pytest.raises(UserError) as error:
        open_plain(str(tiny_checkpoint("llama")), str(adapter))
    one_line(error, *words)
    assert [*(tmp_path / "cache").rglob("*.safetensors")] == []


def test_an_adapter_of_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    """One of other shapes, as a fold has them; and nothing is left of what was written until then."""
    with pytest.raises(UserError) as error:
        open_plain(str(tiny_checkpoint("llama", num_key_value_heads=2)), str(adapter))
    one_line(error, "layers.0.self_attn.k_proj.weight", "(64, 48)", "(16, 48)", "not a fold of it")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("named", ["", "./nothing-here"])
def test_no_adapter_there(named: str) -> None:
    with pytest.raises(UserError) as error:
        open_plain(str(tiny_checkpoint("llama")), named)
    one_line(error, "--adapter")


def test_an_adapter_as_the_model_names_the_command(adapter: Path) -> None:
    base = tiny_checkpoint("llama")
    config(base_model_name_or_path=str(base))(adapter)
    with pytest.raises(UserError) as error:
        Checkpoint.open(open_plain(str(adapter)).path)
    one_line(error, f"headfold fold {base} OUT --adapter {adapter}")


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fold of the base of `adapter`."""
    out = tmp_path_factory.mktemp("folded") / "fold"
    how = {"kv_heads": 2, "merge": "mean", "group": "contiguous", "refit": False, "verify": False}
    headfold.fold(tiny_checkpoint("llama"), out, **how)
    return out


def test_an_adapter_of_the_fold_is_added(folded: Path, tmp_path: Path) -> None:
    merged = adapted(folded, tmp_path / "own")
    model, plain = (headfold.load(folded, dtype=torch.float64, **how) for how in ({"adapter": tmp_path / "own"}, {}))
    plain.load_state_dict(merged)
    tokens = torch.arange(12)[None]
    assert_tight(model(tokens).logits, plain(tokens).logits)


def test_an_adapter_of_the_original_is_not_added_to_its_fold(
    made: Path, adapter: Path, folded: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        headfold.load(folded, adapter=made)
    one_line(error, "k_proj", "(16, 48)", "(64, 48)", "headfold fold ORIGINAL OUT --adapter")
    adapted(tiny_checkpoint("llama"), tmp_path / "fitting", target_modules=["q_proj", "o_proj"])
    config(base_model_name_or_path=str(tiny_checkpoint("llama")))(tmp_path / "fitting")
    with pytest.raises(UserError) as error:
        headfold.load(folded, adapter=tmp_path / "fitting")
    one_line(error, "its original", "headfold fold ORIGINAL OUT --adapter")
    config(base_model_name_or_path="other")(tmp_path / "fitting")
    assert headfold.load(folded, adapter=tmp_path / "fitting")


def test_the_merged_weights_are_those_of_the_stream(made: Path) -> None:
    """In the dtype of the base."""
    base = tiny_checkpoint("llama", torch.float32)
    plain = Checkpoint.open(open_plain(str(base), str(made)).path)
    untouched = "model.layers.0.mlp.up_proj.weight"
    assert_bitwise(plain.read(untouched), load_file(base / "model.safetensors")[untouched])
    assert {info.dtype for info in plain.tensors.values()} == {torch.float32}
