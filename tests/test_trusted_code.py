"""Code that a checkpoint brings: run where the user asks for it, while the verb runs, and said on what comes of it; never otherwise."""

# ruff: noqa: F811 - fixtures are arguments

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from brought_code import AUTO_MAP, MODELING, own_checkpoint
from checkpoints import one_line
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from test_cli import run  # noqa: F401 (a fixture)
from tiny import tiny_checkpoint

import headfold
from headfold.core.errors import UserError
from headfold.trusted_code import running_code, trusted_code

TRUST = "--trust-remote-code"
QUICK: dict[str, Any] = {"kv_heads": 2, "merge": "mean", "group": "contiguous", "refit": False, "verify": False}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_checkpoint(tmp_path_factory.mktemp("code") / "own")


@pytest.fixture(scope="module")
def fold(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fold with all defaults, such as a refit."""
    out = tmp_path_factory.mktemp("folds") / "fold"
    data = {"calibration": str(original.parent / "text.txt"), "tokens": 1024, "context": 32}
    made = headfold.fold(original, out, kv_heads=2, trust_remote_code=True, **data)
    assert made.verification.passed and any("modeling_own.py" in note for note in made.notes)
    return out


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Whether the code ran, which leaves a mark when it is imported anew."""
    monkeypatch.setenv("OWN_TINY_RAN", str(tmp_path / "ran"))
    return (tmp_path / "ran").exists


def fresh(original: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint whose code no test has imported."""
    place = Path(shutil.copytree(original, tmp_path / "fresh"))
    code = place / "modeling_own.py"
    code.write_text(f"{code.read_text()}\n# {tmp_path}\n")
    return place


REFUSING = ("detect", "inspect", "calibrate", "fold", "eval", "compare", "run", "plan", "check", "export", "bench")


@pytest.mark.parametrize("verb", REFUSING)
def test_no_verb_runs_it_unasked(verb: str, original: Path, tmp_path: Path, run, ran: Callable[[], bool]) -> None:
    place, out = fresh(original, tmp_path), tmp_path / "out"
    (tmp_path / "recipe.yaml").write_text(f"model: {place}\ntrust_remote_code: true\nfold: {{kv_heads: 2}}\n")
    words: dict[str, tuple[object, ...]] = {
        "calibrate": (place, out), "fold": (place, out, "--kv-heads", 2), "compare": (place, "--kv-heads", 2, "--out", out),
        "run": (tmp_path / "recipe.yaml", out), "plan": (place, out, "--kv-heads", 2), "export": (place, out, "--layout", "padded"),
    }  # fmt: skip
    said = run(verb, *words.get(verb, (place,)))
    assert said.code == 2 and said.err.strip().count("\n") == 0, said.err
    takes_none = verb in ("check", "export", "bench")
    for word in ("OwnForCausalLM", "modeling_own.py", "classes of transformers alone" if takes_none else TRUST):
        assert word in said.err, said.err
    assert not takes_none or TRUST not in said.err
    assert not ran() and not out.exists()


def test_loading_does_not_ask_on_the_terminal(original: Path, tmp_path: Path, ran: Callable[[], bool]) -> None:
    with pytest.raises(UserError) as error:
        headfold.load(fresh(original, tmp_path))
    one_line(error, "OwnForCausalLM", "modeling_own.py", "trust_remote_code=True")
    assert not ran()


def test_detect_runs_it_when_asked_and_no_longer(original: Path, tmp_path: Path, run, ran: Callable[[], bool]) -> None:
    place = fresh(original, tmp_path)
    found = json.loads(run("detect", place, TRUST, "--json").out)
    assert found["proven"] and found["architecture"] == "OwnForCausalLM" and ran()
    assert "own_tiny" not in transformers.CONFIG_MAPPING and trusted_code("own_tiny") is None
    assert run("detect", place).code == 2
    literal = tmp_path / "family.py"
    assert (
        run("detect", place, TRUST, "--out", literal).code == 0 and 'model_types=("own_tiny",)' in literal.read_text()
    )


def test_stock_transformers_loads_a_fold_with_its_code(original: Path, fold: Path) -> None:
    for name in ("modeling_own.py", "configuration_own.py"):
        assert (fold / name).read_bytes() == (original / name).read_bytes()
    assert json.loads((fold / "config.json").read_text())["auto_map"] == AUTO_MAP
    model = transformers.AutoModelForCausalLM.from_pretrained(fold, trust_remote_code=True)
    assert model.config.num_key_value_heads == 2 and model.model.layers[0].self_attn.k_proj.out_features == 24
    ours = headfold.load(fold, trust_remote_code=True)
    tokens = torch.arange(2, 7)[None]
    assert torch.equal(ours(tokens).logits, model.eval()(tokens).logits)
    with pytest.raises(UserError) as error:
        headfold.load(fold)
    one_line(error, "modeling_own.py", "trust_remote_code=True")


def test_the_fold_says_that_code_was_run(fold: Path) -> None:
    card, recipe = (fold / "README.md").read_text(), yaml.safe_load((fold / "headfold.yaml").read_text())
    assert f"was run (`{TRUST}`): modeling_own.py, configuration_own.py" in card
    assert 'from_pretrained("path/to/this", trust_remote_code=True)' in card and "A stock checkpoint" not in card
    assert "--kv-heads 2" in card and TRUST in card.partition("## Made by")[2]
    assert (
        recipe["trust_remote_code"] is True
        and len(recipe["code_digest"]) == 64
        and "trust_remote_code" not in recipe["fold"]
    )


def test_a_recipe_is_no_consent(original: Path, fold: Path, tmp_path: Path, run) -> None:
    words = ("run", fold / "headfold.yaml", tmp_path / "again", "--model", original)
    assert TRUST in run(*words).err and not (tmp_path / "again").exists()
    (tmp_path / "own.yaml").write_text(f"model: {original}\nfold: {{kv_heads: 2, trust_remote_code: true}}\n")
    assert "no such option of fold" in run("run", tmp_path / "own.yaml", tmp_path / "again").err
    assert (said := run(*words, TRUST)).code == 0, said.err
    for name in ("model.safetensors", "config.json", "headfold.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (fold / name).read_bytes()


def test_a_fold_is_not_made_again_with_other_code(original: Path, fold: Path, tmp_path: Path) -> None:
    place = fresh(original, tmp_path)
    with pytest.raises(UserError) as error:
        headfold.run(fold / "headfold.yaml", tmp_path / "out", model=place, trust_remote_code=True)
    one_line(error, "fresh: expected the code that the recipe was made with")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("same", [True, False])
def test_an_interrupted_fold_does_not_go_on_with_other_code(
    same: bool, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(staging: Path, *_: Any) -> None:
        (staging / "left").touch()
        raise KeyboardInterrupt

    model, out = original if same else fresh(original, tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("headfold.verbs.fold.write_recipe", killed)
        headfold.fold(original, out, trust_remote_code=True, **QUICK)
    headfold.fold(model, out, trust_remote_code=True, **QUICK)
    assert (out / "left").exists() == same


def test_a_recipe_runs_no_code_of_a_task_file(original: Path, tmp_path: Path, ran: Callable[[], bool]) -> None:
    (tmp_path / "code.py").write_text("import os, pathlib\npathlib.Path(os.environ['OWN_TINY_RAN']).touch()\nf = str\n")
    task = "task: mine\ndataset_path: json\noutput_type: multiple_choice\ndoc_to_text: !function code.f\n"
    (tmp_path / "mine.yaml").write_text(f"{task}doc_to_target: 0\ndoc_to_choice: [a, b]\n")
    recipe = tmp_path / "recipe.yaml"
    model = tiny_checkpoint("llama", torch.float32)
    for options in (f"task: mine, include_path: {tmp_path}", f"include_path: {tmp_path}", "num_fewshot: 1"):
        recipe.write_text(f"model: {model}\nevery: {json.dumps(QUICK)}\nfolds: {{a: }}\neval: {{{options}}}\n")
        with pytest.raises(UserError) as error:
            headfold.run(recipe, tmp_path / "out")
        one_line(error, f"{recipe}:4", "headfold eval --task")
    assert not ran() and not (tmp_path / "out").exists()


def test_a_fold_is_measured_beside_its_original(original: Path, fold: Path, run) -> None:
    text = original.parent / "text.txt"
    found = json.loads(run("eval", fold, "--reference", original, "--text", text, TRUST, "--json").out)
    assert 0 < found["kl"] < 1 and found["perplexity"] != found["reference_perplexity"]
    rows = json.loads(run("eval", "--compare", original, fold, "--text", text, TRUST, "--json").out)
    assert len(rows) == 2 and "own_tiny" not in transformers.CONFIG_MAPPING


def test_compare_runs_it_for_all_that_it_calls(original: Path, tmp_path: Path, run) -> None:
    text = original.parent / "text.txt"
    data = ("--text", text, "--limit", 128, "--calibration", text, "--tokens", 256, "--context", 16)
    said = run(
        "compare", original, "--kv-heads", 2, "--methods", "mean", *data, "--out", tmp_path / "rows", TRUST, "--json"
    )
    assert [row["method"] for row in json.loads(said.out)] == ["mean"], said.err
    assert "own_tiny" not in transformers.CONFIG_MAPPING


def test_a_model_in_memory_is_returned_by_its_code(original: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(original, trust_remote_code=True)
    folded = headfold.fold(model, trust_remote_code=True, **QUICK)
    assert type(folded).__name__ == "OwnForCausalLM" and folded.config.num_key_value_heads == 2
    assert folded(torch.arange(2, 7)[None]).logits.isfinite().all() and "own_tiny" not in transformers.CONFIG_MAPPING


def test_code_of_the_hub_is_fetched_with_consent_alone(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repository: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        names = [file.name for file in original.iterdir()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            shutil.copy(original / name, tmp_path / name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError) as error:
        headfold.inspect("someone/own")
    one_line(error, TRUST)
    assert not [*tmp_path.glob("*.py")]
    assert headfold.inspect("someone/own", trust_remote_code=True).sites and (tmp_path / "modeling_own.py").is_file()


def test_an_adapter_of_another_model_is_refused_as_one(original: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    lora.mkdir()
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "someone/other"}
    (lora / "adapter_config.json").write_text(json.dumps({**described, "target_modules": ["q_proj"]}))
    module = "base_model.model.other.q_proj.lora"
    tensors = {f"{module}_A.weight": torch.ones(2, 48), f"{module}_B.weight": torch.ones(48, 2)}
    save_file(tensors, lora / "adapter_model.safetensors")
    with pytest.raises(UserError) as error:
        headfold.inspect(original, adapter=lora, trust_remote_code=True)
    one_line(error, "which it lacks; pass the model that the adapter was made for ('someone/other'")


def test_what_the_class_does_not_read_is_refused(original: Path, tmp_path: Path) -> None:
    data = {"calibration": str(original.parent / "text.txt"), "tokens": 64, "context": 16}
    uneven = {**QUICK, "kv_heads": 3, "group": "swap:unequal=true"}
    with pytest.raises(UserError) as error:
        headfold.fold(original, tmp_path / "out", trust_remote_code=True, **uneven, **data)
    one_line(error, "modeling_own.py", "--kv-heads")
    uncounted = MODELING.replace("config.num_key_value_heads", "config.num_attention_heads")
    place = own_checkpoint(tmp_path / "uncounted", uncounted)
    found = headfold.detect(place, trust_remote_code=True)
    assert found.family is None and "reads no count of K/V heads from its config" in found.reason


def test_code_is_not_run_where_transformers_has_the_class(tmp_path: Path, ran: Callable[[], bool]) -> None:
    place = Path(shutil.copytree(tiny_checkpoint("llama", torch.float32), tmp_path / "llama"))
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP}))
    (place / "modeling_own.py").write_text(MODELING)
    headfold.fold(place, tmp_path / "out", trust_remote_code=True, **QUICK)
    assert not ran() and "trust_remote_code" not in yaml.safe_load((tmp_path / "out" / "headfold.yaml").read_text())


def named(value: Any) -> Callable[[Path], None]:
    return lambda place: edit(place, auto_map={"AutoModelForCausalLM": value})


def edit(place: Path, **fields: Any) -> None:
    file = place / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def code(text: str) -> Callable[[Path], None]:
    return lambda place: (place / "modeling_own.py").write_text(text) and None


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "code of another repository": (named("someone/else--modeling_own.OwnForCausalLM"), "no other code of a checkpoint"),
    "a path": (named("../modeling_own.OwnForCausalLM"), "no other code of a checkpoint"),
    "a list": (named(["modeling_own.OwnForCausalLM", None]), "no other code of a checkpoint"),
    "no language model": (lambda place: edit(place, auto_map={"AutoModel": "modeling_own.OwnModel"}), "AutoModelForCausalLM"),
    "no file": (lambda place: (place / "modeling_own.py").unlink(), "no such file"),
    "no relative": (lambda place: (place / "configuration_own.py").unlink(), "does not load"),
    "another class": (lambda place: edit(place, architectures=["OtherForCausalLM"]), "the class that saved the weights"),
    "another type": (lambda place: edit(place, model_type="another"), "own_tiny"),
    "no Python": (code("class ("), "does not load"),
    "no class": (code("x = 1\n"), "does not load"),
    "an error": (code("raise ValueError('first\\nsecond')\n"), "does not load"),
    "a package that is not here": (code("import no_such_package_of_anybody\n"), "no_such_package_of_anybody"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_code_that_cannot_be_run_is_one_line(case: str, original: Path, tmp_path: Path) -> None:
    spoil, word = BAD[case]
    place = fresh(original, tmp_path)
    spoil(place)
    with pytest.raises(UserError) as error, running_code(place):
        pass
    one_line(error, word, "fresh")
    assert "own_tiny" not in transformers.CONFIG_MAPPING


REGISTERS = """
from transformers import AutoConfig, AutoModelForCausalLM
AutoConfig.register("own_tiny", OwnConfig)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)
"""


@pytest.mark.parametrize("model_type", ["own_tiny", "another"])
def test_what_code_registers_itself_does_not_stay(model_type: str, original: Path, tmp_path: Path) -> None:
    place = fresh(original, tmp_path)
    code = place / "modeling_own.py"
    code.write_text(f"{code.read_text()}{REGISTERS}")
    edit(place, model_type=model_type)
    before = dict(transformers.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content)
    with nullcontext() if model_type == "own_tiny" else pytest.raises(UserError), running_code(place):
        assert "own_tiny" in transformers.CONFIG_MAPPING
    assert "own_tiny" not in transformers.CONFIG_MAPPING and trusted_code("own_tiny") is None
    assert (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content == before
    )  # with what other tests let transformers register


def test_a_class_that_transformers_does_not_register_is_one_line(original: Path, tmp_path: Path) -> None:
    place = fresh(original, tmp_path)
    for name in ("modeling_own.py", "configuration_own.py"):  # a name that a class of transformers has
        (place / name).write_text((place / name).read_text().replace("OwnConfig", "LlamaConfig"))
    with pytest.raises(UserError) as error, running_code(place):
        pass
    one_line(error, "modeling_own.py", "LlamaConfig")
    assert "own_tiny" not in transformers.CONFIG_MAPPING


def test_two_codes_of_one_type_are_refused(original: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        headfold.eval(original, compare=[fresh(original, tmp_path)], trust_remote_code=True)
    one_line(error, "expected the same code for every model")
    with running_code(original), running_code(original):
        assert trusted_code("own_tiny") is not None
    assert load_file(original / "model.safetensors") and trusted_code("own_tiny") is None
