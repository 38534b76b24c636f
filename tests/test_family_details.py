"""What single families need besides the laws: a module that several layers run, a table outside of the sites, languages, a missing head."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from grades import assert_bitwise, assert_differs, assert_tight
from safetensors.torch import load_file, save_file
from tiny import answer_of, stock_model, tiny_checkpoint, tiny_sample, tiny_sites, tiny_tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import headfold
from headfold.calibration import collect
from headfold.conversion.source import open_source
from headfold.core.errors import UserError
from headfold.corpus.pairs import encode_pairs
from headfold.corpus.sentences import encode_sentences
from headfold.families.context import context_length
from headfold.families.layout import check_shapes, write_heads
from headfold.hf_models.building import fitting_class
from headfold.planning import make_plan
from headfold.refine.blocks import recorded_calls
from headfold.refine.refit import refit
from headfold.runtime.regrouping import installed_heads
from headfold.surgery import query_order, site_heads, site_tensors

LAYERS = 3
"""Those of the tiny ALBERT, all one module."""


def words() -> PreTrainedTokenizerFast:
    letters = {letter: number for number, letter in enumerate(["<pad>", "<s>", "</s>", "?", *"abcdefghijklmnopqrst"])}
    made = Tokenizer(models.WordLevel(letters, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="?")


def test_what_a_repeated_module_sees_is_summed_over_its_layers() -> None:
    directory, sample = tiny_checkpoint("albert"), {"input_ids": tiny_tokens()}
    model, (site,) = stock_model(directory), [site for site, _ in tiny_sites(directory)]
    seen: list[torch.Tensor] = []
    model.get_submodule(site.paths["k"]).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].flatten(0, 1))
    )
    stats = collect(model, [site], sample)[site.name]
    assert len(seen) == LAYERS and stats.count == LAYERS * sample["input_ids"].numel()
    rows = torch.cat([torch.cat(seen), torch.ones(stats.count, 1, dtype=torch.float64)], 1)
    assert_tight(stats.tensors["second"], rows.T @ rows)


@torch.no_grad()
def test_the_calls_of_a_repeated_module_are_one_of_a_larger_batch() -> None:
    directory, sample = tiny_checkpoint("albert"), tiny_sample("albert", 4)
    model, (site,) = stock_model(directory), [site for site, _ in tiny_sites(directory)]
    ((_, (args, kwargs), output),) = recorded_calls(model, [site], sample)
    assert len(output) == LAYERS * 4
    attention, projected = model.get_submodule(site.module), []
    model.get_submodule(site.paths["o"]).register_forward_hook(lambda module, inputs, found: projected.append(found))
    attention(*args, **kwargs)
    assert_tight(projected[0], output)


def test_a_refit_suits_all_layers_that_run_a_module() -> None:
    directory, sample = tiny_checkpoint("albert"), tiny_sample("albert", 24)
    model, (site,) = stock_model(directory), [site for site, _ in tiny_sites(directory)]
    read = load_file(directory / "model.safetensors").__getitem__
    stats = collect(model, [site], sample)
    plan = make_plan([site], read, "1/2", source="tiny", merge="absorb", stats=stats)
    found = refit(
        model, [site], lambda one: site_heads(one, plan, read, stats), sample, order=lambda one: query_order(one, plan)
    )
    exact, errors = answer_of(model, sample), []
    for refits in (None, found):
        twin = stock_model(directory)
        parameters = dict(twin.named_parameters())
        tensors = site_tensors(site, plan, read, stats, refits, num_kv_heads=site.num_kv_heads)
        for name, tensor in tensors.items():
            parameters[site.parameters[name]].data.copy_(tensor)
        errors.append(float((answer_of(twin, sample) - exact).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_a_table_of_the_stack_moves_with_the_heads_and_comes_back() -> None:
    directory, sample = tiny_checkpoint("mpnet"), tiny_sample("mpnet")
    model, order = stock_model(directory), (*range(1, 8), 0)
    before, sites = answer_of(model, sample), tiny_sites(directory)
    assert [("bias_table" in site.weights) for site, _ in sites] == [True, False]

    def moved(with_table: bool) -> torch.Tensor:
        made = []
        for site, heads in sites:
            new = heads.reorder(order)
            new = replace(new, k=new.k[list(order)], v=new.v[list(order)], groups=heads.groups)
            tensors = write_heads(site, new)
            kept = {name: tensor for name, tensor in tensors.items() if with_table or "relative" not in name}
            made.append((site, kept, site.num_kv_heads, 1))
        with installed_heads(model, made):
            return answer_of(model, sample)

    assert_tight(moved(with_table=True), before)
    assert_differs(moved(with_table=False), before)
    assert_bitwise(answer_of(model, sample), before)


def as_published(directory: Path, out: Path) -> Path:
    """The tensors of the base model under the name of the class that was pretrained, as sentence-transformers saves an encoder."""
    shutil.copytree(directory, out)
    tensors = load_file(directory / "model.safetensors")
    base = {name.removeprefix("mpnet."): t.float() for name, t in tensors.items() if name.startswith("mpnet.")}
    pooler = {"pooler.dense.weight": torch.eye(40), "pooler.dense.bias": torch.zeros(40)}
    save_file({**base, **pooler}, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text()) | {"dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config))
    words().save_pretrained(out)
    return out


def test_a_base_model_under_the_name_of_a_pretrained_class_folds(tmp_path: Path) -> None:
    original = as_published(tiny_checkpoint("mpnet"), tmp_path / "original")
    assert json.loads((original / "config.json").read_text())["architectures"] == ["MPNetForMaskedLM"]
    source = open_source(original)
    assert source.checkpoint.config["architectures"] == ["MPNetModel"] == [fitting_class(source.checkpoint)]
    assert source.every_site[0].module == "encoder.layer.0.attention"
    texts = tmp_path / "texts.txt"
    letters = "abcdefghijklmnopqrst"
    texts.write_text("\n".join(" ".join(letters[n * k % 20] for k in range(3 + n % 9)) for n in range(1, 60)))
    result = headfold.fold(original, tmp_path / "fold", kv_heads=4, calibration=str(texts))
    assert result.verification is not None and result.verification.passed
    assert json.loads((tmp_path / "fold/config.json").read_text())["architectures"] == ["MPNetModel"]
    assert 0.5 < headfold.eval(tmp_path / "fold", reference=original, text=str(texts)).measured.cosine < 1


def test_a_class_whose_head_is_there_is_kept() -> None:
    for name in ("mpnet", "bert", "electra"):
        checkpoint = open_source(tiny_checkpoint(name)).checkpoint
        assert [fitting_class(checkpoint)] == checkpoint.config["architectures"]


def test_texts_may_be_filled_up_to_the_context() -> None:
    assert context_length({"model_type": "siglip", "text_config": {"model_type": "siglip_text_model"}}) == 64
    filled = encode_sentences(["a b", "c"], words(), 5, filled=True)
    assert filled["input_ids"].tolist() == [[4, 5, 0, 0, 0], [6, 0, 0, 0, 0]]
    assert bool(filled["attention_mask"].all())


def test_pairs_of_a_tokenizer_of_many_languages_need_the_second_named() -> None:
    tokenizer = SimpleNamespace(tgt_lang=None, name_or_path="nllb")
    with pytest.raises(
        UserError, match=r"^nllb/tokenizer_config\.json: expected src_lang and tgt_lang, .* got no tgt_lang"
    ):
        encode_pairs([("a", "b")], tokenizer, 8)


def test_rows_in_four_shards_are_quarters_of_heads() -> None:
    """By CodeGen's own arithmetic: the rows of head 5 of 8 are in the third shard."""
    ((site, heads), *_) = tiny_sites(tiny_checkpoint("codegen"))
    rows = load_file(tiny_checkpoint("codegen") / "model.safetensors")[site.tensor("qkv")]
    query, value, key = rows.view(4, -1, 48)[2].split(12)
    for tensor, found in ((heads.q, query), (heads.v, value), (heads.k, key)):
        assert_bitwise(tensor[5, :, :-1], found[6:])
    shapes = {site.tensor("qkv"): (108, 36), site.tensor("o"): (36, 36), site.input_norm: (36,)}
    with pytest.raises(UserError, match="expected a multiple of 4 heads, got 6"):
        check_shapes(replace(site, num_heads=6, num_kv_heads=6), shapes.__getitem__, "config.json")
