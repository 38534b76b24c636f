"""A wrapper is calibrated on images with texts, which its own processor puts together."""

import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import one_line
from test_captions import PIL, WORDS, captioned  # noqa: F401 (a fixture)
from tiny import VOCABULARY, stock_model, tiny_sites
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast, ViTImageProcessorPil
from wrapped_models import SEEN, logits_of, wrapped_checkpoint

import headfold
from headfold.calibration import collect
from headfold.core.errors import UserError
from headfold.corpus.samples import draw_sample, kind_of
from headfold.stats_file import StatsFile

COLUMNS = ("image", "caption")
TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }} "
    "{% for part in turn.content %}{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endfor %}"
)
assert PIL


def with_processor(path: Path, *, resizes: bool = True, template: str | None = None) -> Path:
    """A tiny LLaVA with what stands before it."""
    words = [*WORDS, *(f"w{number}" for number in range(VOCABULARY - len(WORDS) - 1)), "<image>"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=["<image>"], **names)
    shutil.copytree(wrapped_checkpoint("llava", torch.float32), path)
    LlavaProcessor(
        ViTImageProcessorPil(size={"height": 12, "width": 12}, do_resize=resizes),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_processor(tmp_path_factory.mktemp("llava") / "model")


def test_two_columns_make_images_with_text_of_a_wrapper_that_sees() -> None:
    assert kind_of({"model_type": "llava", "vision_config": {}}, COLUMNS) == "captions"
    assert kind_of({"model_type": "llava", "vision_config": {}}) == "text"
    assert kind_of({"model_type": "voxtral", "audio_config": {}}, COLUMNS) == "spoken"
    assert kind_of({"model_type": "voxtral", "audio_config": {}}) == "text"
    assert kind_of({"model_type": "llama"}, COLUMNS) == "text"


def test_an_image_stands_in_its_text(llava: Path, captioned: Path, tmp_path: Path) -> None:  # noqa: F811
    request = dict(num_items=6, context=64, seed=None, columns=COLUMNS)
    sample = draw_sample("captions", str(captioned), path=llava, **request)
    assert sample["pixel_values"].shape == (6, 3, 12, 12)
    assert (sample["input_ids"][:, :9] == SEEN).all() and (sample["input_ids"] == SEEN).sum() == 6 * 9
    assert sample["attention_mask"].sum(1).tolist() == [9 + 6, 9 + 9] * 3
    spoken = with_processor(tmp_path / "chat", template=TEMPLATE)
    talked = draw_sample("captions", str(captioned), path=spoken, **request)
    assert (talked["input_ids"][:, 1:10] == SEEN).all() and (talked["input_ids"][:, 0] == WORDS.index("<unk>")).all()


def test_a_fold_is_calibrated_on_images_with_text(llava: Path, captioned: Path, tmp_path: Path) -> None:  # noqa: F811
    data = dict(calibration=str(captioned), columns=COLUMNS, items=32)
    result = headfold.fold(llava, tmp_path / "out", kv_heads=2, **data)
    assert result.refitted and result.verification is not None and result.verification.passed
    card = (tmp_path / "out" / "README.md").read_text()
    assert "LlavaForConditionalGeneration.from_pretrained" in card and "processor = AutoProcessor" in card
    again = headfold.fold(llava, tmp_path / "again", plan=tmp_path / "out" / "plan.json")
    assert again.plan.calibration["kind"] == "captions"
    files = [tmp_path / name / "model.safetensors" for name in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()

    headfold.calibrate(llava, tmp_path / "stats.safetensors", **data)
    measured = StatsFile(tmp_path / "stats.safetensors")
    sample = measured.sample()
    assert sample is not None
    model, sites = stock_model(llava, torch.float32), [site for site, _ in tiny_sites(llava)]
    assert measured["layers.0.self"].count == int(sample["attention_mask"].sum())
    blind = collect(model, sites, {name: sample[name] for name in ("input_ids", "attention_mask")})["layers.0.self"]
    seen = measured["layers.0.self"]
    assert (blind.tensors["second"] - seen.tensors["second"]).abs().max() > 1
    assert logits_of(stock_model(tmp_path / "out", torch.float32), dict(sample)).isfinite().all()


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("processor", ("expected the model's processor", "copy it there")),
        ("sizes", ("pixel_values: expected inputs of one size", "(1, 3, 14, 14)", "calibrate on text")),
        ("context", ("expected images with their texts in 9 tokens, got 15 or more", "raise --context")),
        ("text", ("expected images with a text each",)),
    ],
)
def test_what_cannot_be_put_together_is_refused_in_one_line(
    case: str,
    words: tuple[str, ...],
    llava: Path,
    captioned: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    model, data, options = llava, str(captioned), {}
    if case == "processor":
        model = tmp_path / "bare"
        shutil.copytree(llava, model)
        (model / "processor_config.json").unlink()
    if case == "sizes":
        model = with_processor(tmp_path / "unsized", resizes=False)
        (tmp_path / "data.jsonl").write_text(
            "".join(f'{{"image": "{size}.png", "caption": "a red square"}}\n' for size in (12, 14))
        )
        for size in (12, 14):
            PIL.new("RGB", (size, size)).save(tmp_path / f"{size}.png")
        data = str(tmp_path / "data.jsonl")
    if case == "context":
        options = {"context": 9}
    if case == "text":
        data = "stdlib"
    with pytest.raises(UserError) as refusal:
        headfold.fold(model, tmp_path / "out", kv_heads=2, calibration=data, columns=COLUMNS, items=8, **options)
    one_line(refusal, *words)
    assert not (tmp_path / "out").exists()


def test_long_texts_are_left_out_and_said(llava: Path, captioned: Path) -> None:  # noqa: F811
    said: list[str] = []
    request = dict(num_items=6, context=15, seed=None, columns=COLUMNS, say=said.append)
    assert len(draw_sample("captions", str(captioned), path=llava, **request)["input_ids"]) == 3
    assert said == ["3 of 6 images with their texts have more than 15 tokens, and are left out"]
