"""Plans whose groups, or counts of K/V heads, differ: what `fold --plan` makes of them under headfold and in stock layouts."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grades import assert_differs, assert_tight, assert_tight_through_float32_norms
from kinds import COVER, KINDS
from safetensors.torch import load_file
from tiny import (
    DISTINCT,
    FLOAT32_NORMS,
    answer_of,
    stock_model,
    tiny_checkpoint,
    tiny_sample,
    tiny_sites,
)

import headfold
from headfold.conversion.source import open_source
from headfold.core.errors import UserError
from headfold.core.groups import Groups
from headfold.core.plan import Plan
from headfold.families.spec import Site
from headfold.surgery import site_tensors

ALONE = [name for name in KINDS if name not in {"falcon-multi-query", "phi3", "phi3-partial-gqa"}]
"""phi3's q, k and v are one tensor that its own class splits; a multi-query model has nothing to share."""
BLIND: dict[str, Any] = dict(refit=False)


def uneven(num_heads: int) -> Groups:
    """All but the last share one K/V head."""
    return Groups((*(0,) * (num_heads - 1), 1))


def shared(site: Site, number: int, kinds: str) -> Groups:
    """Groups of the source's K/V heads: unequal at even sites and one group at odd ones, where the order is free. Groups that one norm
    spans have one size."""
    count = site.num_kv_heads
    if kinds == "counts" and number % 2 and site.query_order != "stack":
        return Groups((0,) * count)
    return Groups.contiguous(count, 2) if site.key_freedom.norm_spans_heads else uneven(count)


def opened(directory: Path) -> Any:
    # The grouped matmul that transformers picks for experts has no float64.
    return headfold.load(directory, experts_implementation="eager")


def planned(directory: Path, kinds: str, target: Path) -> Plan:
    headfold.plan(directory, target, kv_heads=1, group="contiguous", merge="mean")
    made, sites = Plan.load(target), {site.name: site for site in open_source(directory).sites}
    rows = {
        name: replace(row, groups=shared(sites[name], number, kinds))
        for number, (name, row) in enumerate(made.sites.items())
    }
    made = replace(made, sites=rows)
    target.write_text(json.dumps(made.to_json()))
    return made


def matrix_bytes(directory: Path) -> int:
    tensors = load_file(directory / "model.safetensors").values()
    return sum(tensor.nbytes for tensor in tensors if tensor.ndim == 2)


@torch.no_grad()
def twin_answer(directory: Path, plan: Plan, name: str, at: Path) -> torch.Tensor:
    """The head-repeated twin under stock transformers."""
    tensors: Mapping[str, torch.Tensor] = open_source(directory).checkpoint.read
    model = stock_model(directory)
    parameters = dict(model.named_parameters())
    for site, _ in tiny_sites(directory):
        if site.name in plan.sites:
            for key, tensor in site_tensors(site, plan, tensors, num_kv_heads=site.num_kv_heads).items():
                parameters[site.parameters[key]].copy_(tensor)
    return answer_of(model, tiny_sample(name))


@pytest.mark.parametrize(
    ("name", "kinds"), [*((name, "sizes") for name in ALONE), *((name, "counts") for name in ALONE if name in COVER)]
)
def test_a_plan_of_unequal_groups_folds(name: str, kinds: str, tmp_path: Path) -> None:
    directory = tiny_checkpoint(name)
    plan = planned(directory, kinds, tmp_path / "plan.json")
    result = headfold.fold(directory, tmp_path / "out", plan=tmp_path / "plan.json", **BLIND)
    assert result.verification is not None and result.verification.passed
    found = answer_of(opened(tmp_path / "out"), tiny_sample(name)).detach()
    expected = twin_answer(directory, plan, name, tmp_path)
    grade = assert_tight_through_float32_norms if name in FLOAT32_NORMS | set(DISTINCT) else assert_tight
    grade(found, expected)
    assert_differs(found, answer_of(stock_model(directory), tiny_sample(name)).detach())
    assert result.kv_bytes_after < result.kv_bytes_before
    least, most = min(plan.num_kv_heads.values()), max(plan.num_kv_heads.values())
    assert (result.num_kv_heads_least, result.num_kv_heads_after) == (least, most)
    assert (
        f"with {most if least == most else f'{least} to {most}'} K/V heads" in (tmp_path / "out/README.md").read_text()
    )


@pytest.mark.parametrize(
    ("name", "kinds", "layout"),
    [("llama", "sizes", "padded"), ("llama", "counts", "per-layer"), ("qwen3", "counts", "per-layer")],
)
def test_a_stock_layout_is_chosen_where_there_is_one(name: str, kinds: str, layout: str, tmp_path: Path) -> None:
    directory = tiny_checkpoint(name)
    planned(directory, kinds, tmp_path / "plan.json")
    result = headfold.fold(directory, tmp_path / "out", plan=tmp_path / "plan.json", **BLIND)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert any(f"layout {layout}:" in note for note in result.notes) and "headfold" not in config
    found = answer_of(headfold.load(tmp_path / "out"), tiny_sample(name))
    ours = headfold.fold(directory, tmp_path / "own", plan=tmp_path / "plan.json", layout="headfold", **BLIND)
    assert "headfold" in json.loads((tmp_path / "own/config.json").read_text()) and ours.plan == result.plan
    assert_tight_through_float32_norms(
        found.detach(), answer_of(headfold.load(tmp_path / "own"), tiny_sample(name)).detach()
    )
    for made, out in ((result, "out"), (ours, "own")):  # the price knows of zero heads
        assert made.after.weight_bytes - made.before.weight_bytes == matrix_bytes(tmp_path / out) - matrix_bytes(
            directory
        )
    assert result.after.weight_bytes > ours.after.weight_bytes


def test_a_plan_that_lacks_an_attention_is_refused(tmp_path: Path) -> None:
    directory = tiny_checkpoint("llama")
    made = planned(directory, "sizes", tmp_path / "plan.json")
    name, *others = made.sites
    (tmp_path / "plan.json").write_text(json.dumps(replace(made, sites={n: made.sites[n] for n in others}).to_json()))
    with pytest.raises(UserError, match=f"site {name} is not in the plan"):
        headfold.fold(directory, tmp_path / "out", plan=tmp_path / "plan.json", **BLIND)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json"]


def test_a_fused_class_with_one_count_says_what_it_cannot_be(tmp_path: Path) -> None:
    directory = tiny_checkpoint("phi3")
    planned(directory, "counts", tmp_path / "plan.json")
    with pytest.raises(UserError, match="q, k and v are one tensor on disk; got 1, 2 K/V heads"):
        headfold.fold(directory, tmp_path / "out", plan=tmp_path / "plan.json", **BLIND)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json"]


@pytest.mark.parametrize("layout", ["headfold", "per-layer", "decilm"])
def test_a_fold_without_one_count_is_not_folded_again(layout: str, tmp_path: Path) -> None:
    directory = tiny_checkpoint("llama")
    made = planned(directory, "counts", tmp_path / "plan.json")
    even = {
        name: replace(row, groups=Groups.contiguous(row.groups.num_heads, 1 + i))
        for i, (name, row) in enumerate(made.sites.items())
    }
    (tmp_path / "plan.json").write_text(json.dumps(replace(made, sites=even).to_json()))
    headfold.fold(directory, tmp_path / "out", plan=tmp_path / "plan.json", layout=layout, **BLIND)
    assert answer_of(headfold.load(tmp_path / "out"), tiny_sample("llama")).isfinite().all()
    with pytest.raises(UserError, match="already folded, with K/V heads that differ in group size, count or head_dim"):
        headfold.fold(tmp_path / "out", tmp_path / "again", kv_heads=1, **BLIND)


def test_a_layout_whose_counts_are_not_the_plans_is_refused(tmp_path: Path) -> None:
    directory = tiny_checkpoint("llama")
    planned(directory, "counts", tmp_path / "plan.json")
    headfold.fold(directory, tmp_path / "out", plan=tmp_path / "plan.json", **BLIND)
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["num_key_value_heads"] += 1
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="one was changed after the fold"):
        headfold.load(tmp_path / "out")


def broken(name: str, change: Callable[[int, dict[str, Any]], None], target: Path) -> Path:
    planned(tiny_checkpoint(name), "sizes", target)
    data = json.loads(target.read_text())
    for number, row in enumerate(data["sites"].values()):
        change(number, row)
    target.write_text(json.dumps(data))
    return target


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama", lambda i, row: row["kv_of_source_head"].append(0), "expected 8 entries, one per K/V head, got 9"),
        ("llama", lambda i, row: row.update(head_dim=99), "expected the source's 8 or a multiple of it, got 99"),
        ("bloom", lambda i, row: row["kv_of_source_head"].reverse(), "only neighbours can share"),
        ("t5", lambda i, row: row["kv_of_source_head"].__setitem__(i % 2, 1), "need the same groups"),
    ],
)
def test_a_plan_that_a_site_cannot_have_is_refused(
    name: str, change: Callable[[int, dict[str, Any]], None], words: str, tmp_path: Path
) -> None:
    plan = broken(name, change, tmp_path / "plan.json")
    with pytest.raises(UserError, match=words) as refusal:
        headfold.fold(tiny_checkpoint(name), tmp_path / "out", plan=plan, **BLIND)
    assert "\n" not in str(refusal.value) and sorted(p.name for p in tmp_path.iterdir()) == ["plan.json"]
