"""Wide heads: fewer K/V heads of several heads' width, in stock classes and in slots."""

import pytest
from grades import assert_tight, assert_tight_through_float32_norms
from tiny import FLOAT32_NORMS, FOREIGN, TINY, answer_of, stock_model, tiny_checkpoint, tiny_sample, tiny_sites

from headfold.calibration import collect
from headfold.core.plan import not_wide
from headfold.planning import make_plan
from headfold.recipe.source import open_source
from headfold.runtime.wearing import wearing
from headfold.surgery import site_tensors

WIDE = sorted(
    name
    for name in [*TINY, *FOREIGN]
    if name != "clip"
    and not any(
        not_wide(site) or site.rigid or site.num_groups < 2 or ("qkv" in site.weights and site.native)
        for site, _ in tiny_sites(tiny_checkpoint(name))
    )
)


def graded(name: str):
    return assert_tight_through_float32_norms if name in FLOAT32_NORMS or name in FOREIGN else assert_tight


@pytest.mark.parametrize("name", WIDE)
def test_heads_as_wide_as_their_groups_are_large_lose_nothing_in_slots(name: str) -> None:
    source = open_source(tiny_checkpoint(name))
    model, read = stock_model(source.checkpoint.path), source.checkpoint.read
    stats = collect(model, source.sites, tiny_sample(name, 8, seed=1))
    width = 2
    plan = make_plan(source.sites, read, "1/1", source="tiny", stats=stats, head_width=width)
    expected = answer_of(model, tiny_sample(name))
    clothes = [
        (site, site_tensors(site, plan, read, stats, num_groups=site.num_groups), site.num_groups, width)
        for site in source.sites
    ]
    with wearing(model, clothes):
        graded(name)(answer_of(model, tiny_sample(name)), expected)
    graded(name)(answer_of(model, tiny_sample(name)), expected)
