"""Several models on the same data: values are those of each alone, unit by unit, and what does not compare is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_cli import model, refused, run  # noqa: F401 (fixtures)
from test_evaluate import windows_of
from test_evaluate_modalities import CLASSIFIERS, PAIRS, SHARED, items, one_by_one, saved, tiny, tokenizer, writer  # noqa: F401 (fixtures)
from tiny import stock_model, tiny_checkpoint

from headfold.corpus.pairs import encode_pairs
from headfold.evaluate import classification, embedding, perplexity, translation
from headfold.metrics import rouge

TIGHT = 2**10 * torch.finfo(torch.float64).eps


@pytest.fixture
def models(model: Path, tmp_path: Path) -> list[Path]:  # noqa: F811
    """The tiny Llama, another of the same tokenizer, and a text of some windows."""
    other = tmp_path / "other"
    shutil.copytree(model, other)
    shutil.copy(tiny_checkpoint("llama", torch.float32, seed=1) / "model.safetensors", other)
    return [model, other]


def rows_of(ran) -> dict[tuple[str, str], dict]:
    assert ran.code == 0, ran
    return {(Path(row["model"]).name, row["metric"]): row for row in json.loads(ran.out)}


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_windows_are_those_of_each_alone(batch_size):
    ours, theirs, windows = (*(stock_model(tiny_checkpoint("llama", seed=seed)) for seed in (0, 1)), windows_of(75, 16))
    nll, kl, agreement = perplexity.losses_per_window(ours, theirs, windows, batch_size=batch_size)
    assert nll.lower_is_better and kl.lower_is_better and not agreement.lower_is_better
    for at, window in enumerate(windows):
        alone = perplexity.compare_models(ours, theirs, [window])
        expected = {"nll": alone.nll, "kl": alone.kl, "top1_agreement": alone.top1_agreement}
        for units in (nll, kl, agreement):
            assert units.sums[at, 1] == len(window) - 1
            assert float(units.value(units.sums[at])) == pytest.approx(expected[units.metric], rel=TIGHT)
    together = perplexity.compare_models(ours, theirs, windows)
    assert [one.total for one in (nll, kl)] == pytest.approx([together.nll, together.kl], rel=TIGHT)


def test_pairs_are_those_of_each_alone(tokenizer):  # noqa: F811
    ours, theirs = writer("bart"), writer("bart", seed=1)
    found = translation.scores_per_pair(
        ours, PAIRS, tokenizer, reference=theirs, max_new_tokens=6, metric="rouge", batch_size=4
    )
    assert [units.metric for units in found] == ["nll", "kl", *rouge.NAMES]
    for at, pair in enumerate(PAIRS):
        alone = translation.scores_per_pair(ours, [pair], tokenizer, reference=theirs, max_new_tokens=6, metric="rouge")
        for units, one in zip(found, alone, strict=True):
            exact = TIGHT if units.metric != "kl" else 1e-5  # KL is taken in float32
            assert units.sums[at].tolist() == pytest.approx(one.sums[0].tolist(), rel=exact)
    bleu = translation.scores_per_pair(ours, PAIRS, tokenizer, max_new_tokens=6)[1]
    outputs = translation.generate_texts(ours, encode_pairs(PAIRS, tokenizer, 512), tokenizer, max_new_tokens=6)
    assert bleu.total == translation.METRICS["bleu"].corpus_bleu(outputs, [target for _, target in PAIRS])


def test_items_are_those_of_each_alone():
    ours, theirs, sample = *(tiny(CLASSIFIERS["bert"], "bert", seed) for seed in (0, 1)), items("bert")
    right, loss, kl, agreement = classification.scores_per_item(ours, sample, reference=theirs, batch_size=4)
    for at, item in enumerate(one_by_one(sample)):
        q, p = (each(**item).logits[0].log_softmax(0) for each in (ours, theirs))
        label = int(sample["labels"][at])
        expected = [float(q.argmax() == label), float(-q[label]), float((p.exp() * (p - q)).sum())]
        assert [one.sums[at, 0] for one in (right, loss, kl)] == pytest.approx(expected, rel=1e-9)
        assert agreement.sums[at, 0] == float(q.argmax() == p.argmax())
    whole = classification.evaluate_classification(ours, sample, reference=theirs)
    assert [one.total for one in (right, loss, kl)] == pytest.approx(
        [whole.accuracy, whole.cross_entropy, whole.kl], rel=TIGHT
    )
    assert [one.lower_is_better for one in (right, loss, kl, agreement)] == [False, True, True, False]


def test_cosines_are_those_of_each_item():
    ours, theirs, sample = *(tiny("BertModel", "bert", seed) for seed in (0, 1)), items("bert")
    (cosine,) = embedding.cosines_per_item(ours, sample, theirs, batch_size=4)
    a, b = (embedding.embed(each, sample) for each in (ours, theirs))
    assert cosine.sums[:, 0].tolist() == pytest.approx(torch.cosine_similarity(a, b).tolist(), rel=1e-9)
    assert cosine.total == pytest.approx(embedding.evaluate_embedding(ours, sample, theirs).cosine, rel=TIGHT)


def test_values_are_those_of_eval_and_the_first_is_the_measure(run, models):  # noqa: F811
    text = ("--text", models[0].parent / "text.txt", "--context", 32)
    alone = [json.loads(run("eval", path, *text, "--json").out) for path in models]
    there, back = (rows_of(run("eval", "--compare", *order, *text, "--json")) for order in (models, models[::-1]))
    assert there["tiny-llama", "nll"]["difference"] is there["tiny-llama", "nll"]["verdict"] is None
    assert not {"units", "sums"} & alone[0].keys()
    for path, found in zip(models, alone, strict=True):
        row = there[path.name, "nll"]
        assert row["value"] == pytest.approx(found["nll"], rel=TIGHT)
        assert (row["num_units"], row["units"]) == (found["num_windows"], "windows")
    second, first = there["other", "nll"], back["tiny-llama", "nll"]
    assert second["difference"] == -first["difference"] == second["value"] - there["tiny-llama", "nll"]["value"] != 0
    assert (second["low"], second["high"]) == pytest.approx((-first["high"], -first["low"]), rel=1e-9)
    assert second["low"] < second["difference"] < second["high"] and second["p"] == first["p"]
    assert {second["verdict"], first["verdict"]} == {"better", "worse"}
    assert (second["verdict"] == "better") == (second["difference"] < 0)


def test_a_model_beside_itself_is_not_distinguishable(run, models):  # noqa: F811
    words = ("eval", "--compare", models[0], models[0], "--text", models[0].parent / "text.txt", "--context", 32)
    ran = run(*words, "--json")
    same = json.loads(ran.out)[1]
    assert ran.err == ""
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    shown = run(*words)
    assert (
        "not distinguishable" in shown.out
        and "[+0.0000, +0.0000]" in shown.out
        and "evaluate 2: 3,660 tokens in" in shown.err
    )
    assert f"{same['num_units']} windows of" in shown.out


def test_a_reference_adds_what_is_beside_it(run, models):  # noqa: F811
    text = ("--text", models[0].parent / "text.txt", "--context", 32, "--reference", models[0])
    rows = rows_of(run("eval", "--compare", *models, *text, "--json"))
    assert rows["tiny-llama", "kl"]["value"] == 0 and rows["tiny-llama", "top1_agreement"]["value"] == 1
    beside = json.loads(run("eval", models[1], *text, "--json").out)
    assert rows["other", "kl"]["value"] == pytest.approx(beside["kl"], rel=TIGHT)
    assert rows["other", "top1_agreement"]["verdict"] == rows["other", "kl"]["verdict"] == "worse"


def test_losses_of_other_tokens_do_not_compare(run, models):  # noqa: F811
    """The same letters by other numbers; as many tokens, so nothing but the tokens tells."""
    file = models[1] / "tokenizer.json"
    core = json.loads(file.read_text())
    vocabulary = core["model"]["vocab"]
    letters = [piece for piece in vocabulary if len(piece) == 1]
    turned = zip(letters, [vocabulary[piece] for piece in reversed(letters)], strict=True)
    core["model"]["vocab"] = vocabulary | dict(turned)
    file.write_text(json.dumps(core))
    text = ("--text", models[0].parent / "text.txt")
    refused(run("eval", "--compare", *models, *text), "other", "losses per token of two vocabularies")
    refused(run("eval", "--compare", models[0], models[0], "--reference", models[1], *text), "other", "vocabularies")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--compare", 0), ("at least two models", "got")),
        ((0, 1), ("--compare", "got 2")),
        (("--compare", 0, 1, "--metric", "rouge"), ("rouge", "encoder-decoder", "tiny-llama")),
        ((0, "--metric", "blue"), ("blue", "did you mean bleu?")),
        ((0, "--seed", 3), ("--seed", "--compare or --task")),
        ((0, "--num-fewshot", 3), ("--num-fewshot", "--task")),
        (("--compare", 0, 1, "--limit", 30), ("at least 2 windows", "got 1")),
    ],
    ids=str,
)
def test_bad_requests(run, models, words, expected):  # noqa: F811
    refused(run("eval", *(models[word] if isinstance(word, int) and word < 2 else word for word in words)), *expected)


def test_models_of_several_kinds_do_not_compare(run, models, saved):  # noqa: F811
    path = saved(tiny(CLASSIFIERS["vit"], "vit"), "vit")
    refused(run("eval", "--compare", models[0], path), "vit", "images", "text")
    refused(run("eval", "--compare", path, path), "--text SOURCE")


def test_eval_measures_rouge(run, saved, tmp_path, tokenizer):  # noqa: F811
    ours, theirs = writer("bart"), writer("bart", seed=1)
    paths = [saved(ours, "ours"), saved(theirs, "theirs")]
    outputs = translation.generate_texts(ours, encode_pairs(PAIRS, tokenizer, 64), tokenizer, max_new_tokens=6)
    targets = [
        output if at % 2 else target for at, (output, (_, target)) in enumerate(zip(outputs, PAIRS, strict=True))
    ]
    pairs = [{"source": source, "target": target} for (source, _), target in zip(PAIRS, targets, strict=True)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    words = ("--text", tmp_path / "p.jsonl", "--metric", "rouge", "--max-new-tokens", 6)
    found = json.loads(run("eval", paths[0], *words, "--reference", paths[1], "--json").out)
    for prefix, each in (("", ours), ("reference_", theirs)):
        outputs = translation.generate_texts(each, encode_pairs(PAIRS, tokenizer, 64), tokenizer, max_new_tokens=6)
        expected = rouge.scores(outputs, targets)
        for name in rouge.NAMES:
            assert found[prefix + name] == pytest.approx(expected[name].mean(), rel=1e-12)
    assert found["bleu"] is None and 0 < found["rouge1"] < 100
    assert "ROUGE-Lsum" in run("eval", paths[0], *words).out
    rows = rows_of(run("eval", "--compare", *paths, *words, "--json"))
    assert {metric for _, metric in rows} == {"nll", *rouge.NAMES}
    assert rows["theirs", "rouge1"]["value"] == pytest.approx(found["reference_rouge1"], rel=1e-12)


def test_of_other_tokens_only_outputs_compare(run, saved, tmp_path):  # noqa: F811
    paths = [saved(writer("bart"), "ours"), saved(writer("bart", seed=1), "theirs")]
    file = Path(paths[1]) / "tokenizer.json"
    file.write_text(file.read_text().replace('"w57"', '"other"'))
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"source": a, "target": b}) for a, b in PAIRS))
    words = ("--compare", *paths, "--text", tmp_path / "p.jsonl")
    shown = run("eval", *words, "--max-new-tokens", 6)
    assert shown.code == 0 and "note: the models' tokenizers differ" in shown.out and "nll" not in shown.out
    refused(run("eval", *words, "--max-new-tokens", 0), "models of one tokenizer", "--max-new-tokens")
    refused(run("eval", *words, "--reference", paths[0]), "models of one tokenizer", "--reference")


def test_classifiers_and_encoders_compare(run, saved, tmp_path):  # noqa: F811
    (tmp_path / "lines.txt").write_text("\n".join(source for source, _ in PAIRS))
    labelled = [json.dumps({"text": source, "label": at % 5}) for at, (source, _) in enumerate(PAIRS)]
    (tmp_path / "labelled.jsonl").write_text("\n".join(labelled))
    sorts = [saved(tiny(CLASSIFIERS["bert"], "bert", seed), f"sorts{seed}") for seed in (0, 1)]
    words = ("--text", tmp_path / "labelled.jsonl", "--columns", "text,label")
    rows = rows_of(run("eval", "--compare", *sorts, *words, "--json"))
    alone = json.loads(run("eval", sorts[1], *words, "--json").out)
    assert rows["sorts1", "accuracy"]["value"] == alone["accuracy"]
    assert rows["sorts1", "cross_entropy"]["value"] == pytest.approx(alone["cross_entropy"], rel=TIGHT)
    bare = [saved(tiny("BertModel", "bert", seed), f"bare{seed}") for seed in (0, 1)]
    words = ("--compare", *bare, "--text", tmp_path / "lines.txt")
    refused(run("eval", *words), "--reference ORIGINAL")
    rows = rows_of(run("eval", *words, "--reference", bare[0], "--json"))
    assert rows["bare0", "cosine"]["value"] == pytest.approx(1) and rows["bare1", "cosine"]["verdict"] == "worse"


def test_too_few_units_are_said(run, models):  # noqa: F811
    text = ("--text", models[0].parent / "text.txt", "--context", 32)
    assert (
        "note: intervals from 4 windows are too narrow" in run("eval", "--compare", *models, *text, "--limit", 128).out
    )
    assert "note" not in run("eval", "--compare", *models, *text).out


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared models and data are not here")
def test_trained_models_compare(run, tmp_path):  # noqa: F811
    """A spoilt translator is told from the trained one; the same weights are not."""
    path, source = SHARED / "models" / "multi30k-t5", SHARED / "data" / "multi30k" / "test_2016_flickr"
    words = ("--merge", "mean", "--group", "contiguous", "--no-refit", "--no-verify", "--kv-heads", 4)
    assert run("fold", path, tmp_path / "folded", *words).code == 0
    options = ("--text", f"{source}.en.gz,{source}.de.gz", "--limit", 40, "--max-new-tokens", 50, "--json")
    rows = rows_of(run("eval", "--compare", path, tmp_path / "folded", *options))
    assert rows["folded", "bleu"]["verdict"] == rows["folded", "nll"]["verdict"] == "worse"
    assert 18 < rows["multi30k-t5", "bleu"]["value"] < 38
