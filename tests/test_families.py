"""Laws of the family literals, over every family and every tiny model."""

import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from grades import assert_bitwise, assert_differs, assert_tight, assert_tight_through_float32_norms
from safetensors.torch import load_file
from tiny import FLOAT32_NORMS, FOREIGN, TINY, rewritten, stock_logits, stock_model, tiny_checkpoint, tiny_sites
from torch import Tensor

import headfold
from headfold.core.equivalents import random_equivalent, repeated_random_equivalent
from headfold.core.errors import UserError
from headfold.core.groups import Groups
from headfold.core.heads import Heads, KeyFreedom
from headfold.families import all_families, family_of
from headfold.families.folded import folded_config
from headfold.families.layout import check_shapes, planned_shapes, write_heads
from headfold.families.old_names import with_old_names
from headfold.families.spec import Attention, Family, Rope, Site, sites

EVERY_TINY = pytest.mark.parametrize("name", sorted(TINY))
FOLDABLE = {alias for family in all_families().values() if "*" not in family.refuses for alias in family.model_types}
NATIVE = {alias for alias in FOLDABLE if all(a.kv_heads for a in family_of({"model_type": alias}).attentions)}
"""Types whose stock class reads its count of K/V heads."""
DECODERS = {build().model_type for build in TINY.values()}


def grade(name: str) -> Callable[[Tensor, Tensor], None]:
    """How equal two float64 models of the same function are."""
    return assert_tight_through_float32_norms if name in FLOAT32_NORMS else assert_tight


source_logits = cache(stock_logits)


def some_grouped(heads: Heads, num_kv_heads: int) -> Heads:
    """Heads of the wanted shape; which function they compute does not matter."""
    shared = Groups.contiguous(heads.num_heads, num_kv_heads)
    gain = heads.k_gain if heads.k_gain is None or heads.k_gain.ndim == 1 else heads.k_gain[:num_kv_heads]
    return replace(heads, k=heads.k[:num_kv_heads], v=heads.v[:num_kv_heads], k_gain=gain, groups=shared)


def test_every_family_has_a_tiny_model() -> None:
    assert DECODERS < NATIVE
    assert FOLDABLE - DECODERS == {foreign.config().model_type for foreign in FOREIGN.values()}


@EVERY_TINY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_read_is_written_back_bit_by_bit(name: str, dtype: torch.dtype) -> None:
    directory = tiny_checkpoint(name, dtype)
    tensors = load_file(directory / "model.safetensors")
    for site, heads in tiny_sites(directory):
        written = write_heads(site, heads)
        assert {site.tensor(role) for role in site.weights if "norm" not in role} <= written.keys()
        for tensor_name, tensor in written.items():  # gains are float64 until they are stored
            assert_bitwise(tensor.to(dtype) if "_norm" in tensor_name else tensor, tensors[tensor_name])


@EVERY_TINY
def test_planned_shapes_are_the_shapes_written(name: str) -> None:
    directory = tiny_checkpoint(name)
    tensors = load_file(directory / "model.safetensors")
    for site, heads in tiny_sites(directory):
        for num_kv_heads in {heads.num_kv_heads, heads.num_kv_heads // 2, 1}:
            planned = planned_shapes(site, num_kv_heads, lambda tensor_name: tuple(tensors[tensor_name].shape))
            written = write_heads(site, some_grouped(heads, num_kv_heads))
            assert planned == {tensor_name: tuple(tensor.shape) for tensor_name, tensor in written.items()}


@EVERY_TINY
def test_the_site_is_where_the_stock_model_has_it(name: str) -> None:
    directory = tiny_checkpoint(name)
    modules = dict(stock_model(directory).named_modules())
    found = tiny_sites(directory)
    attention_paths = [path for path in modules if path.endswith("self_attn")]
    assert len(attention_paths) == len(found) == 2
    for path, (site, heads) in zip(attention_paths, found, strict=True):
        assert site.module == path
        assert modules[path].num_key_value_groups * heads.num_kv_heads == heads.num_heads
        claimed = {site.tensor(role) for role in site.weights}
        claimed |= {f"{site.weights[role]}.bias" for role in site.biases}
        assert claimed == {f"{path}.{parameter}" for parameter, _ in modules[path].named_parameters()}


@EVERY_TINY
def test_a_base_model_saved_alone_is_found_too(name: str, tmp_path: Path) -> None:
    stock_model(tiny_checkpoint(name)).base_model.save_pretrained(tmp_path)
    whole = tiny_sites(tiny_checkpoint(name))
    for (site, heads), (alone, alone_heads) in zip(whole, tiny_sites(tmp_path), strict=True):
        assert alone.weights == {role: weight.removeprefix("model.") for role, weight in site.weights.items()}
        assert alone.module == site.module.removeprefix("model.")
        assert alone.name == site.name
        for tensor in ("q", "k", "v", "o"):
            assert_bitwise(getattr(alone_heads, tensor), getattr(heads, tensor))


REQUIRED = {"ministral": {"head_dim": 128}, "nemotron": {"num_key_value_heads": 48}}
"""What the stock class does not build without."""


@pytest.mark.parametrize("model_type", sorted(DECODERS))
def test_a_config_without_the_optional_fields_means_what_its_class_assumes(model_type: str) -> None:
    import transformers

    required = REQUIRED.get(model_type, {})
    config = transformers.CONFIG_MAPPING[model_type](num_hidden_layers=1, vocab_size=128, pad_token_id=0, **required)
    with torch.device("meta"):
        tensors = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    kept = ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_size", *required)
    bare = {field: getattr(config, field) for field in kept}
    (site,) = sites(family_of(bare), bare, tensors)
    check_shapes(site, lambda name: tuple(tensors[name].shape), model_type)
    assert site.key_freedom.rotary_dim == int(site.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))


def test_null_key_value_heads_mean_one_per_query_head_and_not_the_default() -> None:
    directory = tiny_checkpoint("qwen2", num_attention_heads=4, num_key_value_heads=None)
    assert stock_model(directory).config.num_key_value_heads == 4
    config = json.loads((directory / "config.json").read_text()) | {"num_key_value_heads": None}
    tensors = load_file(directory / "model.safetensors")
    assert {site.num_kv_heads for site in sites(family_of(config), config, tensors)} == {4}


@EVERY_TINY
def test_attention_cannot_see_what_key_freedom_allows(name: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(name)
    equivalent = rewritten(source, tmp_path / "equivalent", lambda heads, index: random_equivalent(heads, index))
    for (_, old), (_, new) in zip(tiny_sites(source), tiny_sites(equivalent), strict=True):
        assert_differs(new.q, old.q)
        assert_differs(new.k, old.k)
        assert_differs(new.v, old.v)
    grade(name)(stock_logits(equivalent), source_logits(source))


def forbidden(freedom: KeyFreedom, head_dim: int) -> dict[str, KeyFreedom]:
    """Claims that would be wrong, so that the law above is known to be able to fail."""
    wrong = {"any matrix": KeyFreedom("any")}
    if freedom.rotary_dim > 2:
        wrong["other layout"] = replace(freedom, interleaved=not freedom.interleaved)
    if freedom.rotary_dim < head_dim and not freedom.interleaved:
        wrong["all dims rotate"] = replace(freedom, rotary_dim=head_dim)
    if freedom.normed:
        wrong["no norm"] = replace(freedom, kind="rope-halves")
    return wrong


@EVERY_TINY
def test_attention_sees_what_key_freedom_forbids(name: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(name)
    site = tiny_sites(source)[0][0]
    for claim, freedom in forbidden(site.key_freedom, site.head_dim).items():
        changed = rewritten(
            source,
            tmp_path / claim,
            lambda heads, index, f=freedom: random_equivalent(replace(heads, key_freedom=f), index),
        )
        assert_differs(stock_logits(changed), source_logits(source))


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gemma3_text", "exaone4", "olmo2", "olmoe"])
def test_gains_are_what_the_norm_multiplies_by(name: str) -> None:
    model = stock_model(tiny_checkpoint(name))
    for site, heads in tiny_sites(tiny_checkpoint(name)):
        x = torch.linspace(-1, 2, heads.q_gain.numel(), dtype=torch.float64)
        for role, gain in (("q_norm", heads.gain("q")), ("k_norm", heads.gain("k"))):
            expected = x / x.square().mean().sqrt() * gain.flatten()
            assert_tight_through_float32_norms(model.get_submodule(site.paths[role])(x).double(), expected)


@pytest.mark.parametrize("name", ["smollm3", "cohere2"])
def test_a_layer_without_position_leaves_k_any_matrix(name: str) -> None:
    assert [site.key_freedom.kind == "any" for site, _ in tiny_sites(tiny_checkpoint(name))] == [False, True]
    config = json.loads((tiny_checkpoint(name) / "config.json").read_text())
    tensors = load_file(tiny_checkpoint(name) / "model.safetensors")
    for field in ("no_rope_layers", "layer_types"):
        config.pop(field, None)
    assert all(site.key_freedom.rotary_dim for site in sites(family_of(config), config, tensors))


@EVERY_TINY
def test_a_grouped_source_equals_its_head_repeated_twin(name: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(name, num_key_value_heads=2)
    twin = rewritten(source, tmp_path / "twin", lambda heads, _: heads.expand(4))
    per_query = rewritten(source, tmp_path / "per-query", lambda heads, _: heads.per_query())
    copies = rewritten(source, tmp_path / "copies", lambda heads, index: repeated_random_equivalent(heads, 4, index))
    for other, num_kv_heads in ((twin, 4), (per_query, 8), (copies, 8)):
        assert {heads.num_kv_heads for _, heads in tiny_sites(other)} == {num_kv_heads}
        grade(name)(stock_logits(other), source_logits(source))


@EVERY_TINY
def test_query_heads_are_free_to_move_inside_their_group(name: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(name, num_key_value_heads=2)
    assert {site.query_order for site, _ in tiny_sites(source)} == {"free"}
    order = (5, 2, 7, 0, 3, 6, 1, 4)
    moved = rewritten(source, tmp_path / "moved", lambda heads, _: heads.reorder(order).standard())
    assert_differs(tiny_sites(moved)[0][1].q, tiny_sites(source)[0][1].q)
    grade(name)(stock_logits(moved), source_logits(source))


def test_random_equivalents_are_repeatable_and_differ_by_seed() -> None:
    heads = tiny_sites(tiny_checkpoint("llama"))[0][1]
    assert_bitwise(random_equivalent(heads, 3).k, random_equivalent(heads, 3).k)
    assert_differs(random_equivalent(heads, 3).k, random_equivalent(heads, 4).k)


@pytest.mark.parametrize("noun", [Family, Attention, Site, Rope])
def test_every_field_has_a_reader(noun: type) -> None:
    package = Path(headfold.__file__).parent
    source = "\n".join(path.read_text() for path in package.rglob("*.py"))
    for name in (field.name for field in fields(noun)):
        by_role = rf'"{name}"' if noun is Attention and len(name) <= len("bias_table") else r"(?!)"
        assert re.search(rf"\.{name}\b|{by_role}", source), f"{noun.__name__}.{name} has no reader"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"model_type": "llamma"}, r"unknown model_type 'llamma'; did you mean llama"),
    "unlike any": ({"model_type": "xyzzy"}, r"unknown model_type 'xyzzy'; choose one of albert, .* and [0-9]+ more"),
    "no type": ({"hidden_size": 8}, r"no model_type"),
    "wrapper": (
        {"model_type": "mllama", "text_config": {"model_type": "mllama_text_model"}},
        r"'mllama' wraps a 'mllama_text_model' .*save_pretrained",
    ),
    "remote code": (
        {"model_type": "mystery", "auto_map": {"AutoModel": "m.M"}},
        r"'mystery' runs its own code \(auto_map\)",
    ),
    "norm with a mean": (
        {"model_type": "persimmon"},
        r"persimmon cannot be folded exactly: the norm of each K head subtracts",
    ),
    "codes of sound": ({"model_type": "musicgen"}, r"musicgen cannot be folded exactly: its decoder reads codes"),
    "clipped experts": ({"model_type": "olmoe", "clip_qkv": 8.0}, r"olmoe with clip_qkv=8.0 cannot be folded exactly"),
    "clipped": ({"model_type": "olmo", "clip_qkv": 8.0}, r"olmo with clip_qkv=8.0 cannot be folded exactly: .*clamp"),
    "phi norm": ({"model_type": "phi", "qk_layernorm": True}, r"phi with qk_layernorm=True"),
    "stablelm norm": ({"model_type": "stablelm", "qk_layernorm": True}, r"stablelm with qk_layernorm=True"),
    "nested setting": (
        {"model_type": "mpt", "attn_config": {"clip_qkv": 6}},
        r"mpt with attn_config.clip_qkv=6 cannot be folded exactly: it clamps",
    ),
    "cross-attention": ({"model_type": "gpt2", "add_cross_attention": True}, r"gpt2 with add_cross_attention=True"),
    "cohere norm": ({"model_type": "cohere", "use_qk_norm": True}, r"cohere with use_qk_norm=True"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_cannot_be_folded_is_refused_in_one_line(case: str) -> None:
    config, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as refusal:
        family_of(config, "some/config.json")
    assert str(refusal.value).startswith("some/config.json: ") and "\n" not in str(refusal.value)


def test_settings_that_are_off_are_not_refused() -> None:
    for model_type, setting in (("olmo", "clip_qkv"), ("phi", "qk_layernorm"), ("cohere", "use_qk_norm")):
        assert family_of({"model_type": model_type, setting: None}) is family_of(
            {"model_type": model_type, setting: False}
        )


def test_known_families_are_folded_whatever_code_ships_with_them() -> None:
    assert family_of({"model_type": "phi3", "auto_map": {"AutoModel": "m.M"}}) is all_families()["phi3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_hidden_layers": 3},
            r"that are not in the checkpoint: model\.layers\.2\.self_attn\.q_proj\.weight.* and 1 more",
        ),
        ({"num_attention_heads": None}, r"num_attention_heads: expected a positive whole number, got None"),
        ({"num_key_value_heads": 3}, r"cannot split 8 K/V heads into 3"),
        ({"num_key_value_heads": "8"}, r"num_key_value_heads: expected a positive whole number, got '8'"),
        ({"head_dim": 16}, r"q_proj\.weight has shape \(64, 48\), expected \(128, 48\) from 8 query heads"),
        ({"num_key_value_heads": 4}, r"k_proj\.weight has shape \(64, 48\), expected \(32, 48\)"),
    ],
)
def test_a_config_that_does_not_fit_the_tensors_is_refused(change: dict[str, Any], message: str) -> None:
    config = json.loads((tiny_checkpoint("llama") / "config.json").read_text()) | change
    tensors = load_file(tiny_checkpoint("llama") / "model.safetensors")
    with pytest.raises(UserError, match=message):
        for site in sites(family_of(config), config, tensors, "ckpt"):
            check_shapes(site, lambda name: tuple(tensors[name].shape), "ckpt")


def test_folding_changes_one_number_of_the_config() -> None:
    config = json.loads((tiny_checkpoint("qwen2") / "config.json").read_text())
    sites = [site for site, _ in tiny_sites(tiny_checkpoint("qwen2"))]
    counts = {site.name: 2 for site in sites}
    assert folded_config(family_of(config), config, sites, counts) == with_old_names(config) | {
        "num_key_value_heads": 2
    }
