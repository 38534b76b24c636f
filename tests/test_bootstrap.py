"""Intervals of differences cover what they should, are of the same draws for all models, and know BLEU from a mean."""

import sys

import numpy as np
import pytest

from headfold.core.errors import UserError
from headfold.metrics import bleu, bootstrap, rouge
from headfold.metrics.bootstrap import Units, differences, mean_of

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "it"]


def paired(seed: int, shift: float, num_units: int = 80) -> list[Units]:
    """Two models on units whose difficulty varies ten times as much as what sets the models apart."""
    generator = np.random.default_rng(seed)
    difficulty, noise = generator.normal(size=num_units) * 10, generator.normal(size=num_units)
    return [mean_of("nll", "items", difficulty), mean_of("nll", "items", difficulty + noise + shift)]


def texts(seed: int, num_items: int = 30) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(5, 12))) for _ in range(num_items)]


def spoilt(lines: list[str], seed: int, share: float = 0.3) -> list[str]:
    generator = np.random.default_rng(seed)

    def maybe(word: str) -> str:
        return str(generator.choice(WORDS)) if generator.random() < share else word

    return [" ".join(map(maybe, line.split())) for line in lines]


def test_intervals_cover_the_truth_as_often_as_they_say():
    found = [differences(paired(seed, 0.25), resamples=400, seed=seed)[0] for seed in range(400)]
    covered = sum(one.low <= 0.25 <= one.high for one in found) / 400
    assert abs(covered - 0.95) < 4 * (0.95 * 0.05 / 400) ** 0.5  # four standard errors of a share
    assert all(one.high - one.low < 1 for one in found)  # paired: what is hard for both cancels out


def test_without_a_difference_p_is_below_a_twentieth_a_twentieth_of_the_time():
    found = [differences(paired(seed, 0.0), resamples=400, seed=seed)[0] for seed in range(400)]
    assert abs(sum(one.p < 0.05 for one in found) / 400 - 0.05) < 4 * (0.95 * 0.05 / 400) ** 0.5
    assert all(one.is_distinguishable == (one.p < 0.05) for one in found if abs(one.p - 0.05) > 0.01)


def test_a_model_is_not_different_from_itself():
    for units in (paired(0, 1.0)[1], bleu.units(spoilt(texts(0), 1), texts(0))[0]):
        (found,) = differences([units, units])
        assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1) and not found.is_distinguishable


def test_the_order_of_models_is_the_sign():
    for first, second in (paired(3, 0.5), [bleu.units(spoilt(texts(0), seed), texts(0))[0] for seed in (1, 2)]):
        (there,), (back,) = differences([first, second]), differences([second, first])
        assert there.value == -back.value != 0 and there.p == back.p
        assert (there.low, there.high) == pytest.approx((-back.high, -back.low), rel=1e-9)


def test_draws_do_not_depend_on_who_is_compared_nor_on_blocks(monkeypatch):
    first, second = paired(3, 0.5)
    third = paired(4, 0.1)[1]
    alone, together = differences([first, second], seed=5), differences([first, third, second], seed=5)
    assert alone == together[1:] and alone == differences([first, second], seed=5) != differences([first, second])
    monkeypatch.setattr(bootstrap, "BLOCK", 200)
    (blocks,) = differences([first, second], seed=5)
    assert (blocks.low, blocks.high) == pytest.approx((alone[0].low, alone[0].high), rel=1e-12)


def test_draws_are_units_with_replacement():
    counts = np.concatenate(list(bootstrap.draws(7, 3000, seed=0)))
    assert counts.shape == (3000, 7) and (counts.sum(1) == 7).all()
    assert counts.mean(0) == pytest.approx(1, abs=0.1) and counts.var() == pytest.approx(6 / 7, abs=0.05)


def test_a_resample_is_the_metric_of_the_drawn_units():
    """Losses per token of windows of several lengths, and BLEU of drawn sentences."""
    counts = np.random.default_rng(0).multinomial(30, [1 / 30] * 30, size=20)
    drawn = [np.repeat(np.arange(30), row) for row in counts]
    loss, tokens = np.random.default_rng(1).gamma(5, size=30), np.random.default_rng(2).integers(1, 50, 30)
    windows = Units(metric="nll", unit="windows", sums=np.stack([loss, tokens], 1))
    assert windows.resampled(counts) == pytest.approx([loss[at].sum() / tokens[at].sum() for at in drawn], rel=1e-12)
    targets = texts(0)
    outputs = spoilt(targets, 1)
    expected = [bleu.corpus_bleu([outputs[i] for i in at], [targets[i] for i in at]) for at in drawn]
    assert bleu.units(outputs, targets)[0].resampled(counts).tolist() == expected and len(set(expected)) > 15


def test_bleu_is_sacrebleu_s():
    import sacrebleu

    targets = [*texts(0), "Zwei Männer, die 3,5 km laufen.", "x"]
    for share in (0.0, 0.3, 1.0):
        outputs = spoilt(targets, 1, share)
        expected = sacrebleu.corpus_bleu(outputs, [targets], force=True).score
        assert bleu.corpus_bleu(outputs, targets) == expected
    assert bleu.corpus_bleu(["", " "], ["a b", "c"]) == 0


def test_rouge_is_rouge_score_s():
    from rouge_score.rouge_scorer import RougeScorer

    targets = [*(line + "\n" + line[::-1] for line in texts(0)), "Zwei Männer!"]
    outputs = [*spoilt(targets[:-1], 1), ""]
    units = rouge.units(outputs, targets)
    assert tuple(one.metric for one in units) == rouge.NAMES
    for one in units:
        scorer, pairs = RougeScorer([one.metric]), zip(targets, outputs, strict=True)
        scores = [scorer.score(target, output)[one.metric].fmeasure for target, output in pairs]
        assert one.total == pytest.approx(100 * sum(scores) / len(scores), rel=1e-12)
        assert 0 < one.total < 100
    assert [one.total for one in rouge.units(targets, targets)] == [100] * 4


def test_rouge_by_hand():
    """Three of four words; one of three pairs; the longest common subsequence has two."""
    found = {one.metric: one.total for one in rouge.units(["b a d e"], ["a b d c"])}
    assert found["rouge1"] == pytest.approx(75) and found["rouge2"] == 0 and found["rougeL"] == pytest.approx(50)
    found = {one.metric: one.total for one in rouge.units(["a b"], ["a b d c"])}
    assert found["rouge1"] == pytest.approx(100 * 2 / 3) and found["rouge2"] == pytest.approx(50)


def test_rouge_refuses_what_it_cannot_read():
    with pytest.raises(UserError, match="letters a to z.*use --metric bleu"):
        rouge.units(["мир"], ["мир и война"])


@pytest.mark.parametrize(("page", "package"), [(rouge, "rouge_score.rouge_scorer"), (bleu, "sacrebleu")])
def test_a_missing_package_is_named(page, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'headfold\[(summaries|translation)\]'"):
        page.units(["a"], ["a"])


def test_one_unit_has_no_interval():
    with pytest.raises(UserError, match="expected at least 2 windows to draw from, got 1"):
        differences([mean_of("nll", "windows", np.ones(1))] * 2)


def test_what_has_no_value_has_no_interval():
    good, bad = paired(0, 0.0)[0], mean_of("nll", "items", np.array([np.nan] + [1.0] * 79))
    (found,) = differences([good, bad])
    assert np.isnan([found.value, found.low, found.high, found.p]).all() and not found.is_distinguishable
