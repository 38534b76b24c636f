"""Passes over data that ranks share give the figures of one process, to the last bit, on every rank."""

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
from test_evaluate_modalities import CLASSIFIERS, PAIRS, items, tiny, tokenizer, writer  # noqa: F401 (a fixture)
from tiny import stock_model, tiny_checkpoint, tiny_tokens

from headfold import parallel
from headfold.corpus.pairs import encode_pairs
from headfold.evaluate import classification, embedding, perplexity, sensitivity, translation
from headfold.evaluate.sensitivity import Divergence, replaced_parameters


def on_ranks(world: int, monkeypatch: pytest.MonkeyPatch, measure: Callable[[], Any]) -> list[Any]:
    """What `measure` returns on each of so many ranks; threads stand for processes."""
    local, meeting, slots = threading.local(), threading.Barrier(world), [None] * world
    found: list[Any] = [None] * world

    def all_gather(value: Any) -> list[Any]:
        slots[local.rank] = value
        meeting.wait(60)
        values = list(slots)
        meeting.wait(60)
        return values

    def run(rank: int) -> None:
        local.rank = rank
        found[rank] = measure()

    for module in (parallel, sensitivity):
        monkeypatch.setattr(module, "falls_here", lambda number: number % world == local.rank)
    monkeypatch.setattr(parallel, "all_gather", all_gather)
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@functools.cache
def opened(seed: int) -> Any:
    return stock_model(tiny_checkpoint("llama", seed=seed))


def losses() -> Any:
    model, other = opened(0), opened(1)
    windows = tuple(tiny_tokens(13, 16)) + (tiny_tokens(1, 9)[0],)
    found = perplexity.compare_models(model, other, windows, batch_size=3)
    units = perplexity.losses_per_window(model, other, windows, batch_size=3)
    figures = (found.nll, found.reference_nll, found.kl, found.top1_agreement, found.nll_by_position)
    return figures, [one.sums.tolist() for one in units]


def classes() -> Any:
    model, other = (tiny(CLASSIFIERS["vit"], "vit", seed) for seed in (0, 1))
    return [
        one.sums.tolist() for one in classification.scores_per_item(model, items("vit"), reference=other, batch_size=3)
    ]


def embeddings() -> Any:
    model, other = (tiny("BertModel", "bert", seed) for seed in (0, 1))
    found = embedding.evaluate_embedding(model, items("bert"), other, batch_size=3)
    return found.cosine, found.worst_cosine, found.rank_correlation


def divergence() -> Any:
    model = copy.deepcopy(opened(0))
    measure = Divergence(model, {"input_ids": tiny_tokens(13, 16)})
    with replaced_parameters(model, {"lm_head.weight": model.get_parameter("lm_head.weight").detach() * 1.3}):
        return measure()


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("measure", [losses, classes, embeddings, divergence])
def test_ranks_find_what_one_process_finds(
    measure: Callable[[], Any], world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there are more ranks than batches."""
    monkeypatch.setattr(sensitivity, "BATCH_TOKENS", 48)
    alone = measure()
    assert on_ranks(world, monkeypatch, measure) == [alone] * world


def test_ranks_write_what_one_process_writes(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    model, sample = writer("t5"), encode_pairs(PAIRS, tokenizer, 32)

    def write() -> Any:
        texts = translation.generate_texts(model, sample, tokenizer, max_new_tokens=6, batch_size=2)
        return texts, translation.target_losses(model, sample, batch_size=2).tolist()

    alone = write()
    assert on_ranks(2, monkeypatch, write) == [alone] * 2
