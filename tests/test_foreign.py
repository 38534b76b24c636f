"""Laws of the families whose stock class does not read its count of K/V heads, each under its own class and inputs."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from grades import assert_bitwise, assert_differs, assert_tight, assert_tight_through_float32_norms
from random_sites import planted
from safetensors.torch import load_file
from tiny import FOREIGN, answer_of, rewritten, stock_model, tiny_checkpoint, tiny_sample
from torch import Generator, Tensor, nn

import headfold
from headfold.calibration import collect
from headfold.core.equivalents import random_equivalent, repeated_random_equivalent
from headfold.core.groups import Groups
from headfold.core.heads import Heads, KeyFreedom
from headfold.core.plan import Plan
from headfold.families import family_of
from headfold.families.folded import folded_config
from headfold.families.layout import check_shapes, planned_shapes, read_heads, renamed, write_heads
from headfold.families.spec import Site, sites
from headfold.planning import make_plan
from headfold.surgery import site_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EVERY = pytest.mark.parametrize("name", sorted(FOREIGN))
SHARING = pytest.mark.parametrize("name", sorted(set(FOREIGN) - {"falcon-multi-query"}))
"""Those with more than one K/V head."""
EAGER = frozenset({"gpt_neo", "gptj", "codegen", "bloom", "mpt"})
"""Classes that know eager attention alone, whose softmax is in float32 whatever the dtype of the weights."""
FLOAT32 = EAGER | {"modernbert", "esm", "eurobert"}
"""Those, and classes that compute their norms or rotary positions in float32."""
COPIES = 2

Change = Callable[[Site, Heads, int], Heads]


@dataclass(frozen=True, slots=True)
class Case:
    """A tiny checkpoint: its sites, its tensors by name on disk, and the stock model that loads it."""

    name: str
    config: dict
    sites: list[Site]
    tensors: Mapping[str, Tensor]
    model: "PreTrainedModel"

    def heads(self, site: Site) -> Heads:
        return read_heads(site, self.tensors.__getitem__)

    def changed(self, change: Change) -> dict[str, Tensor]:
        """The attention tensors once the heads of the i-th site are `change(site, heads, i)`."""
        made = (write_heads(site, change(site, self.heads(site), i)) for i, site in enumerate(self.sites))
        return {name: tensor for tensors in made for name, tensor in tensors.items()}

    @contextmanager
    def installed_heads(self, tensors: Mapping[str, Tensor]) -> Iterator["PreTrainedModel"]:
        """The stock model with other attention tensors, by their names on disk."""
        parameters = dict(self.model.named_parameters())
        places = {
            f"{on_disk}.{suffix}": parameters.get(f"{site.paths[role]}.{suffix}")
            for site in self.sites
            for role, on_disk in site.weights.items()
            for suffix in ("weight", "bias")
        }
        try:
            for name, tensor in tensors.items():
                places[name].data.copy_(tensor)
            yield self.model
        finally:
            for name in tensors:
                places[name].data.copy_(self.tensors[name])

    def answer(self, change: Change | None = None, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """What the stock model says with changed heads, or other tensors."""
        with self.installed_heads(tensors if tensors is not None else self.changed(change) if change else {}) as model:
            return answer_of(model, tiny_sample(self.name))


@cache
def case(name: str) -> Case:
    directory = tiny_checkpoint(name)
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    return Case(name, config, sites(family_of(config), config, tensors), tensors, stock_model(directory))


@cache
def plain_answer(name: str) -> Tensor:
    return case(name).answer()


def grade(name: str) -> Callable[[Tensor, Tensor], None]:
    return assert_tight_through_float32_norms if name in FLOAT32 else assert_tight


def seed_of(site: Site, index: int) -> int:
    """Return the same for all sites that must have one order of query heads."""
    return len(site.stack) if site.query_order == "stack" else 100 + index


def some_grouped(heads: Heads, num_kv_heads: int) -> Heads:
    """Heads of the wanted shape; which function they compute does not matter."""
    shared = Groups.contiguous(heads.num_heads, num_kv_heads)
    return replace(heads, k=heads.k[:num_kv_heads], v=heads.v[:num_kv_heads], groups=shared)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_read_is_written_back_bit_by_bit(name: str, dtype: torch.dtype) -> None:
    found = case(name)
    tensors = {tensor_name: tensor.to(dtype) for tensor_name, tensor in found.tensors.items()}
    for site in found.sites:
        check_shapes(site, lambda tensor_name: tuple(tensors[tensor_name].shape), name)
        written = write_heads(site, read_heads(site, tensors.__getitem__))
        assert written.keys() == {site.tensor(role) for role in site.weights} | {
            f"{site.weights[role]}.bias" for role in site.biases
        }
        for tensor_name, tensor in written.items():
            assert_bitwise(tensor, tensors[tensor_name])


@EVERY
def test_planned_shapes_are_the_shapes_written(name: str) -> None:
    found = case(name)
    for site in found.sites:
        heads = found.heads(site)
        for num_kv_heads in {heads.num_kv_heads, max(1, heads.num_kv_heads // 2), 1}:
            planned = planned_shapes(site, num_kv_heads, lambda tensor_name: tuple(found.tensors[tensor_name].shape))
            written = write_heads(site, some_grouped(heads, num_kv_heads))
            assert planned == {tensor_name: tuple(tensor.shape) for tensor_name, tensor in written.items()}
            gone = renamed(site, num_kv_heads)
            assert gone.keys().isdisjoint(planned) and {new for names in gone.values() for new in names} <= set(planned)
            assert set(planned) - {new for names in gone.values() for new in names} <= found.tensors.keys()


@EVERY
def test_the_sites_are_all_attentions_of_the_stock_model_where_it_has_them(name: str) -> None:
    found = case(name)
    modules = dict(found.model.named_modules())
    kinds = {type(modules[site.core]) for site in found.sites}
    assert {path for path, module in modules.items() if type(module) in kinds} == {site.core for site in found.sites}
    for site in found.sites:
        assert site.core == site.module or site.core.startswith(f"{site.module}.")
        linears = {
            path
            for path, module in modules.items()
            if path.startswith(f"{site.module}.") and (isinstance(module, nn.Linear) or hasattr(module, "nf"))
        }
        assert linears == {path for role, path in site.paths.items() if role != "bias_table"}
        for role, path in site.paths.items():
            assert (f"{path}.bias" in dict(found.model.named_parameters())) == (role in site.biases)


@pytest.mark.parametrize("name", sorted(set(FOREIGN) - {"eurobert"}))  # whose class counts K/V heads
def test_what_the_runtime_is_told_is_in_the_model(name: str) -> None:
    found = case(name)
    listed = folded_config(family_of(found.config), found.config, found.sites, {s.name: 1 for s in found.sites})
    for site, entry in zip(found.sites, listed["headfold"]["sites"], strict=True):
        module = found.model.get_submodule(entry["module"])
        for role in ("fused",) if "fused" in entry else ("q", "k", "v"):
            module.get_submodule(entry[role])
        assert (entry["heads"], entry["kv_heads"], entry["head_dim"]) == (site.num_heads, 1, site.head_dim)


WITH_A_HEAD = sorted(
    name for name, foreign in FOREIGN.items() if foreign.model_class.endswith(("LM", "Classification", "LMHeadModel"))
)


@pytest.mark.parametrize("name", WITH_A_HEAD)
def test_a_base_model_saved_alone_is_found_too(name: str, tmp_path: Path) -> None:
    found = case(name)
    found.model.base_model.save_pretrained(tmp_path)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    alone = sites(family_of(config), config, tensors)
    for site, other in zip(found.sites, alone, strict=True):
        assert other.name == site.name
        assert site.module == f"{found.model.base_model_prefix}.{other.module}"
        for path in other.paths.values():
            found.model.base_model.get_submodule(path)
        assert_bitwise(read_heads(other, tensors.__getitem__).k, found.heads(site).k)


def test_names_of_a_base_model_may_lie_under_a_class_with_a_head() -> None:
    """As the first GPT-2 and BLOOM checkpoints were published."""
    found = case("gpt2")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in found.tensors.items()}
    for site, other in zip(found.sites, sites(family_of(found.config), found.config, tensors), strict=True):
        assert other.paths == site.paths
        assert other.weights == {role: weight.removeprefix("transformer.") for role, weight in site.weights.items()}


@EVERY
def test_attention_cannot_see_what_key_freedom_allows(name: str) -> None:
    tensors = case(name).changed(lambda site, heads, i: random_equivalent(heads, seed_of(site, i)))
    assert any((tensors[key] - case(name).tensors[key]).abs().max() > 0.1 for key in tensors)
    grade(name)(case(name).answer(tensors=tensors), plain_answer(name))


def forbidden(site: Site) -> dict[str, KeyFreedom]:
    """Claims that would be wrong."""
    freedom = site.key_freedom
    if freedom.kind == "any":
        return {}
    wrong = {"any matrix": KeyFreedom("any"), "other layout": replace(freedom, interleaved=not freedom.interleaved)}
    if freedom.rotary_dim < site.head_dim and not freedom.interleaved:
        wrong["all dims rotate"] = replace(freedom, rotary_dim=site.head_dim)
    return wrong


@EVERY
def test_attention_sees_what_key_freedom_forbids(name: str) -> None:
    for freedom in forbidden(case(name).sites[0]).values():
        changed = case(name).answer(
            lambda site, heads, i, f=freedom: random_equivalent(replace(heads, key_freedom=f), i)
        )
        assert_differs(changed, plain_answer(name))
    # Nor does a law over models pass that never looks at K.
    assert_differs(case(name).answer(lambda site, heads, i: replace(heads, k=heads.k.flip(1))), plain_answer(name))


def shuffled(heads: Heads, seed: int) -> Heads:
    """K/V heads in another order with their query heads, and those in another order among themselves."""
    generator = Generator().manual_seed(seed)
    each = heads.num_heads // heads.num_kv_heads
    new = torch.randperm(heads.num_kv_heads, generator=generator)
    order = [int(group) * each + int(i) for group in new for i in torch.randperm(each, generator=generator)]
    return replace(heads.reorder(tuple(order)), k=heads.k[new], v=heads.v[new], groups=heads.groups)


@EVERY
def test_query_heads_move_as_the_site_says(name: str) -> None:
    """Free: each site may have its own order. Stack: all its sites have the same. Fixed: no other order."""
    found = case(name)
    orders = {site.query_order for site in found.sites}
    as_said = found.answer(
        lambda site, heads, i: heads if site.query_order == "fixed" else shuffled(heads, seed_of(site, i))
    )
    grade(name)(as_said, plain_answer(name))
    if orders != {"free"}:
        alone = found.answer(lambda site, heads, i: shuffled(heads, i) if site.query_order != "free" else heads)
        assert_differs(alone, plain_answer(name))


def test_every_query_order_has_a_witness() -> None:
    assert {site.query_order for name in FOREIGN for site in case(name).sites} == {"free", "stack", "fixed"}


@SHARING
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_fold_to_as_many_heads_is_the_source_bit_by_bit(name: str, dtype: torch.dtype) -> None:
    found = case(name)
    tensors = {tensor_name: tensor.to(dtype) for tensor_name, tensor in found.tensors.items()}
    plan = make_plan(found.sites, tensors.__getitem__, "1/1", source="tiny", merge="mean")
    for site in found.sites:
        for tensor_name, tensor in site_tensors(site, plan, tensors.__getitem__).items():
            assert_bitwise(tensor, tensors[tensor_name])


@dataclass(frozen=True, slots=True)
class Hidden:
    """A grouped model in the shape of its source, every K/V head `COPIES` times, each transformed differently, and its output."""

    tensors: Mapping[str, Tensor]
    stats: Mapping
    answer: Tensor

    def plan(self, found: Case, group: str, merge: str) -> Plan:
        read = self.tensors.__getitem__
        return make_plan(found.sites, read, "1/2", source="tiny", group=group, merge=merge, stats=self.stats)

    def folded(self, found: Case, plan: Plan) -> Tensor:
        """What the head-repeated twin of the fold says, under the stock class."""
        read, twin = self.tensors.__getitem__, {}
        for site in found.sites:
            twin |= site_tensors(site, plan, read, self.stats, num_kv_heads=site.num_kv_heads)
        return found.answer(tensors=twin)


@cache
def hidden(name: str) -> Hidden:
    found = case(name)
    made = found.changed(
        lambda site, heads, i: repeated_random_equivalent(
            some_grouped(heads, heads.num_kv_heads // COPIES), COPIES, seed_of(site, i)
        )
    )
    with found.installed_heads(made) as model:
        stats = collect(model, found.sites, tiny_sample(name, 8, seed=1))
    return Hidden({**found.tensors, **made}, stats, found.answer(tensors=made))


@SHARING
def test_swap_and_absorb_give_back_the_hidden_model(name: str) -> None:
    found, inside = case(name), hidden(name)
    plan = inside.plan(found, "swap", "absorb")
    for site in found.sites:
        assert plan.sites[site.name].groups == planted(read_heads(site, inside.tensors.__getitem__))
    grade(name)(inside.folded(found, plan), inside.answer)


@SHARING
def test_mean_pooling_loses_the_hidden_model(name: str) -> None:
    """Even with the right groups given."""
    found, inside = case(name), hidden(name)
    assert_differs(inside.folded(found, inside.plan(found, "swap", "mean")), inside.answer)


@SHARING
def test_a_grouped_checkpoint_runs_as_its_head_repeated_twin(name: str, tmp_path: Path) -> None:
    """What the literal tells the runtime is enough: fused projections gone, K/V heads fewer, the same function."""
    found = case(name)
    grouped = rewritten(
        tiny_checkpoint(name), tmp_path / "grouped", lambda heads, _: some_grouped(heads, heads.num_kv_heads // 2)
    )
    twin = found.answer(lambda _, heads, __: some_grouped(heads, heads.num_kv_heads // 2).expand(heads.num_kv_heads))
    assert_differs(twin, plain_answer(name))
    grade(name)(answer_of(headfold.load(grouped), tiny_sample(name)), twin)
