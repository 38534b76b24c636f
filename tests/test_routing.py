"""Routed models: without a route, with one, in training, decoding, saved and settled; over every page in headfold/runtime/routes."""

import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from grades import assert_bitwise, assert_differs, assert_tight
from test_routes import FORMS
from tiny import FOREIGN, TINY, randomise, tiny_sample
from torch import Tensor
from transformers import PreTrainedModel

from headfold import parallel, routing
from headfold.core.errors import UserError
from headfold.core.routes import Norms, RouteState, even, runs
from headfold.runtime.modeling_headfold import grouped_class


def grouped(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model whose 8 query heads read 4 K/V heads of unlike lengths, under the attention `headfold`."""
    if name in TINY:
        config = TINY[name](num_key_value_heads=4)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    else:
        config = FOREIGN[name].config(**({"num_attention_heads": 8} if name == "vit" else {}))
        config.headfold = {"sites": SITES[name]}
        model = grouped_class(FOREIGN[name].model_class)(config).double()
    randomise(model, seed)
    for path, parameter in model.named_parameters():
        if re.search(r"(k_proj|key|SelfAttention\.k)\.weight", path):
            parameter.data *= torch.linspace(1, 1.6, 4).repeat_interleave(len(parameter) // 4)[:, None]
    model.set_attn_implementation("headfold")
    return model.eval()


def _sites(template: str, heads: int, dim: int, names: Sequence[str], **more: Any) -> list[dict[str, Any]]:
    shape = {"heads": heads, "kv_heads": heads // 2, "head_dim": dim, **dict(zip("qkv", names, strict=True)), **more}
    return [{"module": template.format(layer), **shape} for layer in range(2)]


_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
SITES = {
    "vit": _sites("vit.layers.{}.attention", 8, 3, _PROJECTIONS),
    "bert": _sites("bert.encoder.layer.{}.attention.self", 8, 5, ("query", "key", "value")),
    "t5": _sites("decoder.block.{}.layer.0.SelfAttention", 8, 5, "qkv"),
    "gpt2": _sites("transformer.h.{}.attn", 8, 5, _PROJECTIONS, fused="c_attn"),
}
MODELS = ["llama", "qwen3", *SITES]


def answer(model: PreTrainedModel, sample: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**sample).logits


def one_of(sample: dict[str, Tensor], item: int) -> dict[str, Tensor]:
    return {name: tensor[item : item + 1] for name, tensor in sample.items()}


def trained(model: PreTrainedModel, sample: dict[str, Tensor], steps: int = 3) -> PreTrainedModel:
    """After some passes in training mode, with gradients and no step of an optimiser; in eval mode again."""
    model.train()
    for _ in range(steps):
        model(**sample).logits.sum().backward()
    return model.eval()


def sizes_of(model: PreTrainedModel) -> list[tuple[int, ...]]:
    return [router.state.sizes for router in routing.routers(model).values()]


@pytest.mark.parametrize("name", MODELS)
def test_static_is_no_route(name: str) -> None:
    model, sample = grouped(name), tiny_sample(name)
    before = answer(model, sample)
    assert len(routing.attach(model, "static")) == 2
    assert_bitwise(answer(model, sample), before)
    assert_bitwise(answer(trained(model, sample), sample), before)
    routing.freeze(model)
    assert_bitwise(answer(model, sample), before)
    routing.attach(model, "kdgqa:published=true")
    assert_differs(answer(model, sample), before)
    routing.detach(model)
    assert_bitwise(answer(model, sample), before)
    assert not any("route" in name for name in model.state_dict())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_dependence_on_the_batch_is_declared(name: str, form: str) -> None:
    """What a trained model says of items, alone and beside others."""
    model, sample = grouped(name), tiny_sample(name, num_items=5)
    routing.attach(model, form)
    trained(model, sample)
    beside, alone = answer(model, sample), torch.cat([answer(model, one_of(sample, item)) for item in range(5)])
    if routing.depends_on_batch(routing.parse(form)):
        assert_differs(alone, beside)
    else:
        assert_tight(alone, beside)
        assert_bitwise(answer(model, sample), beside)
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "k_proj" in name)


@pytest.mark.parametrize("name", MODELS)
def test_a_route_moves_who_reads_what(name: str) -> None:
    """The answer is that of the model whose groups are set by hand to what the frozen route says."""
    model, sample = grouped(name), tiny_sample(name)
    routing.attach(model, "kdgqa")
    maps = routing.freeze(model, [sample])
    assert list(maps.values()) != [runs(even(len(kv), max(kv) + 1)) for kv in maps.values()]
    routed = answer(model, sample)
    assert_bitwise(answer(trained(model, tiny_sample(name, seed=7)), sample), routed)  # nothing moves any more
    assert all(router.state.step == 0 and router.state.count == 2 for router in routing.routers(model).values())
    routing.detach(model)
    assert_differs(answer(model, sample), routed)
    for path, kv_of_query in maps.items():
        by_hand(model, path, kv_of_query)
    assert_tight(answer(model, sample), routed)


def test_processes_share_what_a_route_is_frozen_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch is run by one process, and the norms of all enter the state in the order of the batches."""
    sample, passes = tiny_sample("llama", num_items=5), []
    batches = [one_of(sample, item) for item in range(5)]

    def frozen(rank: int | None) -> list[tuple[RouteState, ...]]:
        model = grouped("llama")
        routing.attach(model, "dgqa:window=2")
        monkeypatch.setattr(parallel, "falls_here", lambda number: rank is None or number % 2 == rank)
        routing.freeze(model, batches)
        return [router.state for router in routing.routers(model).values()]

    def of_all(own: list[tuple[int, dict[str, list[Norms]]]]) -> list[list[tuple[int, dict[str, list[Norms]]]]]:
        passes.append(own)
        return [passes[1], passes[0]] if len(passes) == 2 else [own]

    alone = frozen(None)
    monkeypatch.setattr(parallel, "all_gather", of_all)
    first = frozen(0)
    assert [number for number, _ in passes[0]] == [0, 2, 4]
    together = frozen(1)
    for one, both, half in zip(alone, together, first, strict=True):
        assert (one.sizes, one.step) == (both.sizes, both.step) == (both.sizes, 5)
        assert_bitwise(both.kept, one.kept)
        assert_differs(half.kept, one.kept)


def test_settling_asks_nobody_how_items_were_put_together() -> None:
    """The same cut from one batch and from its items one by one, after training too, in which batches cut for themselves."""
    sample, maps = tiny_sample("llama", num_items=6), []
    for batches in ([sample], [one_of(sample, item) for item in range(6)]):
        for steps in (0, 2):
            model = grouped("llama")
            routing.attach(model, "kdgqa")
            trained(model, tiny_sample("llama", seed=3), steps)
            maps.append(routing.freeze(model, batches))
    assert maps[0] == maps[2] and maps[1] == maps[3]
    model, used = grouped("llama"), []
    routing.attach(model, "kdgqa:published=true")

    def watched() -> Iterator[dict[str, Tensor]]:
        for item in range(3):
            yield one_of(sample, item)
            used.append(model.model.layers[1].self_attn.kv_of_query)

    settled = routing.freeze(model, watched())
    assert used == [runs(even(8, 4))] * 3 and used[0] not in settled.values()


def by_hand(model: PreTrainedModel, path: str, kv_of_query: Sequence[int]) -> None:
    """K and V repeated for every query head, so that no attention needs to know of groups."""
    module = model.get_submodule(path)
    site = getattr(module, "headfold_site", {"q": "q_proj", "k": "k_proj", "v": "v_proj", "head_dim": 8})
    for role in "kv":
        linear = getattr(module, site[role])
        for parameter in filter(lambda p: p is not None, (linear.weight, linear.bias)):
            parameter.data = parameter.data.unflatten(0, (-1, site["head_dim"]))[list(kv_of_query)].flatten(0, 1)
        linear.out_features = len(linear.weight)
    module.num_key_value_groups, module.kv_of_query = 1, None
    if hasattr(module, "headfold_site"):
        module.headfold_site = site | {"kv_heads": site["heads"]}


def test_eager_attention_is_routed_too() -> None:
    """With weights, in a class that has an own forward and in one that has none."""
    for name in ("gpt2", "bert", "llama"):
        model, sample = grouped(name), tiny_sample(name)
        routing.attach(model, "kdgqa:published=true")
        ours, moved = answer(model, sample), sizes_of(model)
        answer(model, one_of(sample, 0))
        model.set_attn_implementation("eager")
        with torch.no_grad():
            said = model(**sample, output_attentions=True)
        assert (ours - said.logits)[0].abs().max() < 1e-4 and said.attentions[0].shape[1] == 8, name
        assert sizes_of(model) == moved != [even(8, 4)] * 2


def test_padding_does_not_count() -> None:
    """Repaired routes measure the same of a padded sample as of the sample alone; the published one measures padding too."""
    key = torch.randn(1, 4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    padded = torch.cat([100 * torch.ones(1, 4, 3, 8, dtype=torch.float64), key], 2)
    causal = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril() & (torch.arange(9) >= 3)
    added = torch.zeros(causal.shape, dtype=torch.float64).masked_fill(~causal, torch.finfo(torch.float64).min)
    for mask in (causal, added):
        found = routing.key_norms(padded, mask)
        assert_tight(found.per_token, routing.key_norms(key, None).per_token)
        assert_differs(found.whole, routing.key_norms(key, None).whole)
    assert_tight(routing.key_norms(key, None).whole, key.flatten(2).norm(dim=2))
    wide = routing.key_norms(key, None, slots=2).whole
    assert_tight(wide, key.view(1, 2, 2, 6, 8).flatten(2).norm(dim=2))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("form", ["kdgqa", "kdgqa:published=true", "dgqa:published=true"])
def test_decoding_caches_groups_alone(name: str, form: str) -> None:
    """A settled route writes what it would without a cache; the published one moves from step to step, over the same cache."""
    model = grouped(name)
    routing.attach(model, form)
    ids = tiny_sample(name)["input_ids"]
    frozen = "published" not in form
    if frozen:
        routing.freeze(model, [{"input_ids": ids}])
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "min_new_tokens": 5}
    made = model.generate(**asked, do_sample=False, return_dict_in_generate=True)
    groups = next(iter(routing.routers(model).values())).state.sizes
    assert {layer.keys.shape[1] for layer in made.past_key_values.layers} == {len(groups)}
    if frozen:
        plain = model.generate(**asked, do_sample=False, use_cache=False)
        assert made.sequences.tolist() == plain.tolist()


def test_recomputing_cuts_nothing_anew() -> None:
    """Gradient checkpointing runs a layer twice: one step of the window, the same map, the same noise."""
    sample = tiny_sample("llama")
    for form in ("dgqa:window=2", "kdgqa", "pgqa"):
        grads, states = [], []
        for recompute in (False, True):
            model = grouped("llama")
            routing.attach(model, form)
            if recompute:
                model.activation_checkpointing_enable()
            trained(model, sample)
            grads.append(model.get_parameter("model.layers.0.self_attn.k_proj.weight").grad)
            states.append([router.counts.tolist() for router in routing.routers(model).values()])
        assert states[0] == states[1] and any(map(any, states[0]))
        assert_tight(*grads)


def test_the_state_survives_saving(tmp_path: Path) -> None:
    """As a Trainer resumes: the model's own files hold it, and another model with the route attached takes it up."""
    from safetensors.torch import load_file

    model, sample = grouped("llama"), tiny_sample("llama")
    for form in ("dgqa:window=2", "kdgqa", "dgqa:published=true"):
        routing.attach(model, form)
        trained(model, sample, steps=5)
        model.save_pretrained(tmp_path)
        other = grouped("llama", seed=1)
        routing.attach(other, form)
        problems = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
        assert not problems.unexpected_keys and sizes_of(other) == sizes_of(model)
        for ours, theirs in zip(routing.routers(model).values(), routing.routers(other).values(), strict=True):
            assert {name: x.tolist() for name, x in ours.named_buffers()} == {
                name: x.tolist() for name, x in theirs.named_buffers()
            }
        twin = copy.deepcopy(model)
        for each in (model, other, twin):
            trained(each, sample, steps=1)
        assert sizes_of(other) == sizes_of(twin) == sizes_of(model)
        routing.new_epoch(model)
        assert all(router.state.step == 0 for router in routing.routers(model).values())


def test_what_cannot_be_routed_is_refused() -> None:
    whole = transformers.AutoModelForCausalLM.from_config(TINY["llama"]())
    model, sample = grouped("llama"), tiny_sample("llama")
    refusals = {
        "expected attention with fewer K/V heads": lambda: routing.attach(whole, "kdgqa"),
        "unknown runtime routes method 'kdgq'; did you mean kdgqa": lambda: routing.attach(model, "kdgq"),
        "no option 'windows=3'": lambda: routing.attach(model, "dgqa:windows=3"),
        "found no route; attach one first": lambda: routing.freeze(model),
        "expected key norms to freeze on": lambda: (routing.attach(model, "dgqa"), routing.freeze(model)),
        "still changes; call freeze first": lambda: routing.frozen_plan(model, "0"),
    }
    for words, attempt in refusals.items():
        with pytest.raises(UserError) as refusal:
            attempt()
        assert words in str(refusal.value) and "\n" not in str(refusal.value)
    routing.attach(model, "kdgqa:published=true")
    routing.freeze(model, [sample])
    with pytest.raises(UserError, match=r"K/V head \d has no query head.*leave out published=true"):
        routing.frozen_plan(model, "0")


def test_a_resumed_trainer_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    """In the middle of a window: weights and routes are those of a run in one go."""
    ids = tiny_sample("llama", num_items=32)["input_ids"]
    data = [{"input_ids": row, "labels": row} for row in ids]

    def after(place: str, steps: int, resume: bool) -> PreTrainedModel:
        model = grouped("llama").float()
        routing.attach(model, "dgqa:window=3")
        asked = transformers.TrainingArguments(
            str(tmp_path / place), max_steps=steps, save_steps=4, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            lr_scheduler_type="constant", learning_rate=1e-2, disable_tqdm=True,
        )  # fmt: skip
        transformers.Trainer(model, asked, train_dataset=data).train(resume_from_checkpoint=resume)
        return model

    whole, _ = after("whole", 8, False), after("cut", 4, False)
    resumed = after("cut", 8, True)
    for name, tensor in whole.state_dict().items():
        assert_bitwise(resumed.state_dict()[name], tensor)
    assert all(router.state.step == 8 for router in routing.routers(resumed).values())
