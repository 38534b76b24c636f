"""Laws of the format of CTranslate2: run by it, a directory computes what headfold's runtime computes."""

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import pytest
import torch
from grouped_models import CASES, EVEN, ONE, OTHER, SHUFFLED, THREE, UNEVEN, Case, config_of, grouped, tokens
from grouped_models import logits as logits_of
from tiny import FOREIGN, VOCABULARY, randomise, tiny_checkpoint
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import headfold
from headfold.checkpoint import staging
from headfold.checkpoint.cards import UNTOUCHED
from headfold.core.errors import AlreadyFinished, UserError
from headfold.exports.engines import ct2
from headfold.families import family_of
from headfold.families.spec import read_field
from headfold.runtime.modeling_headfold import grouped_class
from headfold.runtime.remote import auto_map
from headfold.verbs.export import ExportResult, export

GROUPS: dict[str, Sequence[int]] = {
    "equal": (0, 0, 0, 0, 1, 1, 1, 1),
    "four": (0, 0, 1, 1, 2, 2, 3, 3),
    "shuffled": (0, 1, 1, 0, 1, 0, 0, 1),
    "unequal": (0, 0, 0, 1, 2, 2, 1, 0),
    "one": (0,) * 8,
    "all": tuple(range(8)),
}
"""Query head → K/V head."""
WHISPER = ("<|endoftext|>", "<|startoftranscript|>", "<|nospeech|>", "<|notimestamps|>")
PAIRS = ("t5", "mt5", "umt5", "bart", "mbart", "marian", "whisper")


def words(directory: Path, size: int = VOCABULARY, last: Sequence[str] = (), **special: Any) -> None:
    """Save a tokenizer with a token for every id of the tiny models."""
    listed = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, size - len(last))), *last]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(listed)}, unk_token="<pad>"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | special
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(directory)


def pair(name: str, path: Path, names: Mapping[str, Sequence[str]], slots: int = 1, **fields: Any) -> Any:
    """A random encoder-decoder as `fold` leaves it, saved with a tokenizer; `names` are those of the groups by attention and layer."""
    found = FOREIGN[name]
    config = found.config(**fields)
    config.architectures = [found.model_class]
    plain, sites = config.to_dict(), []
    for attention in (family := family_of(plain)).attentions:
        heads = read_field(family, plain, attention.heads)
        for layer in range(read_field(family, plain, attention.layers)):
            chosen = names.get(attention.name.replace(".{layer}", ""), ["all"])
            kv_of_query = [group * heads // 8 for group in GROUPS[chosen[layer % len(chosen)]][:heads]]
            count, at = max(kv_of_query) + 1, attention.at.format(layer=layer)
            head_dim = (attention.head_dim and plain.get(attention.head_dim)) or plain["d_model"] // heads
            site = {"module": at, **{role: getattr(attention, role) for role in "qkv"}}
            site |= {"heads": heads, "kv_heads": count, "head_dim": head_dim}
            if kv_of_query != [head * count // heads for head in range(heads)]:
                site["kv_of_query"] = kv_of_query
            sites.append(site | ({"slots": slots, "o": f"{at}.{attention.o}"} if slots > 1 else {}))
    config.headfold = {"sites": sites}
    model = grouped_class(found.model_class)(config).eval()
    randomise(model, 0)
    model.config.auto_map = auto_map(model.config.to_dict())
    model.float().save_pretrained(path)
    words(path, last=WHISPER if name == "whisper" else ())
    return model


def exported(path: Path, **how: Any) -> ExportResult:
    """The result of exporting the fold in `path`, compared by the verb itself."""
    result = export(path / "fold", path / "out", layout="ct2", **how)
    assert result.difference is not None and 0 < result.difference <= result.tolerance
    return result


EQUAL = {"decoder.self": ["equal"], "decoder.cross": ["four"]}
FOLDS: dict[str, dict[str, Sequence[str]]] = {
    "equal": {"encoder.self": ["equal"], **EQUAL},
    "per layer": {"decoder.self": ["equal", "one"], "decoder.cross": ["four", "all"]},
    "shuffled": {"encoder.self": ["shuffled"], "decoder.self": ["shuffled"], "decoder.cross": ["four", "shuffled"]},
    "unequal": {"encoder.self": ["unequal"], "decoder.self": ["unequal"], "decoder.cross": ["unequal", "all"]},
}


ALIKE = ("mt5", "mbart")
"""Their groups are written by the same lines as those of T5 and BART."""


@pytest.mark.parametrize(
    ("name", "fold"), [(name, fold) for name in PAIRS for fold in FOLDS if name not in ALIKE or fold == "unequal"]
)
def test_a_pair_of_stacks_computes_what_the_runtime_computes(name: str, fold: str, tmp_path: Path) -> None:
    pair(name, tmp_path / "fold", FOLDS[fold])
    said = exported(tmp_path).description
    # No more heads than it takes: four in each of three groups.
    assert fold != "unequal" or "decoder.self 3 of 12; decoder.cross 3, 12 of 12" in said or name == "mt5"


@pytest.mark.parametrize("groups", [(EVEN, EVEN), (SHUFFLED, EVEN), (UNEVEN, OTHER), (EVEN, THREE), (OTHER, ONE)])
@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen3"])
def test_a_decoder_computes_what_the_runtime_computes(
    name: str, groups: Sequence[Sequence[int]], tmp_path: Path
) -> None:
    """The comparison is the test's own, of all logits, in another dtype."""
    model = grouped(name, groups, tmp_path / "fold")
    words(tmp_path / "fold")
    exported(tmp_path)
    ids = tokens(12)
    found = np.array(ctranslate2.Generator(str(tmp_path / "out")).forward_batch(ids.tolist()))
    expected = logits_of(model, ids)
    assert (torch.from_numpy(found) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["gemma", "phi", "mistral", "qwen2"])
def test_what_fold_writes_of_a_stock_class_is_read(name: str, tmp_path: Path) -> None:
    own = {"sliding_window": None} if name == "mistral" else {}
    folded(tiny_checkpoint(name, torch.float32, **own), tmp_path / "fold", kv_heads="1/2")
    assert "layers.self 4 of 8" in exported(tmp_path).description


def folded(source: Path, path: Path, **how: Any) -> None:
    """What `fold` writes, with a tokenizer."""
    headfold.fold(source, path, **{"merge": "mean", "group": "contiguous", "refit": False, "verify": False, **how})
    words(path)


def test_heads_of_several_slots_are_heads_of_a_larger_head_dim(tmp_path: Path) -> None:
    for name in PAIRS:
        pair(name, tmp_path / name / "fold", EQUAL, slots=2)
        exported(tmp_path / name)


@pytest.mark.parametrize(
    "table",
    [
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "linear", "factor": 3.0},
    ],
    ids=lambda table: table["rope_type"],
)  # fmt: skip
def test_any_table_of_frequencies_is_written(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = {"rope_theta": 500.0, **table}
    monkeypatch.setitem(CASES, "llama", Case("LlamaForCausalLM", fields={"rope_parameters": rope}))
    grouped("llama", [EVEN, UNEVEN], tmp_path / "fold")
    words(tmp_path / "fold")
    exported(tmp_path)


def test_wide_heads_are_written_with_their_table(tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint("llama", torch.float32), tmp_path / "source")
    words(tmp_path / "source")
    own = {"calibration": "self", "tokens": 512, "context": 32}
    folded(tmp_path / "source", tmp_path / "fold", kv_heads="1/4", head_dim_multiple=2, merge="absorb", **own)
    assert config_of(tmp_path / "fold")["rope_parameters"]["rope_type"] == "longrope"
    exported(tmp_path)


def test_greedy_translations_are_those_of_the_runtime(tmp_path: Path) -> None:
    """With the cache, and without padding, which Marian never says."""
    for name in ("t5", "bart", "marian"):
        model = pair(name, tmp_path / name / "fold", FOLDS["unequal"])
        generating(tmp_path / name / "fold", bad_words_ids=[[0], [4]])
        exported(tmp_path / name)
        model = headfold.load(tmp_path / name / "fold", dtype=torch.float32)
        ids = tokens(9)
        expected = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, num_beams=1)[:, 1:]
        translator = ctranslate2.Translator(str(tmp_path / name / "out"), compute_type="float32")
        found = translator.translate_batch(
            [as_words(row) for row in ids], beam_size=1, max_decoding_length=12, min_decoding_length=12
        )
        assert [item.hypotheses[0] for item in found] == [as_words(row) for row in expected]
        assert not {"<pad>", "w4"} & {word for item in found for word in item.hypotheses[0]}


def as_words(ids: torch.Tensor) -> list[str]:
    return [["<pad>", "<s>", "</s>"][number] if number < 3 else f"w{number}" for number in ids.tolist()]


def generating(path: Path, **fields: Any) -> None:
    """Set fields of generation_config.json as one that was written by hand has them."""
    changed(path / "generation_config.json", lambda c: (c.update(fields), c.pop("_from_model_config")))


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file."""
    contents = json.loads(path.read_text())
    change(contents)
    path.write_text(json.dumps(contents))


def test_a_wrong_head_is_found_and_the_output_kept_out_of_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ct2.reordered

    def wrong(tensors: Mapping[str, Any], stacks: Mapping[str, Any]) -> Any:
        """Give every query head to the one before it."""
        changed = right(tensors, stacks)
        for heads in (heads for layers in stacks.values() for heads in layers):
            name = f"{heads.names['q']}.weight"
            changed[name] = changed[name].roll(heads.head_dim, 0)
        return changed

    monkeypatch.setattr(ct2, "reordered", wrong)
    for name in ("t5", "bart", "whisper"):
        pair(name, tmp_path / name, EQUAL)
    grouped("llama", [EVEN, EVEN], tmp_path / "llama")
    words(tmp_path / "llama")
    for name in ("t5", "bart", "whisper", "llama"):
        with pytest.raises(UserError, match="in CTranslate2, got a difference of"):
            export(tmp_path / name, tmp_path / f"{name}-out", layout="ct2")
        assert not (tmp_path / f"{name}-out").exists() and (tmp_path / f"{name}-out.partial/model.bin").is_file()


def test_heads_that_follow_the_speech_are_named_by_their_place(tmp_path: Path) -> None:
    pair("whisper", tmp_path / "fold", {"decoder.cross": ["shuffled", "all"]})
    generating(tmp_path / "fold", alignment_heads=[[0, 3], [1, 5]])
    exported(tmp_path)
    # The second group is 1, 2, 4, 7; the first one 0, 3, 5, 6.
    assert config_of(tmp_path / "out")["alignment_heads"] == [[0, 1], [1, 5]]


def test_every_id_has_a_token_of_its_own(tmp_path: Path) -> None:
    """Ids that the tokenizer lacks are named, tokens without a row are left out, special ones that it lacks are others of its."""
    grouped("llama", [EVEN, EVEN], tmp_path / "fold")
    words(tmp_path / "fold", 50, bos_token=None, pad_token=None)
    exported(tmp_path)
    listed = json.loads((tmp_path / "out/vocabulary.json").read_text())
    assert listed[49:51] == ["w49", "<unused_50>"] and len(set(listed)) == len(listed) == VOCABULARY
    config = config_of(tmp_path / "out")
    assert config["unk_token"] == config["bos_token"] == config["eos_token"] == "</s>"
    words(tmp_path / "fold", 70)
    exported(tmp_path, force=True)
    assert len(json.loads((tmp_path / "out/vocabulary.json").read_text())) == VOCABULARY
    pair("whisper", tmp_path / "whisper/fold", EQUAL)
    words(tmp_path / "whisper/fold", 50, WHISPER)
    exported(tmp_path / "whisper")
    assert json.loads((tmp_path / "whisper/out/vocabulary.json").read_text())[49:52] == [
        "<|notimestamps|>",
        "<|0.00|>",
        "<|0.02|>",
    ]


def test_a_start_that_the_user_gives_is_compared_too(tmp_path: Path) -> None:
    pair("mbart", tmp_path / "fold", EQUAL, decoder_start_token_id=None)
    exported(tmp_path)
    assert config_of(tmp_path / "out")["decoder_start_token"] is None


@pytest.mark.parametrize("kind", ["int8", "float16", "int8_bfloat16", "float32"])
def test_quantised_models_are_smaller_and_load(kind: str, tmp_path: Path) -> None:
    pair("t5", tmp_path / "fold", EQUAL)
    result = export(tmp_path / "fold", tmp_path / "out", layout="ct2", quantise=kind)
    assert (result.difference is None) == (kind != "float32") and kind in result.description
    sizes = {"float32": 4, "int8": 1, "int8_float32": 1, "int8_float16": 1, "int8_bfloat16": 1}
    weights = sum(p.numel() for p in headfold.load(tmp_path / "fold").parameters())
    assert (tmp_path / "out/model.bin").stat().st_size < 1.35 * sizes.get(kind, 2) * weights + 12_000
    assert ctranslate2.Translator(str(tmp_path / "out")).score_batch([["w3", "w4"]], [["w5"]])


def test_the_files_of_the_tokenizer_are_beside_the_model_and_no_code(tmp_path: Path) -> None:
    pair("t5", tmp_path / "fold", EQUAL)
    (tmp_path / "fold/README.md").write_text(f"# it\n\n{UNTOUCHED}\n\n## Use\n\nold\n\n## Made by\n\nme\n")
    said = exported(tmp_path).description
    card = (tmp_path / "out/README.md").read_text()
    assert said in card.partition("## Use")[2] and "byte for byte" not in card
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.bin", "config.json", "shared_vocabulary.json", "tokenizer.json"} <= names
    assert not any(name.endswith(".py") for name in names)
    assert "decoder.self 2 of 8; decoder.cross 4 of 8" in said and "its cache does not" in said


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "table": (
        lambda path: pair("t5", path, {"decoder.self": ["unequal", "equal"]}), "same sizes in all layers of the decoder"
    ),
    "window": (lambda path: grouped("mistral", [EVEN, EVEN], path), "beyond its sliding window"),
    "activation": (lambda path: pair("bart", path, EQUAL, activation_function="tanh"), "with the activation tanh"),
    "speech": (lambda path: pair("whisper", path, EQUAL, activation_function="relu"), "with the activation relu"),
    "vocabularies": (
        lambda path: pair("marian", path, EQUAL, share_encoder_decoder_embeddings=False), "one vocabulary for source and target"
    ),
    "family": (lambda path: grouped("opt", [EVEN, EVEN], path), "expected one of t5"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_ctranslate2_would_compute_otherwise_is_refused(what: str, tmp_path: Path) -> None:
    make, said = REFUSED[what]
    make(tmp_path / "fold")
    assert said in refusal(tmp_path)


def refusal(path: Path, **how: Any) -> str:
    """What is said of the fold, in one line, before anything is written."""
    with pytest.raises(UserError) as raised:
        export(path / "fold", path / "out", layout="ct2", **how)
    assert "\n" not in str(raised.value)
    assert not list(path.glob("out*"))
    return str(raised.value)


def test_what_a_user_can_put_right_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair("t5", tmp_path / "fold", EQUAL)
    assert "expected one of float32, float16" in refusal(tmp_path, quantise="int4")
    changed(tmp_path / "fold/config.json", lambda config: config.update(decoder_start_token_id=VOCABULARY))
    assert "decoder_start_token_id with a token, got 61" in refusal(tmp_path)
    words(tmp_path / "fold", eos_token=None)
    changed(tmp_path / "fold/config.json", lambda config: config.update(eos_token_id=None))
    assert "a token that ends a text" in refusal(tmp_path)
    (tmp_path / "fold/tokenizer.json").write_text("{")
    said = refusal(tmp_path)
    assert "tokenizer.json: not valid JSON" in said and "config" not in said
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "fold" / file).unlink()
    assert "expected a tokenizer" in refusal(tmp_path)
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    assert "pip install 'headfold[ct2]'" in refusal(tmp_path)


def test_one_that_was_killed_at_its_very_end_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair("t5", tmp_path / "fold", EQUAL)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(staging, "_clear_up", killed)
        export(tmp_path / "fold", tmp_path / "out", layout="ct2", verify=False)
    with pytest.raises(AlreadyFinished):
        export(tmp_path / "fold", tmp_path / "out", layout="ct2", verify=False)
    assert (tmp_path / "out/model.bin").is_file() and not (tmp_path / "out" / staging.JOB).exists()
