"""Laws of the GGUF format: read as llama.cpp reads it, a file computes what headfold's runtime computes."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from grouped_models import CASES, EVEN, ONE, OTHER, SHUFFLED, THREE, UNEVEN, VOCABULARY, grouped, logits, tokens
from reference_llama_cpp import Gguf
from safetensors.torch import load_file, save_file
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from tiny import readable_checkpoint, tiny_checkpoint
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import headfold
from headfold.core.errors import UserError
from headfold.llama_cpp.tokens import BLOOM, GPT_2, LLAMA_3, QWEN_2
from headfold.verbs.export import export

LLAMA_3_TABLE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
LONG = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0] * 5, "long_factor": [2.0] * 5,
    "original_max_position_embeddings": 32}  # fmt: skip


def byte_level(directory: Path, split: Any = None, *, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """Save a byte-level tokenizer of the models' vocabulary, with two merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 5]
    words = ["<pad>", "<s>", "</s>", *alphabet, alphabet[0] + alphabet[1], alphabet[0] + alphabet[1] + alphabet[2]]
    merges = [(alphabet[0], alphabet[1]), (alphabet[0] + alphabet[1], alphabet[2])]
    made = Tokenizer(
        models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=merges, ignore_merges=ignore_merges)
    )
    made.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    found = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    found.save_pretrained(directory)
    return found


def written(path: Path, name: str, groups: Sequence[Sequence[int]], **how: Any) -> tuple[Any, Gguf]:
    """A grouped model, and the file that is exported of it."""
    model = grouped(name, groups, path / "folded")
    byte_level(path / "folded")
    export(path / "folded", path / "out.gguf", layout="gguf", **{"quantise": "f32", **how})
    return model, Gguf(path / "out.gguf")


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:  # noqa: F811
    """A model whose tokenizer is one of bytes."""
    path = tmp_path_factory.mktemp("source") / "readable"
    readable_checkpoint(path, tokenizer)
    return path


@pytest.mark.parametrize("groups", [(EVEN, EVEN), (SHUFFLED, EVEN), (UNEVEN, UNEVEN), (EVEN, THREE), (OTHER, ONE)])
@pytest.mark.parametrize("name", ["llama", "llama-bias", "mistral-full", "qwen2"])
def test_a_file_computes_what_the_runtime_computes(name: str, groups: Sequence[Sequence[int]], tmp_path: Path) -> None:
    model, found = written(tmp_path, name, groups)
    counts = {max(group) for group in groups}
    assert found.architecture == ("llama" if len(counts) == 1 else "deci")
    difference = (found.logits(tokens()) - logits(model)).abs().max()
    assert difference < 1e-5 * logits(model).abs().max()


@pytest.mark.parametrize("table", [LLAMA_3_TABLE, YARN], ids=["llama3", "yarn"])
def test_any_table_of_frequencies_is_written(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CASES, "llama", CASES["llama"].__class__("LlamaForCausalLM", fields={"rope_parameters": table}))
    model, found = written(tmp_path, "llama", (EVEN, THREE))
    assert "rope_freqs.weight" in found.tensors
    assert (found.logits(tokens()) - logits(model)).abs().max() < 1e-5 * logits(model).abs().max()


@pytest.mark.parametrize("budget", [False, True], ids=["one count", "per layer"])
def test_wide_heads_are_written(budget: bool, readable: Path, tmp_path: Path) -> None:
    """A fold that `fold` wrote, not one made up: the factors of its larger table come from the config."""
    plan = tmp_path / "plan.json"
    how: dict[str, Any] = {"kv_heads": "1/4"}
    stats = tmp_path / "stats.safetensors"
    headfold.calibrate(readable, stats, calibration="self", tokens=512, context=32)
    if budget:
        headfold.plan(readable, plan, kv_budget="38%", head_dim_multiple=2, stats=stats)
        how = {"plan": plan}
    else:
        how["head_dim_multiple"] = 2
    headfold.fold(readable, tmp_path / "fold", stats=stats, refit=False, layout="headfold" if budget else None, **how)
    # Readers that ignore the factors of the table are named: on the card, and by what the export says.
    card = (tmp_path / "fold/README.md").read_text()
    assert ("Not every reader: the rotary factors of heads" in card) == (not budget)
    export(tmp_path / "fold", tmp_path / "out.gguf", layout="gguf", quantise="f32")
    model, found = headfold.load(tmp_path / "fold", dtype=torch.float64), Gguf(tmp_path / "out.gguf")
    ids = torch.arange(24)[None] % model.config.vocab_size
    assert (found.logits(ids) - logits(model, ids)).abs().max() < 1e-5 * logits(model, ids).abs().max()


def test_transformers_reads_the_same_model(tmp_path: Path) -> None:
    model, _ = written(tmp_path, "llama", (EVEN, EVEN))
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float64)
    assert read.config.num_key_value_heads == 2
    assert (logits(read) - logits(model)).abs().max() < 1e-4 * logits(model).abs().max()


@pytest.mark.parametrize("layout", ["padded", "per-layer"])
def test_other_layouts_are_exported_again(layout: str, tmp_path: Path) -> None:
    """`fold` writes these by itself, so they are what a user has."""
    model = grouped("llama", [UNEVEN, UNEVEN if layout == "padded" else ONE], tmp_path / "folded")
    byte_level(tmp_path / "folded")
    export(tmp_path / "folded", tmp_path / "middle", layout=layout)
    export(tmp_path / "middle", tmp_path / "out.gguf", layout="gguf", quantise="f32")
    found = Gguf(tmp_path / "out.gguf")
    assert (found.logits(tokens()) - logits(model)).abs().max() < 1e-5 * logits(model).abs().max()


def test_shared_heads_keep_more_bits_than_the_rest(readable: Path, tmp_path: Path) -> None:
    headfold.fold(readable, tmp_path / "fold", kv_heads=2, merge="mean", group="contiguous", refit=False)
    for kind, others in {
        "q4_0": {"Q4_0"},
        "q4_0-pure": {"Q4_0"},
        "q8_0": {"Q8_0"},
        "bf16": {"BF16"},
        "f16": {"F16"},
    }.items():
        export(tmp_path / "fold", tmp_path / f"{kind}.gguf", layout="gguf", quantise=kind)
        found = Gguf(tmp_path / f"{kind}.gguf")
        matrices = {name: found.kinds[name] for name, tensor in found.tensors.items() if tensor.dim() > 1}
        wide = {name: kept for name, kept in matrices.items() if found.tensors[name].shape[-1] % 32 == 0}
        shared = {kept for name, kept in matrices.items() if name.split(".")[-2] in ("attn_k", "attn_v", "attn_output")}
        assert {kept for name, kept in wide.items() if name.split(".")[-2] in ("ffn_gate", "attn_q")} <= others
        assert kind != "q4_0" or shared <= {"Q8_0", "F16"}
        assert kind != "q4_0-pure" or shared <= {"Q4_0", "F16"}
        assert {found.kinds[name] for name, tensor in found.tensors.items() if tensor.dim() == 1} == {"F32"}


def test_tokens_and_what_they_are_for(tmp_path: Path) -> None:
    _, found = written(tmp_path, "llama", (EVEN, EVEN))
    fields = found.fields
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"]) == VOCABULARY and fields["tokenizer.ggml.tokens"][1] == "<s>"
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert len(fields["tokenizer.ggml.merges"]) == 2
    assert fields["tokenizer.ggml.bos_token_id"] == 1 and fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.ggml.add_bos_token"] is True


def split(pattern: str, *before: Any) -> Any:
    """The usual division of text: by a pattern, then into bytes."""
    from tokenizers import Regex

    return pre_tokenizers.Sequence(
        [
            *before,
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.mark.parametrize(
    ("division", "name"),
    [
        (split(LLAMA_3), "llama-bpe"),
        (split(QWEN_2), "qwen2"),
        (split(GPT_2), "gpt-2"),
        (split(BLOOM), "bloom"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]), "smollm"),
    ],
)  # fmt: skip
def test_divisions_of_text_have_the_names_of_llama_cpp(division: Any, name: str, tmp_path: Path) -> None:
    grouped("llama", [EVEN, EVEN], tmp_path / "folded")
    byte_level(tmp_path / "folded", division, ignore_merges=name == "llama-bpe")
    export(tmp_path / "folded", tmp_path / "out.gguf", layout="gguf")
    assert Gguf(tmp_path / "out.gguf").fields["tokenizer.ggml.pre"] == name


def test_sentencepiece_has_scores_in_the_order_of_merges(tmp_path: Path) -> None:
    grouped("llama", [EVEN, EVEN], tmp_path / "folded")
    words = ["<unk>", "<s>", "</s>", "<0x41>", "▁", "a", "b", "▁a", "ab", "▁ab"]
    made = Tokenizer(
        models.BPE(
            vocab={word: n for n, word in enumerate(words)}, merges=[("▁", "a"), ("a", "b"), ("▁a", "b")],
            unk_token="<unk>", byte_fallback=True,
        )
    )  # fmt: skip
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "folded")
    assert "space" not in export(tmp_path / "folded", tmp_path / "out.gguf", layout="gguf").description
    fields = Gguf(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is True
    assert fields["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 6, 1]
    score = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    assert score["▁a"] > score["ab"] > score["▁ab"] > score["a"]
    assert "tokenizer.ggml.merges" not in fields
    first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    changed(tmp_path / "folded/tokenizer.json", lambda t: t.update(normalizer=None, pre_tokenizer=first))
    said = export(tmp_path / "folded", tmp_path / "first.gguf", layout="gguf").description
    assert "llama.cpp puts a space after special tokens within a text" in said


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file."""
    contents = json.loads(path.read_text())
    change(contents)
    path.write_text(json.dumps(contents))


TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "normalizer": (lambda t: t.update(normalizer={"type": "Lowercase"}), "text is normalized"),
    "ignore_merges": (lambda t: t["model"].update(ignore_merges=True), "ignore_merges is other than in llama.cpp's gpt-2"),
    "suffix": (lambda t: t["model"].update(end_of_word_suffix="</w>"), "BPE has end_of_word_suffix"),
    "dropout": (lambda t: t["model"].update(dropout=0.5), "BPE has dropout"),
    "lstrip": (lambda t: t["added_tokens"][1].update(lstrip=True), "the token <s> has lstrip"),
    "two before": (lambda t: t["post_processor"]["single"].insert(0, t["post_processor"]["single"][0]), "more than one token"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_that_llama_cpp_would_read_as_others_are_refused(name: str, tmp_path: Path) -> None:
    grouped("llama", [EVEN, EVEN], tmp_path / "folded")
    byte_level(tmp_path / "folded")
    change, said = TOKENIZERS[name]
    changed(tmp_path / "folded/tokenizer.json", change)
    message = refusal(tmp_path)
    assert said in message and "llama.cpp would find other tokens" in message


def test_what_is_put_around_a_text_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    """AutoTokenizer does not read `add_bos_token` of tokenizer_config.json where tokenizer.json says something else."""
    grouped("llama", [EVEN, EVEN], tmp_path / "folded")
    byte_level(tmp_path / "folded")
    changed(tmp_path / "folded/tokenizer.json", lambda t: t.update(post_processor=None))
    changed(tmp_path / "folded/tokenizer_config.json", lambda t: t.update(add_bos_token=True, add_eos_token=True))
    export(tmp_path / "folded", tmp_path / "out.gguf", layout="gguf")
    fields = Gguf(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"] is False and fields["tokenizer.ggml.add_eos_token"] is False


def test_embeddings_that_differ_are_not_tied(tmp_path: Path) -> None:
    """As in transformers, whatever the config says; an architecture that ties none gets both."""
    model = grouped("llama", [EVEN, EVEN], tmp_path / "folded")
    byte_level(tmp_path / "folded")
    changed(tmp_path / "folded/config.json", lambda config: config.update(tie_word_embeddings=True))
    export(tmp_path / "folded", tmp_path / "out.gguf", layout="gguf", quantise="f32")
    assert (Gguf(tmp_path / "out.gguf").logits(tokens()) - logits(model)).abs().max() < 1e-5 * logits(model).abs().max()
    shutil.copytree(tiny_checkpoint("phi", torch.float32, tie_word_embeddings=True), tmp_path / "phi")
    byte_level(tmp_path / "phi")
    export(tmp_path / "phi", tmp_path / "phi.gguf", layout="gguf")
    found = Gguf(tmp_path / "phi.gguf")
    assert torch.equal(found.tensors["output.weight"], found.tensors["token_embd.weight"])


def test_numbers_stay_those_of_each_tensor(tmp_path: Path) -> None:
    grouped("llama", [EVEN, EVEN], tmp_path / "folded", torch.float32)
    byte_level(tmp_path / "folded")
    tensors = load_file(tmp_path / "folded/model.safetensors")
    half = {name: t.bfloat16() if "self_attn" in name else t for name, t in tensors.items()}
    save_file(half, tmp_path / "folded/model.safetensors", {"format": "pt"})
    export(tmp_path / "folded", tmp_path / "out.gguf", layout="gguf")
    kinds = Gguf(tmp_path / "out.gguf").kinds
    assert kinds["token_embd.weight"] == "F32" and kinds["blk.0.attn_k.weight"] == "BF16"
    half["model.norm.weight"][0] = torch.nan
    save_file(half, tmp_path / "folded/model.safetensors", {"format": "pt"})
    (tmp_path / "out.gguf").unlink()
    assert "model.norm.weight: expected finite numbers" in refusal(tmp_path)


def refusal(path: Path, out: str = "out.gguf", **how: Any) -> str:
    with pytest.raises(UserError) as found:
        export(path / "folded", path / out, **{"layout": "gguf", **how})
    assert not (path / out).exists() and {file.name for file in path.iterdir()} <= {"folded", ".out.gguf.headfold-lock"}
    return str(found.value)


def test_refusals_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grouped("llama", [EVEN, EVEN], tmp_path / "folded")
    assert "expected a tokenizer that tokenizers and gguf read, got Model missing" in refusal(tmp_path)
    for text in ("[" * 10_000, "null", '{"model": []}'):
        (tmp_path / "folded/tokenizer.json").write_text(text)
        assert "expected a tokenizer that tokenizers and gguf read" in refusal(tmp_path)
    byte_level(tmp_path / "folded", split(r"\d+"))
    assert "headfold knows no tokenizer of llama.cpp that divides text in this way" in refusal(tmp_path)
    byte_level(tmp_path / "folded")
    assert "expected a file name that ends in .gguf" in refusal(tmp_path, "out")
    assert "--quantise q2: expected one of f32, bf16, f16, q8_0, q4_0, q4_0-pure" in refusal(tmp_path, quantise="q2")
    assert "ct2, gguf, onnx with it; checkpoints keep their numbers" in refusal(tmp_path, layout=None, quantise="q8_0")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert "pip install 'headfold[gguf]'" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("mistral", {}, "without its sliding window"),
        ("llama", {"hidden_act": "gelu"}, "silu only, got gelu"),
        (
            "llama",
            {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.4}},
            "as a whole, got partial_rotary_factor 0.4",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            "without its sliding window",
        ),
        ("llama", {"rope_parameters": LONG}, "do not depend on the length, got longrope"),
        ("qwen3", {"attention_bias": True}, "qwen3 has no biases of attention, got attention_bias"),
        (
            "seed_oss",
            {},
            "bert, got seed_oss",
        ),
    ],
)
def test_models_that_llama_cpp_would_read_as_others_are_refused(
    name: str, fields: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    monkeypatch.setitem(CASES, name, case.__class__(case.model_class, fields={**case.fields, **fields}))
    grouped(name, [EVEN, EVEN], tmp_path / "folded")
    byte_level(tmp_path / "folded")
    assert said in refusal(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {**PLAIN, "rope_type": "never heard of"}}, {"rope_parameters": {**PLAIN, "rope_theta": None}},
        {"max_position_embeddings": None}, {"rms_norm_eps": None}, {"hidden_size": "60"}, {"bos_token_id": "x"},
    ],
)  # fmt: skip
def test_configs_that_no_class_reads_are_refused_in_one_line(fields: dict[str, Any], tmp_path: Path) -> None:
    grouped("llama", [EVEN, EVEN], tmp_path / "folded")
    byte_level(tmp_path / "folded")
    changed(tmp_path / "folded/config.json", lambda config: config.update(fields))
    assert "\n" not in refusal(tmp_path)


def test_fold_says_that_a_file_is_for_export(readable: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run headfold export FOLD OUT\.gguf --layout gguf"):
        headfold.fold(
            readable, tmp_path / "out", kv_heads=2, merge="mean", group="contiguous", refit=False, layout="gguf"
        )
    assert not (tmp_path / "out").exists()


def test_a_file_is_replaced_only_if_asked(tmp_path: Path) -> None:
    grouped("llama", [EVEN, EVEN], tmp_path / "folded")
    byte_level(tmp_path / "folded")
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(UserError, match="pass --force"):
        export(tmp_path / "folded", tmp_path / "out.gguf", layout="gguf")
    assert (tmp_path / "out.gguf").read_text() == "mine"
    assert export(tmp_path / "folded", tmp_path / "out.gguf", layout="gguf", force=True).model_class == "llama"
    assert json.loads((tmp_path / "folded/config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(("name", "told"), [("bert", True), ("roberta", True), ("vit", False), ("whisper", False)])
def test_the_config_of_a_bert_tells_llama_cpp_its_count(name: str, told: bool, tmp_path: Path) -> None:
    """Its own class has none; in a Whisper the same field would be read as the number of query heads."""
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint(name, torch.float32), source)
    headfold.fold(source, tmp_path / "fold", kv_heads="1/2", merge="mean", group="contiguous", refit=False)
    config, before = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("fold", "source"))
    field = "num_key_value_heads"
    assert config.get(field) == (before["num_attention_heads"] // 2 if told else before.get(field))
