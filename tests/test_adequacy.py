"""A fold says how far its calibration data reach: their amount, the length of their windows, and whether the model knows such text."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import one_line
from tiny import stock_model, tiny_checkpoint
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import headfold
from headfold.adequacy.reach import Reach, reach_of_text
from headfold.adequacy.surprise import surprise
from headfold.core.errors import UserError
from headfold.corpus.windows import draw_windows
from headfold.stats_file import StatsFile

BUNDLED = Path(headfold.__file__).parent / "bundled"


def test_surprise_is_loss_beside_entropy() -> None:
    """Over the first tokens of windows that lie evenly among all."""
    model = stock_model(tiny_checkpoint("llama"))
    windows = torch.randint(61, (9, 20), generator=torch.Generator().manual_seed(0))
    found = surprise(model, windows, num_windows=3, num_tokens=12)
    some = windows[[0, 3, 6], :12]
    logits = model(input_ids=some).logits[:, :-1].detach().flatten(0, 1)
    assert found.nll == pytest.approx(float(cross_entropy(logits, some[:, 1:].flatten())), rel=1e-9)
    assert found.entropy == pytest.approx(float(Categorical(logits=logits).entropy().mean()), rel=1e-9)
    assert found.excess == found.nll - found.entropy and found.perplexity == math.exp(found.nll)


def test_windows_of_one_token_say_nothing(tmp_path: Path) -> None:
    """A model predicts nothing there; whoever has only such text can still calibrate on it."""
    model = stock_model(tiny_checkpoint("llama"))
    found = surprise(model, torch.arange(5)[:, None])
    assert math.isnan(found.nll) and math.isnan(found.entropy) and found.facts() == {}
    result = headfold.calibrate(model, tmp_path / "stats", calibration=[{"input_ids": torch.arange(5)[:, None]}])
    assert result.tokens == 5 and "perplexity" not in StatsFile(tmp_path / "stats").metadata
    assert headfold.fold(model, kv_heads=2, stats=tmp_path / "stats").headfold.refitted


@pytest.mark.parametrize("option", [{"tokens": 0}, {"tokens": -5}, {"items": -1}, {"context": 1}, {"seed": -1}])
@pytest.mark.parametrize("calibration", [str(BUNDLED / "heldout.txt"), ["a text"]])
def test_numbers_below_their_least_are_refused(option: dict[str, int], calibration: Any, tmp_path: Path) -> None:
    """In Python as on the command line, before anything is drawn or written."""
    (name, number), *_ = option.items()
    for call in (headfold.calibrate, partial(headfold.fold, kv_heads=2)):
        with pytest.raises(UserError) as error:
            call(BUNDLED, tmp_path / "out", calibration=calibration, **option)
        one_line(error, f"{name}: expected a whole number from", f"got {number}")
    assert list(tmp_path.iterdir()) == []


def test_text_that_a_model_writes_does_not_surprise_it() -> None:
    """Its loss is the entropy of its predictions but for chance: a deviation of 3 nats per token over 512 tokens, four times."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BUNDLED), AutoTokenizer.from_pretrained(BUNDLED)
    own = draw_windows("self", tokenizer=tokenizer, model=model, num_tokens=512, context=128, seed=0)
    assert abs(surprise(model, own).excess) < 4 * 3 / 512**0.5
    noise = torch.randint(model.config.vocab_size, own.shape, generator=torch.Generator().manual_seed(0))
    assert surprise(model, noise).excess > 3


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text of tokens that the bundled model does not expect one after the other."""
    tokenizer, path = AutoTokenizer.from_pretrained(BUNDLED), tmp_path_factory.mktemp("text") / "random.txt"
    ids = torch.randint(len(tokenizer), (8000,), generator=torch.Generator().manual_seed(0))
    path.write_text(tokenizer.decode(ids))
    return str(path)


def test_text_of_another_kind_is_named(foreign: str, tmp_path: Path) -> None:
    """When it is calibrated on, when a fold is made of that, and on its card; own text is not."""
    stats = tmp_path / "stats.safetensors"
    result = headfold.calibrate(BUNDLED, stats, calibration=foreign, tokens=1024)
    kind = "calibration text is of another kind than the model's own: its perplexity there is"
    assert sum(note.startswith(kind) for note in result.notes) == 1
    fold = headfold.fold(BUNDLED, tmp_path / "out", kv_heads=2, stats=stats, refit=False, verify=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert any(note.startswith(kind) for note in fold.notes) and f"- Note: {kind}" in card
    own = headfold.calibrate(BUNDLED, tmp_path / "own", calibration=str(BUNDLED / "heldout.txt"), tokens=1024)
    assert not any(note.startswith(kind) for note in own.notes)
    recorded = StatsFile(tmp_path / "own").metadata
    assert float(recorded["perplexity"]) > 1 and float(recorded["expected_perplexity"]) > 1


def test_short_windows_are_named(tmp_path: Path) -> None:
    """Beside the context of the model; windows of the default length are not, however long that is."""
    how: dict[str, Any] = dict(calibration=str(BUNDLED / "heldout.txt"), tokens=1024)
    short = headfold.calibrate(BUNDLED, tmp_path / "short", context=16, **how)
    assert any("calibration windows are short: 16 tokens, where the model takes 512" in note for note in short.notes)
    whole = headfold.calibrate(BUNDLED, tmp_path / "whole", **how)
    assert not any("windows are short" in note for note in whole.notes)
    assert not Reach(window=1024, context=131_072).notes() and Reach(window=64, context=131_072).notes()


def test_the_card_counts_positions_per_parameter(tmp_path: Path) -> None:
    """By hand for the bundled model at 2 K/V heads: 1,024 positions for 8 x 24 numbers of W_o and 2 x 24 of W_v for each output dim."""
    result = headfold.fold(
        BUNDLED, tmp_path / "out", kv_heads=2, calibration=str(BUNDLED / "heldout.txt"), tokens=1024, verify=False
    )
    card = (tmp_path / "out" / "README.md").read_text()
    reach = next(line for line in card.splitlines() if line.startswith("- Calibration reaches: "))
    assert f"{1024 / 192:.1f} positions per input dim" in reach and "windows of 512 tokens of a context of 512" in reach
    assert f"; {1024 / (192 + 48):.1f} per refitted parameter of an output dim" in reach and "; perplexity " in reach
    assert any("calibration is narrow" in note and "--no-refit" in note for note in result.notes)


@pytest.mark.parametrize("perplexity", ["", "many", "nan", "inf", "-1", "0"])
def test_what_a_file_records_may_be_anything(perplexity: str) -> None:
    facts = {"kind": "text", "context": "9" * 30, "perplexity": perplexity, "expected_perplexity": "2"}
    found = reach_of_text(facts, 512)
    assert found.perplexity is None and found.window is None and found.excess == 0 and found.notes() == []
    assert reach_of_text({"kind": "pairs", "context": "16"}, 512).line() == ""
