"""WGQA in training: resumed, checkpointed, distributed, in half precision, and on a trained model."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from grades import assert_bitwise, assert_tight
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from weighted_folds import answer, attach, attached, backward, fold_of, linears, load

import headfold
from headfold.conversion.source import open_source
from headfold.corpus.samples import draw_sample
from headfold.train import wgqa

SHARED = Path(__file__).parents[2] / "shared"
KINDS = get_args(wgqa.Kind)


def steps(model: PreTrainedModel, optimizer: torch.optim.Optimizer, name: str, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        backward(model, name)
        optimizer.step()


def adam(model: PreTrainedModel) -> torch.optim.Optimizer:
    return torch.optim.Adam([{"params": parameters} for parameters in wgqa.trainable(model).values()], lr=1e-2)


@pytest.mark.parametrize("saved", ["torch", "save_pretrained"])
@pytest.mark.parametrize("name", ["llama-bias-gqa", "t5", "gpt2"])
def test_training_goes_on_where_it_was(name: str, saved: str, tmp_path: Path) -> None:
    spec = "wgqa:kind=row,init=random"
    model = attached(name, spec)
    optimizer = adam(model)
    steps(model, optimizer, name, 2)
    state, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    if saved == "save_pretrained":
        model.save_pretrained(tmp_path)
    steps(model, optimizer, name, 2)
    resumed = attached(name, spec, seed=1)
    if saved == "save_pretrained":
        load_model(resumed, tmp_path / "model.safetensors")
    else:
        resumed.load_state_dict(state)
    optimizer = adam(resumed)
    optimizer.load_state_dict(moments)
    steps(resumed, optimizer, name, 2)
    for ours, theirs in zip(resumed.parameters(), model.parameters(), strict=True):
        assert_bitwise(ours, theirs)


CALM: Mapping[str, Mapping[str, Any]] = {"llama-bias-gqa": {}, "t5": {"dropout_rate": 0.0}}


def gradients(model: PreTrainedModel) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def counted(model: PreTrainedModel) -> list[None]:
    """Gets one entry longer with every weighted sum."""
    made: list[None] = []
    for heads in wgqa.attached(model):
        heads.register_forward_hook(lambda *_: made.append(None))
    return made


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", ["false", "true"])
@pytest.mark.parametrize("name", CALM)
def test_gradient_checkpointing_changes_nothing(name: str, frozen: str, reentrant: bool) -> None:
    spec = f"wgqa:kind=column,frozen={frozen}"
    plain, saving = (attached(name, spec, **CALM[name]).train() for _ in range(2))
    saving.activation_checkpointing_enable({"use_reentrant": reentrant})
    sums = {model: counted(model) for model in (plain, saving)}
    for model in sums:
        backward(model, name)
    assert len(sums[saving]) == 2 * len(sums[plain]) > 0  # made anew for the way back
    for ours, theirs in zip(gradients(saving), gradients(plain), strict=True):
        assert_tight(ours, theirs)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("frozen", ["false", "true"])
def test_distributed_data_parallel_finds_every_parameter(frozen: str, alone: None) -> None:
    """A parameter that the forward pass had not used would be an error in the second step."""
    name, spec = "llama-bias-gqa", f"wgqa:kind=row,frozen={frozen}"
    plain, model = attached(name, spec), attached(name, spec)
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        backward(plain, name)
        backward(parallel, name)
    for ours, theirs in zip(gradients(model), gradients(plain), strict=True):
        assert_bitwise(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama-bias-gqa", "gpt2"])
def test_half_precision_starts_at_the_mean_fold_too(name: str, kind: str) -> None:
    """And keeps coefficients in float32, where a step of a thousandth of them is not lost."""
    fold = fold_of(name, torch.bfloat16)
    model, mean = load(fold[1]), load(fold[1])
    attach(model, fold, f"wgqa:kind={kind}")
    assert {p.dtype for p in wgqa.trainable(model)["coefficients"]} == {torch.float32}
    for (*_, ours, _), (*_, plain, _) in zip(linears(model, name), linears(mean, name), strict=True):
        assert_bitwise(ours.weight, plain.weight)
        if plain.bias is not None:
            assert_bitwise(ours.bias, plain.bias)


def test_a_copy_has_coefficients_of_its_own() -> None:
    model = attached("llama-bias-gqa", "wgqa:kind=row")
    twin, before = copy.deepcopy(model), answer(model, "llama-bias-gqa")
    assert_bitwise(answer(twin, "llama-bias-gqa"), before)
    with torch.no_grad():
        for parameter in wgqa.trainable(twin)["coefficients"]:
            parameter.zero_()
    assert all(not linear.weight.any() and not linear.bias.any() for *_, linear, _ in linears(twin, "llama-bias-gqa"))
    assert_bitwise(answer(model, "llama-bias-gqa"), before)


@torch.no_grad()
def loss(model: PreTrainedModel, pairs: Mapping[str, Tensor]) -> Tensor:
    return model(**pairs).loss.view(1)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared models and data are not here")
@pytest.mark.parametrize("spec", ["wgqa:kind=scalar,frozen=true", "wgqa:kind=column"])
def test_a_trained_translator_learns_and_folds_away(spec: str, tmp_path: Path) -> None:
    """32 pairs, 8 a step."""
    path, data = SHARED / "models" / "multi30k-t5", SHARED / "data" / "multi30k"
    headfold.fold(path, tmp_path / "fold", kv_heads=4, group="contiguous", merge="mean", refit=False, verify=False)
    texts = f"{data}/train.en.gz,{data}/train.de.gz"
    pairs = draw_sample("pairs", texts, path=path, num_items=32, context=64, seed=0)
    model = load(tmp_path / "fold")
    attach(model, (open_source(path), tmp_path / "fold"), spec)
    before, found = loss(model, pairs), wgqa.trainable(model)
    optimizer = torch.optim.Adam([{"params": found["coefficients"], "lr": 2e-2}, {"params": found["weights"]}], lr=1e-3)
    for step in range(20):
        optimizer.zero_grad()
        first = 8 * (step % 4)
        model(**{name: column[first : first + 8] for name, column in pairs.items()}).loss.backward()
        optimizer.step()
    after = loss(model, pairs)
    assert after < 0.9 * before  # by 96 coefficients; with the weights, the pairs are soon known by heart
    wgqa.fold_away(model)
    model.save_pretrained(tmp_path / "trained")
    for folded in (model, load(tmp_path / "trained")):
        assert_bitwise(loss(folded, pairs), after)
    names = [load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("trained", "fold")]
    assert names[0] == names[1]
