"""A GQA model hidden in an MHA one: absorb and swap find the groups and give back its logits, for every family."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from grades import assert_differs, assert_tight, assert_tight_through_float32_norms
from random_sites import planted
from safetensors.torch import load_file, save_file
from tiny import FLOAT32_NORMS, TINY, rewritten, stock_logits, stock_model, tiny_checkpoint, tiny_sites, tiny_tokens
from torch import Tensor

from headfold.calibration import collect
from headfold.core.equivalents import repeated_random_equivalent
from headfold.core.plan import Plan
from headfold.core.stats import SiteStats
from headfold.families import family_of
from headfold.families.folded import folded_config
from headfold.families.spec import Site
from headfold.planning import make_plan
from headfold.surgery import site_tensors

EVERY_TINY = pytest.mark.parametrize("name", sorted(TINY))
SHARED, COPIES = 2, 4
"""K/V heads of the hidden model, and how often each is written; all tiny models have eight query heads."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """An MHA checkpoint, what calibration sees of it, and the logits of the GQA model inside."""

    directory: Path
    sites: list[Site]
    tensors: dict[str, Tensor]
    stats: dict[str, SiteStats]
    logits: Tensor

    def plan(self, group: str, merge: str) -> Plan:
        read = self.tensors.__getitem__
        return make_plan(self.sites, read, SHARED, source="tiny", group=group, merge=merge, stats=self.stats)

    def folded(self, plan: Plan, out: Path) -> Path:
        """The checkpoint that the plan makes of it."""
        made = dict(self.tensors)
        for site in self.sites:
            made |= site_tensors(site, plan, self.tensors.__getitem__, self.stats)
        config = json.loads((self.directory / "config.json").read_text())
        out.mkdir()
        (out / "config.json").write_text(
            json.dumps(folded_config(family_of(config), config, self.sites, plan.num_kv_heads))
        )
        save_file(made, out / "model.safetensors", metadata={"format": "pt"})
        return out


@cache
def hidden(name: str) -> Hidden:
    source = tiny_checkpoint(name, num_key_value_heads=SHARED)
    directory = source.with_name(f"{source.name}-hidden")
    rewritten(source, directory, lambda heads, index: repeated_random_equivalent(heads, COPIES, seed=index))
    sites = [site for site, _ in tiny_sites(directory)]
    stats = collect(stock_model(directory), sites, {"input_ids": tiny_tokens(6, 16, seed=1)})
    return Hidden(directory, sites, load_file(directory / "model.safetensors"), stats, stock_logits(source))


def grade(name: str) -> Callable[[Tensor, Tensor], None]:
    """How equal two float64 models of the same function are."""
    return assert_tight_through_float32_norms if name in FLOAT32_NORMS else assert_tight


@EVERY_TINY
def test_the_random_equivalent_is_a_model_of_eight_heads_and_the_same_function(name: str) -> None:
    case = hidden(name)
    config = json.loads((case.directory / "config.json").read_text())
    assert {site.num_kv_heads for site in case.sites} == {SHARED * COPIES} == {config["num_key_value_heads"]}
    grade(name)(stock_logits(case.directory), case.logits)


@EVERY_TINY
def test_swap_and_absorb_give_back_the_hidden_model(name: str, tmp_path: Path) -> None:
    case = hidden(name)
    plan = case.plan("swap", "absorb")
    for site, heads in tiny_sites(case.directory):
        made = plan.sites[site.name]
        assert made.groups == planted(heads) and made.groups.sizes == (COPIES,) * SHARED
        lost = [made.error.key / made.energy.key, made.error.value / made.energy.value]
        grade(name)(1 + torch.tensor(lost).double(), torch.ones(2).double())
    out = case.folded(plan, tmp_path / "out")
    assert stock_model(out).config.num_key_value_heads == SHARED
    grade(name)(stock_logits(out), case.logits)


@EVERY_TINY
def test_mean_pooling_loses_the_hidden_model(name: str, tmp_path: Path) -> None:
    """Even with the right groups given."""
    case = hidden(name)
    assert_differs(stock_logits(case.folded(case.plan("swap", "mean"), tmp_path / "out")), case.logits)


@EVERY_TINY
def test_absorb_in_the_wrong_groups_loses_it_too(name: str, tmp_path: Path) -> None:
    case = hidden(name)
    plan = case.plan("contiguous", "absorb")
    assert plan.sites[case.sites[0].name].groups != planted(tiny_sites(case.directory)[0][1])
    assert_differs(stock_logits(case.folded(plan, tmp_path / "out")), case.logits)
