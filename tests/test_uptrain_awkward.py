"""Training a fold on where something is awkward: precision, divergence, full disks, other classes, parts of padded batches."""

import functools
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from grades import assert_bitwise, assert_tight_through_float32_norms
from owners import refused_while_owned
from safetensors.torch import load_file
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from test_uptrain import BASELINE, SHORT, Stopped, folded, original, text, weights  # noqa: F401 (fixtures)
from tiny import stock_model, tiny_checkpoint, tiny_sample
from transformers import BertConfig, BertModel, TrainingArguments

import headfold
from headfold.checkpoint.ownership import lock_beside
from headfold.core.errors import UserError
from headfold.reports.card import uptrained_card
from headfold.train.distillation import Distillation
from headfold.train.trainer import TrainingConfig, training_arguments
from headfold.verbs.uptrain import uptrain

# ruff: noqa: F811


@pytest.mark.parametrize("distill", [True, False])
def test_half_precision_is_that_of_the_passes_and_not_of_the_result(
    distill: bool, original: Path, folded: Path, text: str, tmp_path: Path
) -> None:
    """What the trained model says is compared without autocast."""
    asked = dict(distill=original if distill else None, data=text, **{**SHORT, "steps": 2})
    found, exact = (uptrain(folded, tmp_path / str(bf16), **asked, bf16=bf16) for bf16 in (True, False))
    assert found.difference <= found.tolerance
    for one, other in zip(found.curve, exact.curve, strict=True):
        assert one["loss"] != other["loss"] and math.isclose(one["loss"], other["loss"], rel_tol=0.05)


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_run_that_diverges_ends_and_keeps_no_such_checkpoint(
    log_every: int, folded: Path, text: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="expected training to stay finite"):
        uptrain(folded, tmp_path / "out", data=text, **{**SHORT, "learning_rate": 1e30, "log_every": log_every})
    assert not (tmp_path / "out").exists()
    for state in tmp_path.rglob("model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(state).values())


def test_a_kill_after_the_last_step_costs_no_step_more(
    original: Path, folded: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = dict(data=text, **SHORT)
    calm = uptrain(folded, tmp_path / "calm", **how)

    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("headfold.uptraining.job.copy_side_files", killed)
        uptrain(folded, tmp_path / "out", **how)
    found = uptrain(folded, tmp_path / "out", **how)
    assert found.resumed_at == 6 and found.curve == calm.curve
    for name, tensor in weights(found.out).items():
        assert_bitwise(tensor, weights(calm.out)[name])


@pytest.mark.parametrize("family", ["gpt_neox", "gptj"])
def test_a_fold_of_another_class_learns_from_its_original(
    family: str,
    tokenizer: Any,
    text: str,
    tmp_path: Path,
) -> None:
    """They come out as Phi, whose output projections have other names."""
    shutil.copytree(tiny_checkpoint(family, torch.float32, vocab_size=len(tokenizer)), tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    headfold.fold(tmp_path / "original", tmp_path / "same", **{**BASELINE, "kv_heads": 4})
    assert json.loads((tmp_path / "same" / "config.json").read_text())["model_type"] == "phi"
    found = uptrain(tmp_path / "same", tmp_path / "out", data=text, distill=tmp_path / "original", **SHORT)
    assert found.curve[-1]["site_error"] < 0.9 * found.curve[0]["site_error"]


def test_parts_of_padded_batches_weigh_what_they_hold(tokenizer: Any, tmp_path: Path) -> None:
    """A T5 takes the count of a batch's labels and divides by that of the part."""
    shutil.copytree(tiny_checkpoint("t5", torch.float32, vocab_size=len(tokenizer)), tmp_path / "t5")
    config = tmp_path / "t5" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dropout_rate": 0.0}))
    tokenizer.save_pretrained(tmp_path / "t5")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps({"source": "a", "target": "b " * (n % 5 + 1)}) for n in range(32)))
    headfold.fold(tmp_path / "t5", tmp_path / "folded", **BASELINE, calibration=str(pairs), items=4)
    how = dict(data=str(pairs), **{**SHORT, "batch": 8})
    whole, parts = (uptrain(tmp_path / "folded", tmp_path / f"{n}", **how, accumulate=n) for n in (1, 4))
    for one, other in zip(whole.curve, parts.curve, strict=True):
        assert math.isclose(one["loss"], other["loss"], rel_tol=1e-4)
        assert math.isclose(one["grad_norm"], other["grad_norm"], rel_tol=1e-3)


@pytest.mark.parametrize("name", ["t5", "bart", "bert"])
def test_what_is_learned_does_not_know_how_far_a_batch_is_padded(name: str) -> None:
    model, teacher = (stock_model(tiny_checkpoint(name)) for _ in range(2))
    ends = {"t5": "SelfAttention.o", "bart": "out_proj", "bert": "attention.output.dense"}
    outputs = [path for path, _ in model.named_modules() if path.endswith(ends[name])]
    model.get_submodule(outputs[0]).weight.data *= 1.5
    model.get_submodule(outputs[-1]).weight.data *= 1.5
    sample = tiny_sample(name, 4)
    fill = {"input_ids": 1, "attention_mask": 0, "labels": -100}
    longer = {key: torch.nn.functional.pad(t, (0, 3), value=fill.get(key, 0)) for key, t in sample.items()}
    found = []
    for batch in (sample, longer):
        distillation = Distillation(teacher.eval(), model.eval(), outputs)
        found.append(distillation(model, batch)[1])
        distillation.close()
    for part in ("kl", "site_error"):
        assert found[0][part] > 0
        assert_tight_through_float32_norms(found[1][part][None].double(), found[0][part][None].double())


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("t5", ("dropout_rate",)),
        ("bart", ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")),
        ("bert", ("hidden_dropout_prob", "attention_probs_dropout_prob")),
        ("vit", ("hidden_dropout_prob", "attention_probs_dropout_prob")),
    ],
)
def test_what_has_no_dropout_is_matched_without(name: str, fields: tuple[str, ...], tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint(name), tmp_path / name)
    config = tmp_path / name / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **dict.fromkeys(fields, 0.5)}))
    model, teacher = (stock_model(tmp_path / name).train() for _ in range(2))
    outputs = [path for path, _ in model.named_modules() if path.endswith(("SelfAttention.o", "self_attn.out_proj"))]
    outputs = outputs or [path for path, _ in model.named_modules() if path.endswith(("output.dense", "o_proj"))][:1]
    loss, _ = Distillation(teacher, model, outputs)(model, tiny_sample(name, 4))
    assert abs(float(loss.detach())) < 1e-14


def test_a_fold_that_kept_every_head_trains_as_a_whole_only(tokenizer: Any, tmp_path: Path) -> None:
    """It is what folds are measured beside; a class without grouped heads has no sites to name."""
    shutil.copytree(tiny_checkpoint("t5", torch.float32, vocab_size=len(tokenizer)), tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps({"source": f"{n}", "target": f"{n} and {n}"}) for n in range(32)))
    every = json.loads((tmp_path / "t5" / "config.json").read_text())["num_heads"]
    kept = headfold.fold(tmp_path / "t5", tmp_path / "kept", **{**BASELINE, "kv_heads": every}).out
    found = uptrain(kept, tmp_path / "out", data=str(pairs), train="all", **SHORT)
    assert found.num_trained == found.num_parameters and found.curve[-1]["loss"] < found.curve[0]["loss"]
    with pytest.raises(UserError, match="expected attention with grouped heads"):
        uptrain(kept, tmp_path / "other", data=str(pairs), **SHORT)
    assert not (tmp_path / "other.partial").exists()


def test_a_model_without_a_loss_and_labels_that_do_not_fit_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"{n}", "label": n % 2}) for n in range(8)))
    shutil.copytree(tiny_checkpoint("bert", torch.float32, vocab_size=len(tokenizer)), tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    headfold.fold(tmp_path / "bert", tmp_path / "folded", **BASELINE, calibration=str(data), items=4)
    with pytest.raises(UserError, match="cannot be trained on this"):  # its head is of masked words
        uptrain(tmp_path / "folded", tmp_path / "out", data=str(data), columns=("text", "label"), **SHORT)
    BertModel(BertConfig.from_pretrained(tmp_path / "bert")).save_pretrained(tmp_path / "bert")
    headfold.fold(tmp_path / "bert", tmp_path / "bare", **BASELINE, calibration=str(data), items=4)
    with pytest.raises(UserError, match="a loss of its own"):
        uptrain(tmp_path / "bare", tmp_path / "out", data=str(data), columns=("text", "label"), **SHORT)
    assert not (tmp_path / "out.partial").exists()


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stands(
    folded: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = torch.save, []

    def full(thing: Any, place: Any, *more: Any, **options: Any) -> None:
        saved.append(place)
        if "checkpoint-4" in str(place):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 10419520 vs 10419408")
        save(thing, place, *more, **options)

    with monkeypatch.context() as patched, pytest.raises(UserError, match="is the disk full"):
        patched.setattr(torch, "save", full)
        uptrain(folded, tmp_path / "out", data=text, **SHORT)
    assert saved
    assert uptrain(folded, tmp_path / "out", data=text, **SHORT, resume=True).resumed_at == 2


def test_one_process_uses_one_gpu_whatever_it_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = TrainingConfig(1, "adamw", 1e-3, "constant", 0, batch=4)
    setup = TrainingArguments._setup_devices.func

    def two(told: Any) -> torch.device:
        device = setup(told)
        told._n_gpu = 2
        return device

    seen = functools.cached_property(two)
    seen.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", seen)
    assert training_arguments(training, tmp_path, "cpu", None, 1).train_batch_size == 4


def test_a_card_claims_nothing_that_training_undid() -> None:
    starts = (
        "No block was trained",
        "Nothing was trained",
        "Nothing else was trained",
        "Every attention block was then trained alone, on 9 tokens or items, to answer",
        "All attention blocks were then trained together, on 9 tokens or items, to answer",
    )
    for start, kept in itertools.product(starts, (", byte for byte", " as it was read (see below)")):
        card = f"Folded. {start}; all tensors outside attention are the original's{kept}.\n\n## Made by\n"
        text = uptrained_card(card, "folded", {})
        assert kept not in text and "The whole model was then trained (see below)." in text
        assert all((claim in text) == (claim in card) for claim in ("trained alone", "trained together"))


def test_the_launch_file_asks_for_what_can_be_sharded() -> None:
    config = load_config_from_file(str(Path(__file__).parents[1] / "docs" / "launch" / "fsdp2.yaml"))
    assert config.distributed_type == DistributedType.FSDP and config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"


def test_a_place_that_another_run_owns_is_refused(folded: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        uptrain(folded, out, data=text, **SHORT, callbacks=[Stopped(5)])
    for resume in (False, True):
        refused_while_owned(
            lambda how=resume: uptrain(folded, out, data=text, resume=how, **SHORT), out, lock_beside(out)
        )
    assert uptrain(folded, out, data=text, resume=True, **SHORT).resumed_at == 4
