"""`headfold route`: a settled route is an ordinary checkpoint that says what the routed model says, or nothing is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from grades import assert_bitwise, assert_differs, assert_tight, assert_tight_through_float32_norms
from owners import refused_while_owned
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint, tiny_tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import headfold
from headfold import routing
from headfold.checkpoint.ownership import lock_beside
from headfold.core.errors import UserError
from headfold.core.groups import Groups
from headfold.core.plan import Plan
from headfold.core.routes import even, runs
from headfold.verbs import route as verb
from headfold.verbs.export import export

TEXT = "the quick brown fox jumps over the lazy dog, and then again.\n" * 20
GRADES = {"llama": assert_tight_through_float32_norms, "gpt2": assert_tight}


@pytest.fixture(scope="module", params=GRADES)
def folded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grouped checkpoint whose keys have unlike lengths, of a stock class and of headfold's runtime, and a text beside it."""
    place = tmp_path_factory.mktemp(request.param) / "folded"
    if request.param == "llama":
        shutil.copytree(tiny_checkpoint("llama", num_key_value_heads=4), place)
        (place / "README.md").write_text("# tiny\n\n## Use\n\nloads anywhere\n\n## Made by\n\nme\n")
    else:
        options = dict(group="contiguous", merge="mean", refit=False)
        headfold.fold(tiny_checkpoint("gpt2"), place, kv_heads=4, **options)
    tensors = load_file(place / "model.safetensors")
    for name, tensor in tensors.items():
        if "k_proj.weight" in name:
            tensor *= torch.linspace(1, 1.6, 4, dtype=tensor.dtype).repeat_interleave(len(tensor) // 4)[:, None]
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    words = {letter: index for index, letter in enumerate(["<u>", "<s>", *sorted(set(TEXT))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<u>", bos_token="<s>").save_pretrained(place)
    (place.parent / "text.txt").write_text(TEXT)
    return place


def settle(folded: Path, out: Path, **options: Any) -> verb.RouteResult:
    return verb.route(folded, out, calibration=str(folded.parent / "text.txt"), tokens=512, **options)


@torch.no_grad()
def answer(model: Any) -> Tensor:
    return model(tiny_tokens()).logits


def test_a_settled_route_is_a_checkpoint(folded: Path, tmp_path: Path) -> None:
    """Weights as they were, the groups in config and plan, the answers of the routed model; a stock layout where there is one."""
    name = next(name for name in GRADES if folded.parent.name.startswith(name))
    grade = GRADES[name]
    result = settle(folded, tmp_path / "out", route="kdgqa")
    loaded, routed = headfold.load(tmp_path / "out"), headfold.load(folded)
    static = answer(routed)
    routing.attach(routed, "kdgqa")
    for router, sizes in zip(routing.routers(routed).values(), result.sizes.values(), strict=True):
        assert sum(sizes) == 8 and min(sizes) >= 1 and sizes != even(8, 4)
        router.state = router.state.__class__(sizes, router.kept, router.mean, count=0)
        router.counts[3] = 1
    grade(answer(loaded), answer(routed))
    assert_differs(answer(loaded), static)
    before, after = (load_file(path / "model.safetensors") for path in (folded, tmp_path / "out"))
    assert before.keys() == after.keys()
    for tensor in before:
        assert_bitwise(before[tensor], after[tensor])
    config, plan = json.loads((tmp_path / "out/config.json").read_text()), Plan.load(tmp_path / "out/plan.json")
    listed = {site["module"]: site.get("kv_of_query") for site in config["headfold"]["sites"]}
    assert listed == {site: list(runs(sizes)) for site, sizes in result.sizes.items()}
    assert {site: row.groups for site, row in plan.sites.items()} == {s: Groups(tuple(m)) for s, m in listed.items()}
    assert plan.group == "kdgqa" and plan.calibration["tokens"] == "512"
    card = (tmp_path / "out/README.md").read_text()
    assert (
        "## Route" in card and " + ".join(map(str, next(iter(result.sizes.values())))) in card and "## Made by" in card
    )
    assert "trust_remote_code=True" in card and "loads anywhere" not in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"] and result.difference <= result.tolerance
    if name == "llama":
        export(tmp_path / "out", tmp_path / "padded", layout="padded")
        grade(answer(AutoModelForCausalLM.from_pretrained(tmp_path / "padded", dtype="auto")), answer(loaded))


def test_static_settles_on_the_groups_that_were_there(folded: Path, tmp_path: Path) -> None:
    result = settle(folded, tmp_path / "out", route="static")
    assert set(result.sizes.values()) == {even(8, 4)}
    assert_bitwise(answer(headfold.load(tmp_path / "out")), answer(headfold.load(folded)))


def test_what_cannot_be_settled_leaves_nothing(folded: Path, tmp_path: Path) -> None:
    source = dict(tokens=512, calibration=str(folded.parent / "text.txt"))
    for name in ("llama", "phi3-partial-gqa"):
        place = shutil.copytree(folded, tmp_path / name, ignore=shutil.ignore_patterns("plan.json"))
        for file in ("config.json", "model.safetensors"):
            shutil.copy(tiny_checkpoint(name, num_key_value_heads=8 if name == "llama" else 4) / file, place)
    refusals = {
        "has no query head": lambda: settle(folded, tmp_path / "out", route="kdgqa:published=true"),
        "unknown runtime routes method": lambda: settle(folded, tmp_path / "out", route="nothing"),
        "expected attention with fewer K/V heads": lambda: verb.route(tmp_path / "llama", tmp_path / "out", **source),
        "expected q, k and v as separate tensors": lambda: verb.route(
            tmp_path / "phi3-partial-gqa", tmp_path / "out", **source
        ),
        "overlaps": lambda: settle(folded, folded),
        "found no config.json there": lambda: verb.route(tmp_path / "none", tmp_path / "out", **source),
    }
    for words, attempt in refusals.items():
        with pytest.raises(UserError) as refusal:
            attempt()
        assert words in str(refusal.value) and "\n" not in str(refusal.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "phi3-partial-gqa"], words


def test_an_output_that_says_something_else_is_not_put_in_place(
    folded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = verb.routed_config

    def forgetful(*given: Any) -> dict[str, Any]:
        config = honest(*given)
        for site in config["headfold"]["sites"]:
            del site["kv_of_query"]
        return config

    monkeypatch.setattr(verb, "routed_config", forgetful)
    with pytest.raises(UserError, match="expected the outputs of the routed model within .* not renamed"):
        settle(folded, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial"]
    monkeypatch.undo()
    assert settle(folded, tmp_path / "out").difference < 1e-9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_place_that_another_run_owns_is_refused(folded: Path, tmp_path: Path) -> None:
    refused_while_owned(lambda: settle(folded, tmp_path / "out"), tmp_path / "out", lock_beside(tmp_path / "out"))
