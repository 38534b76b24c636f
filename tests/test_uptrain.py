"""Training a fold on: what trains and what does not, what is learned, and that a kill costs no more than said."""

import json
import math
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from grades import assert_bitwise, assert_differs, assert_tight
from grouped_models import CASES, EVEN, Case
from safetensors.torch import load_file
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from tiny import stock_model, tiny_checkpoint, tiny_sample
from torch import Tensor
from transformers import TrainerCallback

import headfold
from headfold.core.errors import UserError
from headfold.divergence import kl_divergence, relative_error
from headfold.hf_models import open_tokenizer
from headfold.runtime.modeling_headfold import grouped_class
from headfold.train.distillation import Distillation
from headfold.train.sites import find_sites, set_trainable
from headfold.train.stream import Stream, collate
from headfold.train.trainer import COMPLETE_MARK, last_complete_checkpoint
from headfold.uptraining.job import UptrainResult
from headfold.verbs.uptrain import uptrain

SHARED = Path(__file__).parents[2] / "shared"
BASELINE: dict[str, Any] = dict(kv_heads=2, merge="mean", group="contiguous", refit=False)
SHORT: dict[str, Any] = dict(steps=6, batch=4, context=16, save_every=2, log_every=1, learning_rate=1e-2, device="cpu")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:  # noqa: F811
    directory = tmp_path_factory.mktemp("original") / "tiny"
    shutil.copytree(tiny_checkpoint("llama", torch.float32, vocab_size=len(tokenizer)), directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def folded(original: Path) -> Path:
    out = original.parent / "folded"
    headfold.fold(original, out, **BASELINE)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"the {n}th line of {n * n} lines, and no more than {n + 1}." for n in range(400)))
    return str(path)


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def calm(original: Path, folded: Path, text: str) -> UptrainResult:
    """What training ends in that nothing interrupted."""
    return uptrain(folded, original.parent / "calm", distill=original, data=text, **SHORT)


@pytest.mark.parametrize("distill", [True, False])
@pytest.mark.parametrize("train", ["attention", "all", "lora"])
def test_what_was_asked_for_is_trained_and_nothing_else(
    train: str, distill: bool, original: Path, folded: Path, text: str, tmp_path: Path
) -> None:
    found = uptrain(folded, tmp_path / "out", distill=original if distill else None, train=train, data=text, **SHORT)
    before, after = weights(folded), weights(found.out)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if "self_attn" in name or (train == "all" and "layers" in name):
            assert_differs(tensor, before[name])
        elif train != "all":
            assert_bitwise(tensor, before[name])
    losses = [entry["loss"] for entry in found.curve]
    assert len(losses) == 6 and sum(losses[-2:]) < sum(losses[:2]) and found.difference <= found.tolerance
    assert 0 < found.num_trained < found.num_parameters or train == "all"


def test_the_result_is_an_ordinary_checkpoint_that_says_how_it_was_made(
    original: Path, folded: Path, text: str, tmp_path: Path
) -> None:
    found = uptrain(folded, tmp_path / "out", distill=original, data=text, **SHORT)
    for name in ("config.json", "plan.json", "tokenizer.json"):
        assert json.loads((found.out / name).read_text()) == json.loads((folded / name).read_text())
    tokens = torch.arange(20)[None]
    stock = transformers.AutoModelForCausalLM.from_pretrained(found.out)(tokens).logits
    assert_bitwise(headfold.load(found.out, attn_implementation="sdpa")(tokens).logits, stock)
    record = json.loads((found.out / "training.json").read_text())
    assert record["data"] == Path(text).name and record["teacher"] == "tiny"
    assert (
        record["steps"] == 6 and len(record["curve"]) == 6 and {"loss", "kl", "site_error"} <= record["curve"][0].keys()
    )
    card = (found.out / "README.md").read_text()
    assert "## Uptrained" in card and "KL to `tiny`" in card and "No block was trained" not in card
    assert card.index("## Uptrained") < card.index("## Made by")
    assert not list(found.out.glob("*.partial")) and not (found.out / ".headfold-work").exists()
    assert headfold.eval(found.out, reference=original, text=text, limit=512, context=16).kl < (
        headfold.eval(folded, reference=original, text=text, limit=512, context=16).kl
    )


class Stopped(TrainerCallback):
    """A kill at a step, or in the middle of the save there."""

    def __init__(self, step: int, *, saving: bool = False) -> None:
        self.step, self.saving = step, saving

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == self.step and not self.saving:
            raise KeyboardInterrupt

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == self.step and self.saving:
            place = Path(args.output_dir) / f"checkpoint-{self.step}"
            (place / COMPLETE_MARK).unlink()
            (place / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt


@pytest.mark.parametrize(("stop", "begun"), [(Stopped(5), 4), (Stopped(4, saving=True), 2), (Stopped(1), 0)])
def test_a_killed_run_goes_on_to_the_same_weights_and_curve(
    stop: Stopped, begun: int, calm: UptrainResult, original: Path, folded: Path, text: str, tmp_path: Path
) -> None:
    how = dict(distill=original, data=text, **SHORT)
    with pytest.raises(KeyboardInterrupt):
        uptrain(folded, tmp_path / "out", **how, callbacks=[stop])
    assert not (tmp_path / "out").exists()
    found = uptrain(folded, tmp_path / "out", **how, resume=begun > 0)
    assert found.resumed_at == begun and found.curve == calm.curve
    for name, tensor in weights(found.out).items():
        assert_bitwise(tensor, weights(calm.out)[name])


def test_other_settings_begin_anew(original: Path, folded: Path, text: str, tmp_path: Path) -> None:
    how = dict(distill=original, data=text, **SHORT)
    with pytest.raises(KeyboardInterrupt):
        uptrain(folded, tmp_path / "out", **how, callbacks=[Stopped(5)])
    assert uptrain(folded, tmp_path / "out", **{**how, "learning_rate": 1e-3}).resumed_at == 0


def test_of_two_checkpoints_the_newest_whole_one_counts(tmp_path: Path) -> None:
    for step, whole in ((9, True), (10, True), (11, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / COMPLETE_MARK).touch()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-11").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two lengths": (dict(tokens=100), "one of --steps"),
    "alpha alone": (dict(steps=None, alpha=0.05), "one of --steps"),
    "no length": (dict(steps=None), "one of --steps"),
    "scope": (dict(train="heads"), "--train heads"),
    "optimizer": (dict(optimizer="sgd"), "--optimizer sgd"),
    "schedule": (dict(schedule="steps"), "--schedule steps"),
    "own text": (dict(data="self"), "--data SOURCE"),
    "no such data": (dict(data="nowhere.txt"), "no such file"),
    "parts": (dict(accumulate=3), "a multiple of 3"),
    "nothing to resume": (dict(resume=True), "leave --resume out"),
    "longer than the model": (dict(context=10_000), "the model's own context is"),
    "no share": (dict(steps=None, alpha=0.0, pretraining_tokens=100), "--alpha 0"),
    "endless": (dict(steps=None, alpha=math.inf, pretraining_tokens=100), "--alpha inf"),
    "up the hill": (dict(learning_rate=-1.0), "--learning-rate -1"),
    "no rate": (dict(learning_rate=math.nan), "--learning-rate nan"),
    "weight decay": (dict(weight_decay=-1.0), "--weight-decay -1"),
    "site weight": (dict(site_weight=math.nan), "--site-weight nan"),
    "a file for events": (dict(tensorboard=__file__), "expected a directory or nothing"),
}


@pytest.mark.parametrize("reason", sorted(REFUSED))
def test_what_cannot_be_is_refused_and_leaves_nothing(reason: str, folded: Path, text: str, tmp_path: Path) -> None:
    wrong, said = REFUSED[reason]
    with pytest.raises(UserError, match=said):
        uptrain(folded, tmp_path / "out", **{"data": text, **SHORT, **wrong})
    assert not list(tmp_path.iterdir())


def test_too_little_text_a_fold_without_plan_and_a_strange_teacher_are_refused(
    original: Path, folded: Path, text: str, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("few")
    with pytest.raises(UserError, match="at least one item of 16 tokens"):
        uptrain(folded, tmp_path / "out", data=str(short), **SHORT)
    with pytest.raises(UserError, match="vocabulary"):
        uptrain(folded, tmp_path / "out", data=text, distill=tiny_checkpoint("llama", torch.float32), **SHORT)
    with pytest.raises(UserError, match="folded from"):
        uptrain(
            folded,
            tmp_path / "out",
            data=text,
            distill=tiny_checkpoint("gpt_neox", torch.float32, vocab_size=257),
            **SHORT,
        )
    with pytest.raises(UserError, match="got the fold itself"):
        uptrain(folded, tmp_path / "out", data=text, distill=folded, **SHORT)
    for other, said in (
        (dict(num_hidden_layers=3), "of 2 layers, got one of 3"),
        (dict(hidden_size=72), "72 dims instead of 48"),
    ):
        wrong = tiny_checkpoint("llama", torch.float32, vocab_size=257, **other)
        with pytest.raises(UserError, match=said):
            uptrain(folded, tmp_path / "out", data=text, distill=wrong, **SHORT)
    bare = tmp_path / "bare"
    shutil.copytree(folded, bare)
    (bare / "plan.json").unlink()
    with pytest.raises(UserError, match="no plan.json"):
        uptrain(bare, tmp_path / "out", data=text, **SHORT)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_length_may_be_said_in_tokens_or_as_a_share(folded: Path, text: str, tmp_path: Path) -> None:
    how = {**SHORT, "steps": None, "data": text}
    by_tokens = uptrain(folded, tmp_path / "a", **how, tokens=130)
    by_share = uptrain(folded, tmp_path / "b", **how, alpha=0.05, pretraining_tokens=2600)
    assert by_tokens.training.steps == by_share.training.steps == 3 and by_tokens.tokens == 192


@pytest.mark.parametrize("distill", [True, False])
def test_saving_memory_changes_nothing(distill: bool, original: Path, folded: Path, text: str, tmp_path: Path) -> None:
    asked = dict(distill=original if distill else None, data=text, **{**SHORT, "steps": 2})
    hows = ({}, dict(accumulate=2), dict(gradient_checkpointing=True))
    plain, *others = (uptrain(folded, tmp_path / f"{n}", **asked, **how) for n, how in enumerate(hows))
    for other in others:
        for one, two in zip(plain.curve, other.curve, strict=True):
            # Relative errors of two halves of a batch are not that of the whole, but near it.
            assert math.isclose(one["loss"], two["loss"], rel_tol=1e-3 if distill else 1e-4)
            assert math.isclose(one["grad_norm"], two["grad_norm"], rel_tol=2e-2 if distill else 1e-3)


def windows(text: str, directory: Path, seed: int, count: int) -> list[Tensor]:
    stream = Stream("text", text, directory, open_tokenizer(directory), 16, seed)
    return [item["input_ids"] for item in islice(stream, count)]


def test_text_is_packed_in_order_and_drawn_by_seed(original: Path, text: str) -> None:
    tokenizer = open_tokenizer(original)  # noqa: F811
    whole = tokenizer(Path(text).read_text())["input_ids"]
    per_epoch = len(whole) // 16
    found = windows(text, original, 0, per_epoch + 3)
    assert torch.cat(found[:per_epoch]).tolist() == whole[: 16 * per_epoch]  # one document: an epoch is the text
    assert_bitwise(found[per_epoch], found[0])
    again, other = windows(text, original, 0, 5), windows(str(Path(__file__).parent), original, 1, 5)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=False))
    assert not all(
        torch.equal(a, b) for a, b in zip(other, windows(str(Path(__file__).parent), original, 2, 5), strict=True)
    )


GROUPED = sorted(CASES)


def grouped(case: Case) -> Any:
    torch.manual_seed(0)
    with torch.random.fork_rng():
        return grouped_class(case.model_class)(case.config([EVEN] * 2, "headfold")).eval()


@pytest.mark.parametrize("name", GROUPED)
def test_attentions_are_found_whole_in_every_class(name: str) -> None:
    """Their parameters are those of q, k, v and o, and perhaps norms or biases; nothing of an MLP."""
    model = grouped(CASES[name])
    found = find_sites(model)
    assert found
    for site in found:
        module, output = model.get_submodule(site.module), model.get_submodule(site.output)
        assert site.output.startswith(f"{site.module}.")
        sizes = sorted(p.numel() for p in module.parameters() if p.ndim == 2)
        assert len(sizes) >= 4 and next(output.parameters()).numel() >= sizes[-1] // 2
    set_trainable(model, "attention")
    named = {name: p.requires_grad for name, p in model.named_parameters()}
    assert any(named.values()) and not all(named.values())
    assert not any(
        trains for name, trains in named.items() if any(word in name for word in ("mlp", "fc1", "dense_h_to", "embed"))
    )


def test_a_model_that_is_its_teacher_has_nothing_to_learn() -> None:
    model, teacher = (stock_model(tiny_checkpoint("llama")) for _ in range(2))
    distillation = Distillation(teacher, model, ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"])
    loss, parts = distillation(model, tiny_sample("llama", 4))
    assert float(loss.detach()) == 0 and parts == {"kl": 0.0, "site_error": 0.0}
    model.model.layers[0].self_attn.o_proj.weight.data *= 1.5
    loss, parts = distillation(model, tiny_sample("llama", 4))
    assert (
        parts["kl"] > 0 and parts["site_error"] > 0.1
    )  # at the first attention 0.25, at the second what follows from it
    distillation.close()


def test_divergence_is_that_of_distributions_and_leaves_padding_out() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(3, 5, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    p, q = (logits.softmax(-1) for logits in (theirs, ours))
    kept = torch.tensor([[True, True, False, True, True]] * 3)
    expected = (p * (p.log() - q.log())).sum(-1)
    assert_tight(kl_divergence(ours, theirs, kept), expected[kept].mean())
    assert_tight(kl_divergence(ours, theirs, None), expected.mean())
    leaf = ours.clone().requires_grad_()
    kl_divergence(leaf, theirs, kept).backward()
    other = ours.clone().requires_grad_()
    torch.nn.functional.kl_div(
        other[kept].log_softmax(-1), theirs[kept].log_softmax(-1), reduction="batchmean", log_target=True
    ).backward()
    assert_tight(leaf.grad, other.grad)
    assert_tight(relative_error(3 * theirs, theirs), torch.tensor(4.0, dtype=torch.float64))


@pytest.mark.parametrize("name", ["multi30k-t5", "cifar10-vit"])
def test_a_translator_and_an_image_classifier_train_too(name: str, tmp_path: Path) -> None:
    model = SHARED / "models" / name
    if not model.is_dir():
        pytest.skip(f"no {model}: it is for development alone")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "\n".join(
            json.dumps({"source": f"a man on {n} bikes", "target": f"ein Mann auf {n} Rädern"}) for n in range(64)
        )
    )
    data = str(pairs) if name == "multi30k-t5" else str(SHARED / "data" / "cifar10" / "test.parquet")
    headfold.fold(model, tmp_path / "folded", **{**BASELINE, "kv_heads": 4})
    how = dict(data=data, batch=8, log_every=1, device="cpu")
    for out, steps, more in (("plain", 2, dict(learning_rate=1e-3)), ("distilled", 8, dict(distill=model))):
        found = uptrain(tmp_path / "folded", tmp_path / out, **how, steps=steps, **more)
        assert len(found.curve) == steps and found.difference <= found.tolerance
    assert found.curve[-1]["site_error"] < 0.9 * found.curve[0]["site_error"]


@pytest.mark.parametrize("name", ["multi30k-t5", "cifar10-vit"])
def test_classes_that_rename_their_weights_resume_too(name: str, tmp_path: Path) -> None:
    """transformers writes a ViT under other names than it has in memory, and loads what it finds of it without a word."""
    model = SHARED / "models" / name
    if not model.is_dir():
        pytest.skip(f"no {model}: it is for development alone")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps({"source": f"{n} bikes", "target": f"{n} Räder"}) for n in range(64)))
    data = str(pairs) if name == "multi30k-t5" else str(SHARED / "data" / "cifar10" / "test.parquet")
    headfold.fold(model, tmp_path / "folded", **{**BASELINE, "kv_heads": 4})
    how = dict(data=data, steps=4, batch=8, save_every=2, log_every=1, learning_rate=1e-3, device="cpu")
    calm = uptrain(tmp_path / "folded", tmp_path / "calm", **how)
    with pytest.raises(KeyboardInterrupt):
        uptrain(tmp_path / "folded", tmp_path / "out", **how, callbacks=[Stopped(3)])
    found = uptrain(tmp_path / "folded", tmp_path / "out", **how)
    assert found.resumed_at == 2 and found.curve == calm.curve
    for key, tensor in weights(found.out).items():
        assert_bitwise(tensor, weights(calm.out)[key])


@pytest.mark.parametrize("options", ["", "kind=row,init=random", "kind=column,frozen=true"])
def test_weighted_heads_are_trained_and_folded_away(
    options: str, original: Path, folded: Path, text: str, tmp_path: Path
) -> None:
    how = dict(data=text, wgqa=options, original=original, **SHORT)
    calm = uptrain(folded, tmp_path / "calm", **how)
    assert weights(calm.out).keys() == weights(folded).keys() and calm.difference <= calm.tolerance
    assert calm.curve[-1]["loss"] < calm.curve[0]["loss"]
    trained = {name for name, tensor in weights(calm.out).items() if not torch.equal(tensor, weights(folded)[name])}
    only = ("k_proj", "v_proj") if "frozen" in options else ("q_proj", "k_proj", "v_proj", "o_proj")
    assert {name.split(".")[-2] for name in trained} == set(only)
    with pytest.raises(KeyboardInterrupt):
        uptrain(folded, tmp_path / "out", **how, callbacks=[Stopped(5)])
    found = uptrain(folded, tmp_path / "out", **how)
    assert found.resumed_at == 4 and found.curve == calm.curve
    for key, tensor in weights(found.out).items():
        assert_bitwise(tensor, weights(calm.out)[key])


def test_weighted_heads_need_the_model_they_are_of(original: Path, folded: Path, text: str, tmp_path: Path) -> None:
    for wrong, said in (
        (dict(wgqa=""), "--original MODEL"),
        (dict(wgqa="kind=all", original=original), "kind='all'"),
        (dict(wgqa="", original=original, train="lora"), "not with lora"),
        (dict(wgqa="", original=tiny_checkpoint("llama", torch.float32)), "folded from"),
    ):
        with pytest.raises(UserError, match=said):
            uptrain(folded, tmp_path / "out", data=text, **{**SHORT, **wrong})
    assert not list(tmp_path.iterdir())


def test_items_of_a_batch_are_cut_to_what_is_real() -> None:
    mask = torch.tensor([1, 1, 0, 0])
    batch = collate(
        [{"input_ids": torch.arange(4), "attention_mask": mask, "labels": torch.tensor([1, -100, -100])}] * 2
    )
    assert batch["input_ids"].shape == (2, 2) and batch["labels"].shape == (2, 1)
