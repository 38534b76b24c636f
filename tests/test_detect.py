"""Detection, which looks at no literal, finds those that were written by hand; lies about a family are caught."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_checkpoint
from typer.testing import CliRunner

import headfold.cli
import headfold.detection
import headfold.families
from headfold.core.errors import UserError
from headfold.detection import Detection, architecture_of, detect, prove, source_of
from headfold.detection.laws import prove_laws
from headfold.detection.shrink import Geometry, shrink
from headfold.detection.toy import Unproven
from headfold.families import family_of
from headfold.families.spec import Attention, Family, Rope, sites
from headfold.verbs import detect as verb

ROOT = Path(__file__).parents[1]
KNOWN = ("llama", "phi", "cohere", "qwen3", "phi3", "gpt_oss", "smollm3", "gemma3_text", "glm", "gpt_neox")
"""All dims of a head rotate, some, neighbours, some neighbours; signs, gains stored less one; rows fused by segment and by head;
sinks; layers without position."""


@cache
def found(name: str) -> Detection:
    """What detection finds on a tiny model's config, with the literals out of its reach."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(headfold.families, "all_families", lambda: pytest.fail("detection looks at the literals"))
        return detect(tiny_checkpoint(name))


@pytest.mark.parametrize("name", KNOWN)
def test_the_literal_found_says_what_the_one_written_by_hand_says(name: str) -> None:
    assert found(name).reason == ""
    config = json.loads((tiny_checkpoint(name) / "config.json").read_text())
    tensors = load_file(tiny_checkpoint(name) / "model.safetensors")
    written = sites(family_of(config), config, tensors)
    # Whether a class takes another head_dim, and what scales its logits, detection does not find out.
    blind = [replace(site, any_head_dim=False, fixed_head_dim=True, scale_from_head_dim=True) for site in written]
    assert sites(found(name).family, config, tensors) == blind


@pytest.mark.parametrize("name", KNOWN)
def test_its_source_is_the_literal(name: str) -> None:
    family = found(name).family
    scope: dict = {}
    exec(source_of(family, "x").replace("from .spec", "from headfold.families.spec"), scope)
    assert scope["FAMILY"] == family


def test_settings_that_break_a_literal_are_refused_by_it() -> None:
    assert found("phi").family.refuses.keys() == {"qk_layernorm"}
    assert found("cohere").family.refuses.keys() == {"use_qk_norm"}
    assert not found("llama").family.refuses


UNPROVEN = {
    "olmo2": r"q_norm has gains of shape .*, those of all heads",
    "afmoe": r"invertible matrix on V, undone on O, changes the logits.* beside its projections it has gate_proj",
    "deepseek_v3": r"K and V are not made head by head, but from a latent of kv_lora_rank",
    "jamba": r"attention in layers 1 of 2 only",
    "doge": r"besides K and V, dt_proj depends on the number of K/V heads",
    "nanochat": r"changes the logits in every layout tried",
}


@pytest.mark.parametrize("model_type", sorted(UNPROVEN))
def test_what_no_literal_can_say_is_not_proven(model_type: str) -> None:
    seen = detect(model_type)
    assert seen.family is None and not seen.source and not seen.laws
    with pytest.raises(UserError, match=UNPROVEN[model_type]) as refusal:
        raise UserError(seen.reason)
    assert "\n" not in str(refusal.value)


def lied(name: str, position: Rope | None, **attention: str) -> Family:
    """The literal that was found, with something else said in it."""
    family = found(name).family
    return replace(family, attentions=(replace(family.attentions[0], **attention),), position=position)


LIES = {
    "no position": ("llama", None, {}),
    "neighbours for halves": ("llama", Rope(interleaved=True), {}),
    "halves for neighbours": ("cohere", Rope(), {}),
    "all dims for some": ("phi", Rope(), {}),
    "all neighbours for some": ("glm", Rope(interleaved=True), {}),
    "K for V": ("llama", Rope(), {"k": "v_proj", "v": "k_proj"}),
    "Q for O": ("phi", Rope(fraction="partial_rotary_factor"), {"q": "dense", "o": "q_proj"}),
    "no norm": ("qwen3", Rope(), {"q_norm": "", "k_norm": ""}),
    "no sinks": ("gpt_oss", Rope(), {"sinks": ""}),
    "layers that have position": ("smollm3", Rope(), {}),
    "rows by head for segments": ("phi3", Rope(), {"fused": "per-group"}),
    "another head size": ("llama", Rope(), {"head_dim": "nowhere", "hidden_size": "intermediate_size"}),
}


@pytest.mark.parametrize("lie", sorted(LIES))
def test_a_lie_is_caught(lie: str) -> None:
    name, position, attention = LIES[lie]
    with pytest.raises(UserError, match=r"law broken|expected"):
        prove_laws(architecture_of(tiny_checkpoint(name)), lied(name, position, **attention))


@pytest.mark.parametrize("name", KNOWN)
def test_laws_are_tight_and_lies_are_not(name: str) -> None:
    laws = dict(found(name).laws)
    assert laws.pop("other transformations change the logits") > 1e-3
    assert max(laws.values()) < 1e-12
    assert [law for law, moved in laws.items() if moved == 0][:2] == [
        "tensors are written back as they were read",
        "keeping all heads changes nothing",
    ]


def test_prove_gives_the_literal_or_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headfold.detection, "detect", lambda _: found("llama"))
    assert prove(tmp_path) is found("llama").family
    monkeypatch.setattr(headfold.detection, "detect", lambda _: replace(found("llama"), family=None, reason="because"))
    with pytest.raises(UserError, match=r"config.json: model_type 'llama' cannot be folded: because"):
        prove(tmp_path)


def test_a_checkpoint_is_detected_as_its_config_has_it(tmp_path: Path) -> None:
    """Not as its class assumes: a norm that is off by default is on here."""
    config = json.loads((tiny_checkpoint("cohere") / "config.json").read_text()) | {"use_qk_norm": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"k_norm|q_norm"):
        prove(tmp_path)


def test_every_kind_of_layer_is_in_the_toy() -> None:
    kinds = ["a", "a", "b", "a", "b", "c"]
    toy = shrink({"num_hidden_layers": 6, "layer_types": kinds, "all": list(range(6)), "head_dim": 99}, Geometry())
    assert toy == {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "all": [0, 1, 2], "head_dim": 24}
    with pytest.raises(UserError, match="9 kinds of layers; expected at most 8"):
        shrink({"num_hidden_layers": 9, "layer_types": list("abcdefghi")}, Geometry())


def test_the_verb_writes_the_literal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "experiment", lambda *_: found("llama"))
    out = tmp_path / "family.py"
    ran = CliRunner().invoke(headfold.cli.app, ["detect", "llama", "--out", str(out)])
    assert ran.exit_code == 0 and "all laws hold" in ran.stdout and f"wrote {out}" in ran.stdout
    assert out.read_text() == found("llama").source
    with pytest.raises(UserError, match="expected nothing there"):
        verb.detect("llama", out=out)
    answer = json.loads(CliRunner().invoke(headfold.cli.app, ["detect", "llama", "--json"]).stdout)
    assert answer["proven"] and answer["literal"] == out.read_text()


def test_without_a_proof_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"olmo2: no literal to write to .*: its q_norm"):
        verb.detect("olmo2", out=tmp_path / "family.py")
    assert not list(tmp_path.iterdir())
    shown = CliRunner().invoke(headfold.cli.app, ["detect", "olmo2"])
    assert shown.exit_code == 0 and "not foldable: its q_norm" in shown.stdout


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"expected a checkpoint directory or a model_type; did you mean llama"):
        detect("llamma")
    with pytest.raises(UserError, match=r"vit: expected a language model or an encoder of text"):
        detect("vit")


def test_the_results_say_why_a_type_does_not_fold() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "detect.json").read_text())
    assert results["proven"] == sum(found["proven"] for found in results["types"].values()) >= 60
    assert all(found["proven"] or found["reason"] for found in results["types"].values())


def test_toy_models_are_computed_in_float64_throughout() -> None:
    from headfold.detection.toy import in_float64

    norm = torch.nn.Linear(3, 3, dtype=torch.float32)
    x = torch.ones(2, 3, dtype=torch.float64)
    with in_float64(norm):
        assert norm(x).float().to(torch.float32).softmax(-1, dtype=torch.float32).dtype == torch.float64
    assert norm.weight.dtype == torch.float32 and torch.ones(1).dtype == torch.float32


def test_an_architecture_that_does_not_build_is_one_line() -> None:
    subject = replace(architecture_of("llama"), overrides={"hidden_act": "no such function"})
    with pytest.raises(Unproven, match=r"^no toy model of it can be built: KeyError"):
        subject.build()
    assert isinstance(found("llama").family.attentions[0], Attention)


def test_a_type_without_a_literal_folds_once_it_has_proven_itself(tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING["internlm3"](
        vocab_size=61, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=12, max_position_embeddings=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    baseline = {"merge": "mean", "group": "contiguous", "refit": False}
    found = headfold.fold(tmp_path / "source", tmp_path / "out", kv_heads=2, **baseline)
    assert found.verification.passed and any("internlm3" in note and "detected" in note for note in found.notes)
    assert headfold.load(tmp_path / "out").config.num_key_value_heads == 2
