"""Calibration, plan and refit in one pass: the bytes of a fold in steps, every block run once, nothing begun that cannot be written."""

import random
import shutil
import string
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from test_fold import same_bytes, untouched
from tiny import readable_checkpoint, stock_model, tiny_checkpoint, tiny_sites, tiny_tokens

import headfold
from headfold import calibration, hf_models, outputs, planning
from headfold.conversion import single_pass, teacher
from headfold.conversion.fold_result import FoldResult
from headfold.conversion.teacher import Teacher
from headfold.core.errors import UserError
from headfold.core.plan import Plan
from headfold.hf_models import streamed
from headfold.refine.blocks import block_keywords, blocks_of
from headfold.verbs import fold as verb

TOKENS, CONTEXT, BATCH_TOKENS = 2048, 32, 512
"""Four batches, and enough for W_q."""
MODELS = ["llama", "phi3", "mixtral", "gpt_neox"]
COUNTS_NO_KV_HEADS = {"gpt_neox"}


@pytest.fixture(autouse=True)
def _several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "TOKENS_PER_BATCH", BATCH_TOKENS)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(random.Random(0).choices(string.ascii_lowercase + " ", k=4000)))
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:  # noqa: F811
    return readable_checkpoint(tmp_path_factory.mktemp("source") / "source", tokenizer)


@pytest.fixture(scope="module")
def calm(source: Path, text: str) -> Path:
    """The fold that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "TOKENS_PER_BATCH", BATCH_TOKENS)
        return fold(source, source.parent / "calm", text).out


def fold(source: Path, out: Path, text: str, **options: Any) -> FoldResult:
    return headfold.fold(source, out, calibration=text, tokens=TOKENS, context=CONTEXT, **{"kv_heads": 2, **options})


def counted(calls: Counter[str], method: Any) -> Any:
    """The same method, which counts its calls."""

    def call(*args: Any, **keywords: Any) -> Any:
        calls[method.__name__] += 1
        return method(*args, **keywords)

    return call


def in_steps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(single_pass, "suits", lambda *args: False)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in MODELS),
        ("qwen3", {"merge": "procrustes"}),
        ("llama-bias-gqa", {"head_dim_multiple": 2}),
    ],
    ids=str,
)
def test_one_pass_makes_the_bytes_of_a_fold_in_steps(
    name: str,
    options: dict[str, Any],
    text: str,
    tmp_path: Path,
    tokenizer: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, calls = readable_checkpoint(tmp_path / "source", tokenizer, name), Counter[str]()
    monkeypatch.setattr(Teacher, "write_statistics", counted(calls, Teacher.write_statistics))
    one = fold(source, tmp_path / "one", text, **options)
    assert one.refitted and set(one.seconds) == {"calibrate", "plan", "refit", "write", "verify"}
    assert bool(calls) == (name in COUNTS_NO_KV_HEADS)
    in_steps(monkeypatch)
    fold(source, tmp_path / "steps", text, **options)
    assert calls
    same_bytes(tmp_path / "one", tmp_path / "steps")


def test_a_plan_that_is_given_is_folded_in_one_pass_too(
    source: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Counter[str]()
    made = fold(source, tmp_path / "made", text)
    monkeypatch.setattr(planning, "make_plan", counted(calls, planning.make_plan))
    again = fold(source, tmp_path / "again", text, kv_heads=None, plan=tmp_path / "made" / "plan.json")
    assert again.plan == made.plan and not calls
    same_bytes(tmp_path / "made", tmp_path / "again", but={"headfold.yaml"})


def test_every_block_runs_once_on_every_batch(
    source: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Counter[str]()
    opened = teacher.open_finite

    def open_finite(*args: Any) -> Any:
        model = opened(*args)
        for name, module in model.named_modules():
            if name.endswith(".mlp"):  # the copies that a refit runs are of the attention
                module.register_forward_pre_hook(lambda module, inputs, name=name: runs.update([name]))
        return model

    monkeypatch.setattr(teacher, "open_finite", open_finite)
    fold(source, tmp_path / "one", text, verify=False)
    first, second = runs.values()
    # All once more for how the original takes the text, the first one for the form of its output.
    assert second == TOKENS // BATCH_TOKENS + 1 and first == second + 1
    runs.clear()
    in_steps(monkeypatch)
    fold(source, tmp_path / "steps", text, verify=False)
    assert min(runs.values()) == 2 * second - 1


def test_a_layout_that_cannot_be_is_refused_before_the_work(
    source: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "open_finite", None)
    with pytest.raises(UserError, match="layout"):
        fold(source, tmp_path / "out", text, layout="gpt-bigcode")
    untouched(tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_activations_that_are_not_finite_are_refused(source: Path, text: str, tmp_path: Path) -> None:
    wrong = shutil.copytree(source, tmp_path / "wrong")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"] *= 1e38
    save_file(weights, wrong / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.self: activations are not finite"):
        fold(wrong, tmp_path / "out", text)
    untouched(tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "mixtral", "phi3", "phi", "stablelm", "gemma2", "olmo"])
def test_what_blocks_receive_is_learnt_without_running_them(name: str) -> None:
    model, tokens = stock_model(tiny_checkpoint(name)), tiny_tokens(3, 16)
    blocks = blocks_of(model, [site for site, _ in tiny_sites(tiny_checkpoint(name))])
    whole: list[dict[str, Any]] = []
    handles = [
        each.block.register_forward_pre_hook(lambda module, args, given: whole.append(given), with_kwargs=True)
        for each in blocks
    ]
    before = model(tokens).logits
    for handle in handles:
        handle.remove()
    assert len(whole) == len(blocks) > 1
    found = block_keywords(model, blocks, tokens)
    assert torch.equal(model(tokens).logits, before)  # all blocks run again
    for mine, theirs in zip(found, whole, strict=True):
        for key in ("position_embeddings", "attention_mask", "position_ids", "cache_position"):
            for a, b in zip(tensors(mine.get(key)), tensors(theirs.get(key)), strict=True):
                assert torch.equal(a, b)


def tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value or ())


def test_a_model_larger_than_memory_is_read_once_beside_a_few_windows(
    source: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Counter[str]()
    read = streamed._Weights._read
    monkeypatch.setattr(hf_models, "exceeds_memory", lambda *args: True)
    monkeypatch.setattr(streamed._Weights, "_read", lambda self, name: reads.update([name]) or read(self, name))
    fold(source, tmp_path / "streamed", text, verify=False)
    first = {name for name in reads if ".layers.0." in name}
    # All once more for how the original takes the text, the first block for the form of its output.
    assert len(first) == 9 and {reads[name] for name in first} == {3}
    assert {reads[name] for name in reads if ".layers.1." in name} == {2}
    monkeypatch.undo()
    monkeypatch.setattr(calibration, "TOKENS_PER_BATCH", BATCH_TOKENS)
    fold(source, tmp_path / "whole", text, verify=False)
    same_bytes(tmp_path / "streamed", tmp_path / "whole")


@pytest.mark.parametrize("lost", ["plans", "statistics/layers.1.self.safetensors"])
def test_a_fold_that_was_killed_while_it_cleaned_up_is_finished(
    source: Path,
    calm: Path,
    lost: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"

    def killed(*args: Any) -> None:
        gone = tmp_path / "out.partial" / ".headfold-work" / lost
        gone.unlink() if gone.is_file() else shutil.rmtree(gone)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "shutil", SimpleNamespace(rmtree=killed))
        with pytest.raises(KeyboardInterrupt):
            fold(source, out, text)
    fold(source, out, text)
    same_bytes(out, calm)


def stopped_after_the_refit(source: Path, out: Path, text: str) -> Path:
    """Where a fold was to be that ended before anything was written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verb, "write_fold", None)
        with pytest.raises(TypeError):
            fold(source, out, text)
    return out


def test_what_is_refitted_does_not_open_the_original_again(
    source: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stopped_after_the_refit(source, tmp_path / "out", text)
    monkeypatch.setattr(teacher, "open_finite", None)
    monkeypatch.setattr(planning, "make_plan", counted(calls := Counter[str](), planning.make_plan))
    assert "calibrate" not in fold(source, out, text, verify=False).seconds
    assert calls == {"make_plan": 1}  # that of the layout


def test_groups_are_those_of_the_run_that_refitted(
    source: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another number of threads may round a tie of costs otherwise, and refitted heads belong to their groups."""
    out = stopped_after_the_refit(source, tmp_path / "out", text)
    made = planning.make_plan
    monkeypatch.setattr(planning, "make_plan", lambda *args, **how: made(*args, **how | {"group": "random"}))
    fold(source, out, text)
    fold(source, tmp_path / "other", text)
    monkeypatch.undo()
    plan, other = (Plan.load(path / "plan.json") for path in (out, tmp_path / "other"))
    assert plan.sites != other.sites
