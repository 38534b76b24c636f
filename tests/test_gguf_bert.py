"""Laws of the GGUF format for a BERT: vectors of tokens, their pooling, and tokens of words."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_llama_cpp import Gguf
from safetensors.torch import load_file, save_file
from test_gguf import changed, refusal
from test_gguf_families import fold_of, llama_cpp
from tiny import tiny_checkpoint, tiny_tokens
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import headfold
from headfold.serving.engine import engine_named
from headfold.verbs.export import export

TEXTS = ("Hello, World! It is 5% of [that].", "Größe, naïve: Ελλάς Ёлка 中文，x", "a")
"""Texts with case, accents, punctuation and other scripts."""


def words(directory: Path) -> None:
    """Save a WordPiece tokenizer with the vocabulary of the tiny models."""
    whole = [*"helowrdits5%f[],.:!，中文xag", "hello", "it", "of"]
    parts = ["##" + part for part in (*"lowrdshatfeonv", "at", "ro")]
    known = list(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *whole, *parts]))[:61]
    made = Tokenizer(models.WordPiece({text: place for place, text in enumerate(known)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", known.index("[CLS]")), ("[SEP]", known.index("[SEP]"))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    ).save_pretrained(directory)  # fmt: skip


def sentence_encoder(directory: Path, mode: str, last: str = "Normalize") -> None:
    """Save what sentence-transformers reads beside a model."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Last": last}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens", "max_tokens")}
    (directory / "1_Pooling/config.json").write_text(json.dumps(modes))


def bert(path: Path, base: bool = True, **fields: Any) -> Path:
    """A fold of a BERT with a tokenizer of words, as a class without a head saves it or with one for masked words."""
    shutil.copytree(tiny_checkpoint("bert", torch.float32, hidden_act="gelu_new", **fields), path / "source")
    if base:
        model = headfold.load(path / "source").bert
        shutil.rmtree(path / "source")
        model.save_pretrained(path / "source")
    words(path / "source")
    fold = fold_of(path / "source", path / "folded")
    shutil.rmtree(path / "source")
    return fold


@pytest.mark.parametrize("base", [True, False])
def test_a_file_computes_the_vectors_of_the_runtime(base: bool, tmp_path: Path) -> None:
    fold = bert(tmp_path, base)
    export(fold, tmp_path / "out.gguf", layout="gguf", quantise="f32")
    found, model = Gguf(tmp_path / "out.gguf"), headfold.load(fold, dtype=torch.float64)
    assert found.architecture == "bert" and "output.weight" not in found.tensors
    assert (found.field("attention.head_count"), found.field("attention.head_count_kv")) == (8, 4)
    assert not {"cls.weight", "cls.bias"} & found.tensors.keys()
    with torch.no_grad():
        expected = (model if base else model.bert)(tiny_tokens()).last_hidden_state
    assert (found.vectors(tiny_tokens()) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_words_are_written_as_llama_cpp_looks_them_up(tmp_path: Path) -> None:
    """With a mark where a word begins, and none where it goes on."""
    export(bert(tmp_path), tmp_path / "out.gguf", layout="gguf")
    fields = Gguf(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.model"] == "bert"
    assert {"[CLS]", "▁hello", "at"} <= set(fields["tokenizer.ggml.tokens"])
    assert fields["tokenizer.ggml.bos_token_id"] == 2 and fields["tokenizer.ggml.seperator_token_id"] == 3
    assert fields["tokenizer.ggml.unknown_token_id"] == 1


@pytest.mark.parametrize(("mode", "number"), [("mean_tokens", 1), ("cls_token", 2)])
def test_the_pooling_of_a_sentence_encoder(mode: str, number: int, tmp_path: Path) -> None:
    fold = bert(tmp_path)
    export(fold, tmp_path / "plain.gguf", layout="gguf")
    assert "bert.pooling_type" not in Gguf(tmp_path / "plain.gguf").fields
    sentence_encoder(fold, mode)
    export(fold, tmp_path / "out.gguf", layout="gguf")
    assert Gguf(tmp_path / "out.gguf").field("pooling_type") == number
    (fold / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": mode.partition("_")[0]}))
    export(fold, tmp_path / "new.gguf", layout="gguf")
    assert Gguf(tmp_path / "new.gguf").field("pooling_type") == number


def test_norms_under_their_first_names(tmp_path: Path) -> None:
    """gamma and beta, as the first BERTs have them."""
    fold = bert(tmp_path)
    export(fold, tmp_path / "new.gguf", layout="gguf", quantise="f32")
    tensors = load_file(fold / "model.safetensors")
    renamed = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for name, t in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, fold / "model.safetensors", {"format": "pt"})
    export(fold, tmp_path / "old.gguf", layout="gguf", quantise="f32")
    new, old = Gguf(tmp_path / "new.gguf").tensors, Gguf(tmp_path / "old.gguf").tensors
    assert new.keys() == old.keys() and all(torch.equal(new[name], old[name]) for name in new)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    assert (
        "without its head over words"
        in export(bert(tmp_path, base=False), tmp_path / "out.gguf", layout="gguf").description
    )


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pooling": (lambda fold: sentence_encoder(fold, "max_tokens"), "among mean, cls for llama.cpp, got max_tokens; use headfold"),
    "dense": (lambda fold: sentence_encoder(fold, "mean_tokens", "Dense"), "expected a transformer and its pooling"),
    "nothing": (lambda fold: (fold / "modules.json").write_text("[]"), "and its pooling, got nothing; use"),
    "head": (
        lambda fold: changed(fold / "config.json", lambda c: c.update(architectures=["BertLMHeadModel"])),
        "has no head over words",
    ),
    "decoder": (lambda fold: changed(fold / "config.json", lambda c: c.update(is_decoder=True)), "got is_decoder"),
    "cased": (
        lambda fold: changed(fold / "tokenizer.json", lambda t: t["normalizer"].update(lowercase=False)),
        "text is not made lower case without accents",
    ),
    "division": (
        lambda fold: changed(fold / "tokenizer.json", lambda t: t.update(pre_tokenizer={"type": "Whitespace"})),
        "text is not divided as BERT does",
    ),
    "ends": (
        lambda fold: changed(fold / "tokenizer.json", lambda t: t.update(post_processor=None)),
        "texts are not between two special tokens",
    ),
    "task": (
        lambda fold: changed(fold / "config.json", lambda c: c.update(architectures=["BertForSequenceClassification"])),
        "a BERT without a task",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    fold = bert(tmp_path)
    change, said = REFUSED[name]
    change(fold)
    assert said in refusal(tmp_path)


def test_llama_cpp_computes_the_same_vectors_and_tokens(tmp_path: Path) -> None:
    python = llama_cpp()
    fold = bert(tmp_path)
    sentence_encoder(fold, "mean_tokens")
    export(fold, tmp_path / "out.gguf", layout="gguf", quantise="f32")
    (tmp_path / "request.json").write_text(json.dumps({"texts": TEXTS}))
    script, driver = Path(__file__).with_name("llama_cpp_embeddings.py"), engine_named("llama-cpp").driver
    command = [python, script, driver, tmp_path / "out.gguf", tmp_path / "request.json", tmp_path / "answer.npz"]
    subprocess.run([str(word) for word in command], check=True, env=os.environ, capture_output=True)
    answer, model = np.load(tmp_path / "answer.npz"), headfold.load(fold, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(fold)
    for place, text in enumerate(TEXTS):
        ids = tokenizer(text)["input_ids"]
        assert answer[f"tokens{place}"].tolist() == ids
        with torch.no_grad():
            expected = model(torch.tensor([ids])).last_hidden_state[0]
        for name, wanted in (("all", expected), ("pooled", expected.mean(0, keepdim=True))):
            difference = (torch.from_numpy(answer[f"{name}{place}"]) - wanted).norm() / wanted.norm()
            assert difference < 2e-3  # GELU from a table in float16
