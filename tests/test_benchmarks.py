"""Benchmarks measure what users call: the public functions, except where the measured part is not one of them."""

import ast
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open

import headfold
from headfold.comparison import scored
from headfold.evaluate.classification import Classification
from headfold.evaluate.data import DataEvaluation
from headfold.evaluate.perplexity import Evaluation

ROOT = Path(__file__).parents[1]
INTERNAL = {
    "budgets", "calibration_amount", "calibration_speed", "decode", "groupings", "mla", "mla_engines", "mla_published", "modalities",
    "papers/routes", "papers/runs", "papers/wgqa", "plan_time", "quality", "training_speed", "uptraining",
}  # fmt: skip
"""Scripts that reach into the package: they time or vary a part that no public function offers. A further one needs as good a reason."""


def imports_internals(path: Path) -> bool:
    """Whether a script imports anything of headfold but its public names."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            public = headfold.__all__ if node.module == "headfold" else ()
            names = [f"{node.module}.{name}" for name in names if name not in public]
        if any(name.startswith("headfold.") for name in names):
            return True
    return False


def test_benchmarks_use_public_functions() -> None:
    place = ROOT / "benchmarks"
    found = {str(path.relative_to(place).with_suffix("")) for path in place.rglob("*.py") if imports_internals(path)}
    assert found == INTERNAL


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module(name)


def test_the_shards_of_the_conversion_benchmark_are_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = script("conversion_time", monkeypatch)
    shapes = {"a.weight": (3, 5), "b.weight": (7,)}
    timing.write_shard(tmp_path / "one.safetensors", shapes, memoryview(bytes(range(1, 201)) * 10))
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert {name: tuple(file.get_tensor(name).shape) for name in file.keys()} == shapes  # noqa: SIM118 - no mapping
        assert file.get_tensor("b.weight").dtype == torch.bfloat16 and file.metadata() == {"format": "pt"}


def classified() -> DataEvaluation:
    measured = Classification(
        num_items=4, seconds=0.1, accuracy=0.5, cross_entropy=1.0, kl=0.25, agreement=0.5, reference_accuracy=0.75,
        reference_cross_entropy=0.5,
    )  # fmt: skip
    return DataEvaluation("images", "a", "b", "c", "float32", measured)


def language() -> Evaluation:
    return Evaluation(
        num_tokens=9, nll=2.0, nll_by_position=(2.0,), seconds=0.1, reference_nll=1.5, kl=0.5, model="a", reference="b", text="c",
        context=8, num_windows=1, dtype="float32", kv_bytes_per_token=4,
    )  # fmt: skip


@pytest.mark.parametrize("found", [classified(), language()], ids=lambda found: type(found).__name__)
def test_benchmarks_score_an_evaluation_as_compare_does(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert script("folds", monkeypatch).scored_evaluation(found) == scored(found)


def test_runs_of_published_models_are_summed_up_by_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    real = script("real", monkeypatch)
    assert real.plain("It's 5 o'clock, Sir — GO!") == "it's 5 o'clock sir go"
    runs = [{"seconds": s, "context 8": {"nll": s / 2, "by_position": [s, 0.0]}} for s in (1.0, 5.0, 3.0)]
    assert real.medians(runs) == {"seconds": 3.0, "context 8": {"nll": 1.5, "by_position": [3.0, 0.0]}}


def test_a_command_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    real = script("real", monkeypatch)
    found, seconds, memory = real.command("methods")
    assert found and seconds > 0 and memory > 2**20
    with pytest.raises(SystemExit, match="exit code 2"):
        real.command("inspect", "no-such-model")


def test_free_choices_leave_attention_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of Q and K in every rotary plane, and of V and O, which are all that attention reads."""
    choices = script("quantised_choices", monkeypatch)
    torch.manual_seed(0)
    layer = {role: torch.randn(4 if role in "qo" else 2, 8, 32).double() for role in "qkvo"}
    layer["inputs"] = torch.eye(32).double()

    def read(layer: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        query, key, value = (choices.shared(layer[role], layer) if role in "kv" else layer[role] for role in "qkv")
        query, key = (torch.complex(*rows.unflatten(1, (2, -1)).unbind(1)) for rows in (query, key))
        planes = torch.einsum("hpi,hpj->hpij", query, key.conj())
        return [torch.view_as_real(planes), torch.einsum("hdi,hdj->hij", value, layer["o"])]

    for chosen, _ in choices.CHOICES.values():
        for ours, exact in zip(read(chosen(layer)), read(layer), strict=True):
            assert (ours - exact).abs().max() < 1e-12 * exact.abs().max()


def test_rows_of_a_quantised_cache_resume_and_compare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bits = script("cache_bits", monkeypatch)
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 300, 7, generator=generator)
    window = torch.randint(0, 7, (300,), generator=generator)
    nll, kl = bits.compared(logits, window, other)
    assert nll == pytest.approx(float(torch.nn.functional.cross_entropy(logits[:-1], window[1:])), rel=1e-5)
    assert kl > 0 and bits.compared(logits, window, logits)[1] == 0
    rows = bits.Rows(tmp_path / "rows.json", {})
    rows.add({"kv_heads": 2, "bits": 4}, 10.0, [(1.0, 0.1), (2.0, 0.3)])
    again = bits.Rows(tmp_path / "rows.json", {})
    assert not again.lacks({"kv_heads": 2, "bits": 4}) and again.lacks({"kv_heads": 2, "bits": 8})
    assert (again.rows[0]["nll"], again.rows[0]["kl"]) == pytest.approx((1.5, 0.2))
