"""A fold end to end: the same bytes however it is interrupted or asked for, and nothing in place that is wrong."""

import json
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import pytest
import torch
from grades import assert_bitwise, assert_differs, assert_tight_through_float32_norms
from safetensors.torch import load_file, save_file
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from tiny import readable_checkpoint, stock_logits, stock_model, tiny_checkpoint, tiny_sites, tiny_tokens
from torch import Tensor

import headfold
from headfold import outputs, planning
from headfold.calibration import collect
from headfold.checkpoint.reader import Checkpoint
from headfold.conversion import fold_job, measured_sites, single_pass, verification, writing
from headfold.conversion import site_files as fitted
from headfold.conversion.teacher import Teacher
from headfold.core.errors import UserError
from headfold.core.plan import Plan
from headfold.stats_file import StatsFile, write_stats
from headfold.verbs import fold as verb

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
BASELINE: dict[str, Any] = dict(kv_heads=2, merge="mean", group="contiguous", refit=False)
CALIBRATED: dict[str, Any] = dict(tokens=512, context=32)


def files(directory: Path) -> dict[str, bytes]:
    """Every file but the card, which tells how long the fold took and names the output."""
    found = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    del found["README.md"]
    return found


def same_bytes(a: Path, b: Path, but: Set[str] = frozenset()) -> None:
    left, right = files(a), files(b)
    assert left.keys() == right.keys()
    assert not [name for name in left if left[name] != right[name] and name not in but]


def untouched(out: Path) -> None:
    """Nothing stands where the fold should go."""
    assert not out.exists()


@pytest.fixture
def source() -> Path:
    """Without a tokenizer: nothing can be calibrated, and nothing need be."""
    return tiny_checkpoint("llama", torch.float32)


@pytest.fixture
def stats(source: Path, tmp_path: Path) -> Path:
    path = tmp_path / "stats.safetensors"
    sites = [site for site, _ in tiny_sites(source)]
    seen = collect(stock_model(source), sites, {"input_ids": tiny_tokens(6, seed=1)})
    write_stats(path, seen, {"model": Checkpoint.open(source).fingerprint(), "source": "random tokens"})
    return path


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:  # noqa: F811
    return readable_checkpoint(tmp_path_factory.mktemp("source") / "readable", tokenizer)


def resharded(source: Path, target: Path, dtype: torch.dtype) -> Path:
    stock_model(source, dtype).save_pretrained(target, max_shard_size="40KB")
    assert len(list(target.glob("*.safetensors"))) > 2
    return target


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_mean_needs_no_calibration_and_loads_in_stock_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    source, out = tiny_checkpoint("llama", dtype), tmp_path / "out"
    result = headfold.fold(source, out, **BASELINE)
    assert result.verification.passed and not result.refitted and result.plan.calibration == {}
    assert (result.num_kv_heads_before, result.num_kv_heads_after) == (8, 2)
    assert result.kv_bytes_before == 4 * result.kv_bytes_after == 2 * 2 * 8 * 8 * dtype.itemsize
    config, old = (json.loads((path / "config.json").read_text()) for path in (out, source))
    assert config == old | {"num_key_value_heads": 2, "rope_theta": old["rope_parameters"]["rope_theta"]}
    for (_, heads), (_, was) in zip(tiny_sites(out), tiny_sites(source), strict=True):
        for role in ("k", "v"):
            mean = getattr(was, role).float() if dtype != torch.float64 else getattr(was, role)
            assert_bitwise(getattr(heads, role), mean.unflatten(0, (2, 4)).mean(1).to(dtype))
    assert stock_model(out, torch.float32).config.num_key_value_heads == 2


def test_what_is_not_attention_is_copied_as_bytes(source: Path, tmp_path: Path) -> None:
    headfold.fold(source, tmp_path / "out", **BASELINE)
    new, old = (load_file(path / "model.safetensors") for path in (tmp_path / "out", source))
    assert new.keys() == old.keys()
    changed = {name for name in old if new[name].shape != old[name].shape or not torch.equal(new[name], old[name])}
    assert changed == {f"model.layers.{layer}.self_attn.{role}_proj.weight" for layer in (0, 1) for role in "kv"}


@pytest.mark.parametrize("dtype", FLOATS)
def test_shards_hold_the_same_tensors_as_one_file(dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", dtype)
    shards = resharded(source, tmp_path / "shards", dtype)
    for path, out in ((source, "one"), (shards, "many")):
        headfold.fold(path, tmp_path / out, **BASELINE)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert whole.keys() == index.keys()
    for name, shard in index.items():
        assert_bitwise(load_file(tmp_path / "many" / shard)[name], whole[name])


@pytest.mark.parametrize("merge", ["mean", "first", "absorb", "procrustes"])
def test_a_grouped_source_folds_on_down_to_one_head(merge: str, tmp_path: Path, stats: Path, source: Path) -> None:
    settings: dict[str, Any] = dict(merge=merge, group="contiguous", refit=False)
    if merge in ("absorb", "procrustes"):
        settings["stats"] = stats
    four, one = tmp_path / "four", tmp_path / "one"
    assert headfold.fold(source, four, kv_heads="1/2", **settings).num_kv_heads_after == 4
    if "stats" in settings:
        grouped = collect(
            stock_model(four), [site for site, _ in tiny_sites(four)], {"input_ids": tiny_tokens(6, seed=1)}
        )
        settings["stats"] = tmp_path / "grouped.safetensors"
        write_stats(settings["stats"], grouped, {"model": Checkpoint.open(four).fingerprint()})
    result = headfold.fold(four, one, kv_heads=1, **settings)
    assert (result.num_kv_heads_before, result.num_kv_heads_after) == (4, 1) and result.verification.passed
    assert {heads.num_kv_heads for _, heads in tiny_sites(one)} == {1}
    if merge == "mean":  # means of equal groups of means are means
        headfold.fold(source, tmp_path / "at once", kv_heads=1, **settings)
        assert_tight_through_float32_norms(stock_logits(one), stock_logits(tmp_path / "at once"))


def test_no_shrinking_gives_the_source_back(source: Path, tmp_path: Path) -> None:
    headfold.fold(source, tmp_path / "out", **(BASELINE | {"kv_heads": 8}))
    new, old = (load_file(path / "model.safetensors") for path in (tmp_path / "out", source))
    for name, tensor in old.items():
        assert_bitwise(new[name], tensor)


def test_the_plan_in_the_output_makes_the_same_bytes(source: Path, stats: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(stats=stats, refit=False)
    result = headfold.fold(source, tmp_path / "counted", kv_heads=2, **options)
    path = tmp_path / "counted" / "plan.json"
    assert Plan.load(path) == result.plan
    assert json.loads(path.read_text()) == result.plan.to_json() == Plan.from_json(result.plan.to_json()).to_json()
    headfold.fold(source, tmp_path / "planned", plan=path, **options)
    same_bytes(tmp_path / "planned", tmp_path / "counted", but={"headfold.yaml"})
    assert {name for name, site in result.plan.sites.items() if site.error.key > 0} == {
        "layers.0.self",
        "layers.1.self",
    }
    assert headfold.plan(source, kv_heads=2, stats=stats) == result.plan


def test_a_plan_of_another_checkpoint_is_refused(source: Path, tmp_path: Path) -> None:
    headfold.fold(tiny_checkpoint("llama", torch.float32, seed=1), tmp_path / "other", **BASELINE)
    with pytest.raises(UserError, match="expected a plan of this checkpoint"):
        headfold.fold(source, tmp_path / "out", plan=tmp_path / "other" / "plan.json")
    untouched(tmp_path / "out")


def failing(call: Callable[..., Any], after: int) -> Callable[..., Any]:
    """The same function, until the power goes."""
    calls = 0

    def wrapper(*args: Any, **keywords: Any) -> Any:
        nonlocal calls
        if calls == after:
            raise KeyboardInterrupt
        calls += 1
        return call(*args, **keywords)

    return wrapper


KILLED_AT: dict[str, tuple[Any, str, int]] = {
    "sample": (measured_sites, "write_stats", 0),
    "calibrate, first site": (measured_sites, "write_stats", 1),
    "calibrate, second site": (measured_sites, "write_stats", 2),
    "plan, first site": (planning, "make_plan", 1),
    "plan, second site": (planning, "make_plan", 2),
    "plan kept, second site": (measured_sites, "write_json", 1),
    "refit": (Teacher, "refit", 0),
    "refit, second site": (fitted, "save_file", 1),
    "write, first site": (writing, "site_tensors", 0),
    "write, second site": (writing, "site_tensors", 1),
    "side files": (writing, "copy_side_files", 0),
    "verify": (verification, "compare_with_twin", 0),
    "card": (verb, "model_card", 0),
    "rename": (outputs, "commit", 0),
}
"""Where a function lives, its name, and how many calls of it return before one never does."""
IN_STEPS_KILLED_AT = {
    "calibration in steps": (Teacher, "write_statistics", 0),
    "plan in steps": (fold_job, "plan_uniform", 0),
    "refit in steps": (Teacher, "refit", 0),
}
"""The same where calibration, plan and refit are not one pass."""


@pytest.fixture(scope="module")
def calm(readable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fold that nothing interrupted."""
    out = tmp_path_factory.mktemp("calm") / "out"
    headfold.fold(readable, out, kv_heads=4, **CALIBRATED)
    return out


@pytest.mark.parametrize("moment", sorted(KILLED_AT | IN_STEPS_KILLED_AT))
def test_killed_and_run_again_gives_the_same_bytes(
    moment: str, readable: Path, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if moment in IN_STEPS_KILLED_AT:
        monkeypatch.setattr(single_pass, "suits", lambda *args: False)
    home, name, after = (KILLED_AT | IN_STEPS_KILLED_AT)[moment]
    options, out = dict(kv_heads=4, **CALIBRATED), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, name, failing(getattr(home, name), after))
        with pytest.raises(KeyboardInterrupt):
            headfold.fold(readable, out, **options)
    untouched(out)
    headfold.fold(readable, out, **options)
    same_bytes(out, calm)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_refit_goes_on_at_the_site_where_it_was(readable: Path, tmp_path: Path) -> None:
    options, out, put = dict(kv_heads=4, **CALIBRATED), tmp_path / "out", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitted, "save_file", failing(fitted.save_file, 1))
        with pytest.raises(KeyboardInterrupt):
            headfold.fold(readable, out, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fitted, "save_file", lambda tensors, path, facts: put.append(path.stem) or save_file(tensors, path, facts)
        )
        headfold.fold(readable, out, **options)
    assert put == ["layers.1.self"]


def test_killed_in_shards_and_run_again_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    shards = resharded(source, tmp_path / "shards", torch.float32)
    headfold.fold(shards, tmp_path / "calm", **BASELINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "site_tensors", failing(writing.site_tensors, 1))
        with pytest.raises(KeyboardInterrupt):
            headfold.fold(shards, tmp_path / "out", **BASELINE)
    headfold.fold(shards, tmp_path / "out", **BASELINE)
    same_bytes(tmp_path / "out", tmp_path / "calm")


def test_the_whole_path_calibrates_itself_and_says_so(readable: Path, tmp_path: Path) -> None:
    enough: dict[str, Any] = CALIBRATED | {"tokens": 2048}  # for W_q too
    result = headfold.fold(readable, tmp_path / "out", kv_heads=4, **enough)
    assert result.refitted and result.verification.passed
    assert result.plan.calibration["source"] == "self" and result.plan.calibration["tokens"] == "2048"
    kept = headfold.fold(readable, tmp_path / "kept", kv_heads=4, refit=False, **enough)
    assert kept.plan == result.plan
    for (_, new), (_, old) in zip(tiny_sites(tmp_path / "out"), tiny_sites(tmp_path / "kept"), strict=True):
        for role in "qvo":
            assert_differs(getattr(new, role), getattr(old, role))  # the refit reached the disk
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:" in card and "--kv-heads 4" in card
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (readable / "tokenizer.json").read_bytes()


def test_what_stands_there_is_not_overwritten_unasked(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"--force") as refusal:
        headfold.fold(source, out, **BASELINE)
    assert "\n" not in str(refusal.value)
    assert files_of(out) == {"thesis.txt": b"years of work"}
    headfold.fold(source, out, force=True, **BASELINE)
    headfold.fold(source, tmp_path / "fresh", **BASELINE)
    same_bytes(out, tmp_path / "fresh")


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def one_head_wrong(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One K head of the site taken for its neighbour."""
    name = next(name for name in tensors if "k_proj" in name)
    swapped = tensors[name].clone()
    swapped[:8] = tensors[name][8:16]
    return {**tensors, name: swapped}


def test_a_fold_that_is_not_its_twin_never_gets_its_name(source: Path, tmp_path: Path) -> None:
    make = writing.site_tensors

    def corrupting(site: Any, *args: Any, **keywords: Any) -> Mapping[str, Tensor]:
        tensors = make(site, *args, **keywords)
        written = keywords.get("num_kv_heads") is None
        return one_head_wrong(tensors) if written and site.name == "layers.1.self" else tensors

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "site_tensors", corrupting)
        with pytest.raises(UserError, match=r"head-repeated twin.*first in layers\.1.*not renamed") as refusal:
            headfold.fold(source, out, **BASELINE)
        assert "\n" not in str(refusal.value)
        untouched(out)
        headfold.fold(source, tmp_path / "unverified", verify=False, **BASELINE)
    assert (tmp_path / "unverified" / "plan.json").exists()


def test_a_failed_verification_is_not_taken_up_again(source: Path, tmp_path: Path) -> None:
    """After the cause is gone the same call must not go on from the wrong bytes."""
    make, out = writing.site_tensors, tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            writing, "site_tensors", lambda *a, **k: one_head_wrong(make(*a, **k)) if not k else make(*a, **k)
        )
        with pytest.raises(UserError):
            headfold.fold(source, out, **BASELINE)
    headfold.fold(source, out, **BASELINE)
    headfold.fold(source, tmp_path / "calm", **BASELINE)
    same_bytes(out, tmp_path / "calm")


def test_methods_that_need_data_say_so_where_there_is_no_tokenizer(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokenizer") as refusal:
        headfold.fold(source, tmp_path / "out", kv_heads=2)
    assert "\n" not in str(refusal.value)
    untouched(tmp_path / "out")


def test_statistics_of_another_model_are_refused(stats: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint("llama", torch.float32, seed=1)
    with pytest.raises(UserError, match="another model"):
        headfold.fold(other, tmp_path / "out", kv_heads=2, stats=stats, refit=False)
    untouched(tmp_path / "out")


def test_the_seed_of_a_fold_is_its_own_whatever_text_the_statistics_saw(
    source: Path, stats: Path, tmp_path: Path
) -> None:
    said = {"source": "stdlib", "seed": "0", "tokens": "64", "context": "16"}
    measured = StatsFile(stats)
    write_stats(tmp_path / "said.safetensors", dict(measured), {**measured.metadata, **said})
    options: dict[str, Any] = dict(kv_heads=4, merge="random", group="random", refit=False, verify=False)
    plans = [
        headfold.fold(source, tmp_path / f"out{seed}", stats=tmp_path / "said.safetensors", seed=seed, **options).plan
        for seed in (0, 3)
    ]
    assert [plan.seed for plan in plans] == [0, 3]
