"""Healing the whole model brings its output nearer to the original's on data that it is not trained on, for every family."""

from collections.abc import Mapping
from math import inf, log2, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from grades import assert_bitwise, assert_differs
from hypothesis import given
from hypothesis import strategies as st
from kinds import COVER
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from test_fold import CALIBRATED, readable, same_bytes  # noqa: F401 (a fixture)
from test_heal import spoilt
from tiny import stock_model, tiny_checkpoint, tiny_sample, tiny_sites, tiny_tokens
from torch import Tensor

import headfold
from headfold import answers, calibration, hf_models
from headfold.calibration import decoder_inputs
from headfold.core.errors import UserError
from headfold.descent import descend as descent
from headfold.divergence import kl_divergence, output_error
from headfold.families.layout import write_heads
from headfold.refine import distill as distilling
from headfold.refine.distill import distill, total_tokens
from headfold.refine.scope import Healing

NUM_ITEMS = 16


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """An item each: 14 to train on, two held back."""
    monkeypatch.setattr(distilling, "BATCH_TOKENS", 1)
    monkeypatch.setattr(calibration, "ITEMS_PER_BATCH", 1)
    monkeypatch.setattr(calibration, "RECORDINGS_PER_BATCH", 1)


def distilled(name: str, steps: int = 30) -> tuple[dict[str, Any], list[int]]:
    """Every site of a tiny model from spoilt heads, and the tokens that progress heard."""
    directory, heard = tiny_checkpoint(name), list[int]()
    pairs = {site.name: (site, heads) for site, heads in tiny_sites(directory)}
    sample = tiny_sample(name, NUM_ITEMS)
    found = distill(
        stock_model(directory), [site for site, _ in pairs.values()], lambda site: spoilt(*pairs[site.name]),
        sample, tokens=steps * calibration.total_tokens(sample), progress=heard.append,
    )  # fmt: skip
    return found, heard


@torch.no_grad()
def lacking(name: str, heads_of: dict[str, Any], batch: Mapping[str, Tensor]) -> float:
    """The error of the stock model with these heads written into its own parameters."""
    directory = tiny_checkpoint(name)
    original, changed = stock_model(directory), stock_model(directory)
    for site, _ in tiny_sites(directory):
        for key, tensor in write_heads(site, heads_of[site.name]).items():
            changed.get_parameter(site.parameters.get(key, key)).copy_(tensor)
    given = dict(batch)
    labels = given.pop("labels", None)
    if original.config.is_encoder_decoder and "decoder_input_ids" not in given:
        given["decoder_input_ids"] = decoder_inputs(original, labels)
    return float(output_error(changed(**given), original(**given), labels, given.get("attention_mask")))


@pytest.mark.parametrize("name", COVER)
def test_the_output_comes_nearer_to_the_originals(name: str) -> None:
    """On one batch, again and again; the stock model with the healed heads written into it has the smaller error."""
    sample, pairs = tiny_sample(name, NUM_ITEMS), tiny_sites(tiny_checkpoint(name))
    before = {site.name: spoilt(site, heads) for site, heads in pairs}
    found, heard = distilled(name)
    after = {site.name: found[site.name].to("cpu", torch.float64).onto(heads) for site, heads in pairs}
    assert lacking(name, after, sample) < 0.85 * lacking(name, before, sample)
    assert all(one.is_complete for one in found.values())
    assert sum(heard) == total_tokens(sample, 30 * calibration.total_tokens(sample))


@pytest.mark.parametrize("name", ["llama", "t5", "whisper", "clip", "vit", "bert"])
def test_the_error_is_that_of_the_stock_model(name: str) -> None:
    """With an encoder's output that both models share, and with what the decoder reads if the data say it (Whisper's prompts)."""
    pairs = {site.name: (site, heads) for site, heads in tiny_sites(tiny_checkpoint(name))}
    changed = {site: spoilt(*pair) for site, pair in pairs.items()}
    sites = [site for site, _ in pairs.values()]
    sample = dict(tiny_sample(name, 3))
    if name == "whisper":
        sample["decoder_input_ids"] = tiny_sample(name, 6)["labels"][3:].clamp_min(1)
    student = distilling._Student(stock_model(tiny_checkpoint(name)), sites, lambda site: changed[site.name])
    with torch.no_grad():
        found = student.error(sample)
    assert float(found) == pytest.approx(lacking(name, changed, sample), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5", "whisper", "gpt2"])
def test_the_best_weights_are_kept(name: str, small_batches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps too large are taken back; those at the start are among what is kept."""
    monkeypatch.setattr(descent, "_first_step", lambda *_: 1e9)
    found, _ = distilled(name, steps=3)
    for site, heads in tiny_sites(tiny_checkpoint(name)):
        for field, tensor in found[site.name].to_tensors().items():
            assert_bitwise(tensor, getattr(spoilt(site, heads), field).float())


@pytest.mark.parametrize("name", ["llama", "t5", "vit", "whisper"])
def test_progress_ends_where_it_should(name: str, small_batches: None) -> None:
    sample = tiny_sample(name, NUM_ITEMS)
    assert sum(distilled(name, steps=3)[1]) == total_tokens(sample, 3 * calibration.total_tokens(sample))


@given(log_lowest=st.floats(-12, 1), depth=st.floats(1e-3, 1e3), start=st.floats(0.1, 10))
def test_the_first_step_is_as_long_as_the_error_falls(log_lowest: float, depth: float, start: float) -> None:
    """A parabola's lowest point is found exactly."""
    lowest = 2.0**log_lowest
    tried = list[float]()

    def error_at(length: float) -> float:
        tried.append(length)
        return start + depth * ((length / lowest - 1) ** 2 - 1)

    assert descent._least(error_at) == pytest.approx(lowest, rel=1e-6)
    assert len(tried) <= 4 + abs(log2(lowest / descent.TRIED))


def test_the_first_step_is_short_of_what_is_not_finite_and_none_where_errors_only_rise() -> None:
    assert descent._least(lambda length: 1 + length) == 0.0
    assert descent._least(lambda length: nan if length else 1.0) == 0.0
    limit = 3 * descent.TRIED
    assert limit / 4 < descent._least(lambda length: 1 - length if length < limit else inf) < limit


@pytest.mark.parametrize("name", ["t5", "whisper", "moonshine"])
def test_an_encoder_that_is_not_folded_runs_once_for_a_batch(
    name: str, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, sample, runs = tiny_checkpoint(name), tiny_sample(name, 4), list[int]()
    pairs = {site.name: (site, heads) for site, heads in tiny_sites(directory) if site.stack == "decoder"}
    model = stock_model(directory)
    model.get_encoder().register_forward_hook(lambda *_: runs.append(1))

    def found() -> dict[str, Any]:
        runs.clear()
        sites = [site for site, _ in pairs.values()]
        return distill(
            model, sites, lambda site: spoilt(*pairs[site.name]), sample, tokens=9 * calibration.total_tokens(sample)
        )

    kept = found()
    assert len(runs) == 4
    monkeypatch.setattr(answers, "KEPT_BYTES", 0)
    again = found()
    assert len(runs) > 4
    for site in pairs:
        for field, tensor in kept[site].to_tensors().items():
            assert_bitwise(tensor, again[site].to_tensors()[field])


@pytest.mark.parametrize(
    ("name", "kept_as"), [("llama", "states"), ("gemma2", "outputs"), ("granite", "outputs"), ("bert", "states")]
)
def test_the_original_runs_once_for_a_batch_that_is_held_back(
    name: str, kept_as: str, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is kept of its outputs, and without, weights are the same; also where logits are capped or scaled behind the head."""
    pairs = {site.name: (site, heads) for site, heads in tiny_sites(tiny_checkpoint(name))}
    model, sample, runs = stock_model(tiny_checkpoint(name)), tiny_sample(name, NUM_ITEMS), list[int]()
    made, begin = list[answers.Answers](), answers.Answers.__init__

    def begun(self: answers.Answers, *args: Any, **options: Any) -> None:
        made.append(self)
        begin(self, *args, **options)

    monkeypatch.setattr(answers.Answers, "__init__", begun)
    model.register_forward_hook(lambda module, *_: runs.append(1) if module is model else None)  # not its copy
    monkeypatch.setattr(distilling, "ONCE_TOKENS", calibration.total_tokens(sample) // 6)

    def found() -> dict[str, Any]:
        runs.clear()
        return distill(
            model, [site for site, _ in pairs.values()], lambda site: spoilt(*pairs[site.name]), sample, tokens=None
        )

    kept = found()
    steps, held = len(distilling._batches(sample, None)[0]), 1
    assert len(runs) == steps + held
    assert {kind: len(vars(made[0])[f"_{kind}"]) for kind in ("states", "outputs")} == {
        "states": 0,
        "outputs": 0,
        kept_as: held,
    }
    monkeypatch.setattr(answers, "KEPT_BYTES", 0)
    again = found()
    assert len(runs) > steps + held
    for site in pairs:
        for field, tensor in kept[site].to_tensors().items():
            assert_bitwise(tensor, again[site].to_tensors()[field])


def test_the_original_stays_as_it_was(small_batches: None) -> None:
    directory = tiny_checkpoint("llama")
    model, pairs = stock_model(directory), {site.name: (site, heads) for site, heads in tiny_sites(directory)}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    sites = [site for site, _ in pairs.values()]
    sample = tiny_sample("llama", NUM_ITEMS)
    found = [
        distill(model, sites, lambda site: spoilt(*pairs[site.name]), sample, tokens=3000, seed=seed)
        for seed in (0, 0, 1)
    ]
    for name, parameter in model.named_parameters():
        assert_bitwise(parameter, before[name])
        assert parameter.requires_grad and parameter.grad is None
    for site in sites:
        first, again, other = (one[site.name].to_tensors() for one in found)
        for field, tensor in first.items():
            assert_bitwise(tensor, again[field])
            assert_differs(tensor, other[field])


@pytest.mark.parametrize(("tokens", "white"), [(None, True), (100, True), (513, True), (767, True), (769, False)])
def test_a_training_near_one_pass_takes_its_steps_in_white_coordinates(
    tokens: int | None, white: bool, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = list[bool]()

    def descend(weights: Any, moments: Any, *_: Any) -> Any:
        given.append(moments is not None)
        return [each.fitted() for each in weights]

    monkeypatch.setattr(distilling, "descend", descend)
    pairs = {site.name: (site, heads) for site, heads in tiny_sites(tiny_checkpoint("llama"))}
    sample = {"input_ids": tiny_tokens(16, 32)}  # 512 tokens
    sites = [site for site, _ in pairs.values()]
    distill(stock_model(tiny_checkpoint("llama")), sites, lambda site: pairs[site.name][1], sample, tokens=tokens)
    assert given == [white]


def test_a_training_on_a_part_of_the_data_holds_a_part_of_them_back() -> None:
    sample = {"input_ids": torch.zeros(64, 1024, dtype=torch.int64)}
    assert total_tokens(sample, 8 * 1024) < 2 * 8 * 1024
    # One window is held back, however little is trained.
    assert total_tokens(sample, 1) == 1 + (3 + descent.USUAL_TRIES) * 1024
    assert len(distilling._batches(sample, 1)[0]) == 2
    assert total_tokens(sample, 63 * 1024) == total_tokens(sample, 64 * 1024) - 1024


HEALED: dict[str, Any] = dict(
    kv_heads=2, calibration="self", **CALIBRATED, heal=True, heal_by="model", heal_tokens=2048
)


@pytest.mark.parametrize("how", [{}, {"head_dim_multiple": 2}], ids=["plain", "wide"])
def test_a_healed_fold_is_verified_and_says_so(how: dict[str, Any], readable: Path, tmp_path: Path) -> None:  # noqa: F811
    plain, found = (
        headfold.fold(readable, tmp_path / name, **{**HEALED, **how, "refit": False, **more})
        for name, more in (("plain", dict(heal=False, heal_by=None, heal_tokens=None)), ("healed", {}))
    )
    assert found.verification.passed and found.healed == 2048 and found.healed_by == "model"
    losses = [headfold.eval(made.out, reference=readable, limit=512, context=32).kl for made in (plain, found)]
    assert losses[1] < losses[0]
    card = (found.out / "README.md").read_text()
    assert "trained together, on 2,048 tokens" in card and "--heal --heal-by model --heal-tokens 2048" in card


def test_a_healing_that_was_killed_ends_in_the_same_bytes(
    readable: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    headfold.fold(readable, tmp_path / "calm", **HEALED)
    descend = distilling.descend

    def killed(*given: Any) -> Any:
        descend(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(distilling, "descend", killed)
    with pytest.raises(KeyboardInterrupt):
        headfold.fold(readable, tmp_path / "out", **HEALED)
    monkeypatch.setattr(distilling, "descend", descend)
    headfold.fold(readable, tmp_path / "out", **HEALED)
    same_bytes(tmp_path / "calm", tmp_path / "out")


def test_a_model_on_disk_is_healed_block_by_block() -> None:
    model = stock_model(tiny_checkpoint("llama")).to("meta")
    pairs = {site.name: (site, heads) for site, heads in tiny_sites(tiny_checkpoint("llama"))}
    sites = [site for site, _ in pairs.values()]
    with pytest.raises(UserError, match="--heal-by block"):
        distill(model, sites, lambda site: pairs[site.name][1], tiny_sample("llama", 2))


def test_a_model_too_large_to_train_is_refused_before_anything_is_made(
    readable: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hf_models, "available_memory", lambda device: 2e5)
    with pytest.raises(UserError, match=r"--heal-by block, which trains one block at a time"):
        headfold.fold(readable, tmp_path / "out", **HEALED)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_an_error_that_is_no_number_is_refused() -> None:
    directory = tiny_checkpoint("llama")
    pairs = {site.name: (site, heads) for site, heads in tiny_sites(directory)}
    model = stock_model(directory)
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(torch.nan)
    with pytest.raises(UserError, match="finite error to begin with, got nan"):
        distill(model, [site for site, _ in pairs.values()], lambda site: pairs[site.name][1], tiny_sample("llama", 2))


def test_outputs_of_an_unknown_kind_are_refused() -> None:
    with pytest.raises(UserError, match="got answers; give --heal-by block"):
        output_error({"answers": torch.ones(1)}, {"answers": torch.ones(1)}, None, None)


def test_a_scaled_gradient_in_float16_keeps_small_shares() -> None:
    """A position's share of thousands is below float16's range before it is scaled."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2048, 500, generator=generator)
    student = teacher + 0.05 * torch.randn(2048, 500, generator=generator)
    found = []
    for dtype in (torch.float64, torch.float16):
        leaf = student.to(dtype).requires_grad_()
        (distilling.SCALE * kl_divergence(leaf, teacher.to(dtype), None)).backward()
        found.append(leaf.grad.double())
    assert (found[0] - found[1]).norm() < 0.05 * found[0].norm()


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForQuestionAnswering"])
def test_other_heads_have_an_error_too(name: str) -> None:
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=16
        )
        one, other = (getattr(transformers, name)(config).eval() for _ in range(2))
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        same, different = (
            float(output_error(one(ids), model(ids), None, torch.ones_like(ids))) for model in (one, other)
        )
    assert abs(same) < 1e-6 < different


def test_what_is_trained_together_has_two_names(readable: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match="--heal-by layer: expected one of model, block"):
        headfold.fold(readable, tmp_path / "out", **{**HEALED, "heal_by": "layer"})
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("kind", "millions", "by"), [("text", 40, "block"), ("text", 70, "model"), ("audio", 70, "block")]
)
def test_large_language_models_are_healed_as_a_whole_by_default(kind: str, millions: int, by: str) -> None:
    size = millions * 10**6
    assert Healing.resolved(None, None, kind, size).by == by
    assert Healing.resolved(None, 77, kind, size) == Healing.resolved(by, 77, kind, size)
    assert Healing.resolved("model", None, "text", 1).tokens == distilling.TOKENS
