"""A whole CLIP: two towers of other sizes, folded and measured on images with a text each."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from grades import assert_differs, assert_tight_through_float32_norms
from tiny import answer_of, stock_model, tiny_checkpoint, tiny_sample
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPModel, PreTrainedTokenizerFast, ViTImageProcessorPil

import headfold
from headfold import cli
from headfold.corpus.samples import draw_sample, kind_of

PIL = pytest.importorskip("PIL.Image")
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "green", "blue", "square", "on", "grey", "and", "no", "circle"]
COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200)}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP with tokenizer and image processor."""
    path = tmp_path_factory.mktemp("clip") / "model"
    stock_model(tiny_checkpoint("clip"), torch.float32).save_pretrained(path)
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    ViTImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures with what they show."""
    table = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path, pictures, texts = tmp_path_factory.mktemp("data") / "captioned.parquet", [], []
    for number in range(40):
        name = list(COLOURS)[number % 3]
        file = io.BytesIO()
        picture = PIL.new("RGB", (14, 14), (90, 90, 90 + number))
        picture.paste(COLOURS[name], (number % 5, 2, 6 + number % 7, 9))
        picture.save(file, "PNG")
        pictures.append({"bytes": file.getvalue(), "path": None})
        texts.append(f"a {name} square on grey" + " and no circle" * (number % 2))
    parquet.write_table(table.table({"id": list(range(40)), "image": pictures, "caption": texts}), path)
    return path


Ran = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """`headfold WORDS` in this process; its exit code."""

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["headfold", *map(str, words)])
        try:
            cli.main()
        except SystemExit as leaving:
            return leaving.code or 0
        return 0

    return call


def test_kinds() -> None:
    towers = {"text_config": {}, "vision_config": {}, "model_type": "clip"}
    assert kind_of({**towers, "architectures": ["CLIPModel"]}) == "captions"
    assert kind_of({**towers, "architectures": ["CLIPVisionModelWithProjection"]}) != "captions"
    assert kind_of({**towers, "architectures": ["CLIPForImageClassification"]}) == "images"


def test_samples_hold_both(clip: Path, captioned: Path) -> None:
    sample = draw_sample("captions", str(captioned), path=clip, num_items=9, context=64, seed=None)
    assert sample["pixel_values"].shape == (9, 3, 12, 12)
    assert sample["attention_mask"].sum(1).tolist() == [6, 9] * 4 + [6] and sample["input_ids"][0, :2].tolist() == [
        3,
        4,
    ]
    named = draw_sample(
        "captions", str(captioned), path=clip, num_items=9, context=64, seed=None, columns=("image", "caption")
    )
    assert torch.equal(named["pixel_values"], sample["pixel_values"])


@pytest.mark.parametrize("options", [(), ("--merge", "mean", "--no-refit")])
def test_a_whole_clip_folds_and_is_measured(
    options: tuple[str, ...], run: Ran, clip: Path, captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("--kv-heads", "1/2", "--calibration", captioned, "--items", 32, "--json", *options)
    assert run("fold", clip, out, *words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verification"]["passed"] and result["refitted"] == (not options)
    config = json.loads((out / "config.json").read_text())
    heads = {
        site["module"].partition(".")[0]: (site["heads"], site["kv_heads"]) for site in config["headfold"]["sites"]
    }
    assert len(heads) == 2 and all(kv == whole // 2 for whole, kv in heads.values())
    model, original = headfold.load(out), CLIPModel.from_pretrained(clip).eval()
    sample = {name: t.float() if t.is_floating_point() else t for name, t in tiny_sample("clip").items()}
    assert_differs(answer_of(model, sample).double(), answer_of(original, sample).double())
    assert run("eval", out, "--reference", clip, "--text", captioned, "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["kind"] == "captions" and scores["num_items"] == 80 and scores["pooling"] == "projected"
    with torch.no_grad():
        sample = draw_sample("captions", str(captioned), path=clip, num_items=None, context=64, seed=None)
        both = [m(**sample) for m in (model, original)]
    towers = [torch.cat([o.text_embeds, o.image_embeds]).double() for o in both]
    cosine = torch.nn.functional.cosine_similarity(*towers).mean()
    assert_tight_through_float32_norms(torch.tensor([scores["cosine"]]).double(), cosine[None])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("stdlib", "expected images with a text each"),
        ("bare", "expected a column of images and one of text, found id, image"),
    ],
)
def test_other_data_is_refused_in_one_line(
    source: str, words: str, run: Ran, clip: Path, captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if source == "bare":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(parquet.read_table(captioned).drop(["caption"]), tmp_path / "bare.parquet")
        source = str(tmp_path / "bare.parquet")
    assert run("fold", clip, tmp_path / "out", "--kv-heads", "1/2", "--calibration", source) == 2
    error = capsys.readouterr().err.splitlines()
    assert words in error[-1] and sum(line.startswith("headfold: ") for line in error) == 1
    assert not list(tmp_path.glob("out*"))
