"""Samples of every modality: what a seed draws, how items are padded and cut into batches, and what is refused."""

import gzip
import io
import json
import sys
import wave
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil, WhisperFeatureExtractor

from headfold.core.errors import UserError
from headfold.corpus.audio import read_audio
from headfold.corpus.pairs import read_pairs
from headfold.corpus.samples import batches, draw_sample, image_sample_blocks
from headfold.corpus.sentences import read_sentences

SHARED = Path(__file__).parents[2] / "shared"
NUM_ITEMS = 300
CONTEXT = 8
PIXELS = 6
NUMBERS = [f"n{number}" for number in range(NUM_ITEMS)]
"""Every item tells its number, as a word or, in images, as a colour."""


def text_pair(number: int) -> tuple[str, str]:
    """Of lengths that differ from item to item and side to side; some are longer than the context."""
    return " ".join([NUMBERS[number]] + ["a"] * (number % 5)), " ".join([NUMBERS[number]] + ["b"] * (number % 11))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A directory with a word tokenizer, an image processor and a config, and no weights."""
    path = tmp_path_factory.mktemp("model")
    words = ["<pad>", "</s>", "<unk>", "a", "b", *NUMBERS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    size = {"height": PIXELS, "width": PIXELS}
    ViTImageProcessorPil(do_resize=False, size=size, image_mean=[0.0] * 3, image_std=[1.0] * 3).save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": "vit", "label2id": {"cat": 0, "dog": 1}}))
    return path


def write_pairs(folder: Path, form: str) -> str:
    sources, targets = zip(*map(text_pair, range(NUM_ITEMS)), strict=True)
    if form == "parallel":
        with gzip.open(folder / "p.en.gz", "wt") as file:
            file.write("\n".join(sources))
        (folder / "p.de").write_text("\n".join(targets) + "\n")
        return f"{folder}/p.en.gz,{folder}/p.de"
    path, rows = (
        folder / f"pairs.{form}",
        [{"source": s, "target": t, "id": 1} for s, t in zip(sources, targets, strict=True)],
    )
    if form == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=70)
    elif form == "shards":
        path.mkdir()
        for part in range(3):
            pq.write_table(pa.Table.from_pylist(rows[part * 100 : part * 100 + 100]), path / f"{part}.parquet")
    else:
        pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(path)
    return str(path)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def colour(number: int) -> tuple[int, int, int]:
    return number // 16, number % 16, 255


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (PIXELS, PIXELS), colour(number))


def numbers_shown(pixels: torch.Tensor) -> list[int]:
    levels = (pixels[:, :, 0, 0] * 255).round().int()
    assert (levels[:, 2] == 255).all()
    return (levels[:, 0] * 16 + levels[:, 1]).tolist()


def write_images(folder: Path, form: str) -> str:
    if form == "folder":
        for number in range(NUM_ITEMS):
            target = folder / "images" / ("cat" if number < NUM_ITEMS // 2 else "dog") / f"{number:03}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            picture(number).save(target)
        return str(folder / "images")
    rows = [
        {"image": {"bytes": encoded(picture(n)), "path": None}, "label": n * 2 // NUM_ITEMS} for n in range(NUM_ITEMS)
    ]
    path = folder / "images.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=128)
    return str(path)


FORMS = ["parallel", "jsonl", "parquet", "shards", "saved"]


@pytest.mark.parametrize("form", FORMS)
def test_pairs_are_the_first_or_drawn_from_the_whole(form, tmp_path):
    source = write_pairs(tmp_path, form)
    everything = list(map(text_pair, range(NUM_ITEMS)))
    assert read_pairs(source) == everything
    assert read_pairs(source, num_items=7) == everything[:7]
    drawn = read_pairs(source, num_items=40, seed=3)
    assert drawn == read_pairs(source, num_items=40, seed=3) != read_pairs(source, num_items=40, seed=4)
    assert read_pairs(source, num_items=15, seed=3) == drawn[:15]  # more of one seed begin with fewer
    places = [everything.index(pair) for pair in drawn]
    assert len(set(places)) == 40 and places != sorted(places)
    assert {place * 4 // NUM_ITEMS for place in places} == {0, 1, 2, 3}
    assert sorted(read_pairs(source, num_items=10**6, seed=0)) == sorted(everything)  # all there are, each once


def test_every_source_draws_the_same_pairs(tmp_path):
    drawn = [read_pairs(write_pairs(tmp_path, form), num_items=20, seed=1) for form in FORMS]
    assert all(pairs == drawn[0] for pairs in drawn)


def test_pairs_become_the_inputs_of_an_encoder_decoder(model, tmp_path):
    source = write_pairs(tmp_path, "jsonl")
    sample = draw_sample("pairs", source, path=model, num_items=50, context=CONTEXT, seed=5)
    pairs = read_pairs(source, num_items=50, seed=5)
    assert sample.keys() == {"input_ids", "attention_mask", "labels"}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    for ids, mask, labels, pair in zip(*sample.values(), pairs, strict=True):
        lengths = [min(CONTEXT, len(side.split()) + 1) for side in pair]
        assert mask.tolist() == [1] * lengths[0] + [0] * (len(mask) - lengths[0])
        assert (
            ids[mask == 0].eq(0).all() and tokenizer.decode(ids[mask == 1][:-1]) == pair[0] and ids[mask == 1][-1] == 1
        )
        assert labels.tolist() == [*labels[: lengths[1]].tolist(), *[-100] * (len(labels) - lengths[1])]
        assert tokenizer.decode(labels[: lengths[1]][:-1]).split() == pair[1].split()[: CONTEXT - 1]
    assert sample["labels"].shape[1] == CONTEXT and sample["input_ids"].shape[1] == 6


@pytest.mark.parametrize("size", [1, 7, 50, 99])
def test_batches_are_complete_and_trimmed(size, model, tmp_path):
    sample = draw_sample("pairs", write_pairs(tmp_path, "jsonl"), path=model, num_items=50, context=CONTEXT, seed=5)
    parts = list(batches(sample, size))
    assert [len(part["labels"]) for part in parts] == [min(size, 50 - at) for at in range(0, 50, size)]
    for part in parts:
        assert part["attention_mask"][:, -1].any() and (part["labels"][:, -1] != -100).any()
        assert part["input_ids"].shape == part["attention_mask"].shape
        assert all(tensor.is_contiguous() for tensor in part.values())
    for name, padding in {"input_ids": 0, "attention_mask": 0, "labels": -100}.items():
        width = sample[name].shape[1]
        wide = [torch.nn.functional.pad(part[name], (0, width - part[name].shape[1]), value=padding) for part in parts]
        assert torch.equal(torch.cat(wide), sample[name])
    if size < 50:
        assert any(part["input_ids"].shape[1] < sample["input_ids"].shape[1] for part in parts)


def test_batches_leave_images_and_windows_whole():
    sample = {"pixel_values": torch.arange(24.0).view(4, 1, 2, 3), "labels": torch.arange(4)}
    assert [part["labels"].tolist() for part in batches(sample, 3)] == [[0, 1, 2], [3]]
    assert torch.equal(torch.cat([part["pixel_values"] for part in batches(sample, 3)]), sample["pixel_values"])
    assert next(batches({"input_ids": torch.zeros(2, 5)}, 2))["input_ids"].shape == (2, 5)


def test_columns_may_have_other_names_and_nest(tmp_path):
    rows = [
        {"translation": {"en": "a", "de": "b"}, "x": "c", "y": None},
        {"translation": {"en": "d", "de": " "}, "x": "e", "y": "f"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_pairs(str(tmp_path / "rows.jsonl"), ("translation.de", "translation.en")) == [("b", "a")]
    assert read_pairs(str(tmp_path / "rows.jsonl"), ("x", "y")) == [("e", "f")]  # null and blank are no text


def test_sentences_are_lines_rows_or_files(model, tmp_path):
    source = write_pairs(tmp_path, "parallel").split(",")[0]
    assert read_sentences(source)[0] == [text_pair(number)[0] for number in range(NUM_ITEMS)]
    (tmp_path / "some.txt").write_text("one\n\n two\n")
    (tmp_path / "more.txt").write_text("three")
    assert read_sentences(str(tmp_path / "some.txt"))[0] == ["one", "two"]
    assert read_sentences(str(tmp_path))[0] == ["three", "one", "two"]
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "t": "b", "label": "dog"}')
    assert read_sentences(f"{tmp_path}/rows.jsonl:t") == (["b"], None)
    sample = draw_sample(
        "sentences", str(tmp_path / "rows.jsonl"), path=model, num_items=9, context=4, seed=0, columns=("text", "label")
    )
    assert sample["labels"].tolist() == [1] and sample["input_ids"].tolist() == [[3, 1]]
    assert len(read_sentences("stdlib", num_items=2, seed=0)[0]) == 2


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_images_are_drawn_from_every_class(form, model, tmp_path):
    source = write_images(tmp_path, form)
    whole = draw_sample("images", source, path=model, num_items=None, context=0, seed=None)
    assert numbers_shown(whole["pixel_values"]) == list(range(NUM_ITEMS))
    assert whole["labels"].tolist() == [0] * 150 + [1] * 150
    drawn = draw_sample("images", source, path=model, num_items=100, context=0, seed=2)
    again, other = (draw_sample("images", source, path=model, num_items=100, context=0, seed=seed) for seed in (2, 3))
    shown = numbers_shown(drawn["pixel_values"])
    assert torch.equal(again["pixel_values"], drawn["pixel_values"]) and shown != numbers_shown(other["pixel_values"])
    assert len(set(shown)) == 100 and drawn["labels"].tolist() == [number // 150 for number in shown]
    assert 30 < drawn["labels"].sum() < 70  # by chance further off once in 10^4 seeds
    assert drawn["pixel_values"].dtype == torch.float32


def test_images_are_read_as_they_are_wanted(model, tmp_path):
    folder = Path(write_images(tmp_path, "folder"))
    (folder / "dog" / "299.png").write_bytes(b"not an image")
    blocks = image_sample_blocks(str(folder), path=model, num_items=None, seed=None)
    assert numbers_shown(next(blocks)["pixel_values"])[0] == 0
    with pytest.raises(UserError, match="299.png: unreadable image"):
        list(blocks)


def test_images_without_known_classes_have_no_labels(model, tmp_path):
    (tmp_path / "birds").mkdir()
    picture(3).save(tmp_path / "birds" / "a.PNG")
    assert draw_sample("images", str(tmp_path), path=model, num_items=1, context=0, seed=0).keys() == {"pixel_values"}


def write_sound(path: Path, rate: int, width: int, channels: int) -> np.ndarray:
    """A second of a 50 Hz tone of half amplitude."""
    tone = np.sin(2 * np.pi * 50 * np.arange(rate) / rate) / 2
    levels = np.round(tone * 2 ** (8 * width - 1)).astype("<i4") + (128 if width == 1 else 0)
    frames = np.repeat(levels[:, None], channels, 1).reshape(-1, 1).view(np.uint8)[:, :width]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(frames.tobytes())
    return tone


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_is_read_at_every_width(width, channels, tmp_path):
    tone = write_sound(tmp_path / "a.wav", 4000, width, channels)
    [(samples, rate)], texts = read_audio(str(tmp_path))
    assert rate == 4000 and texts is None and samples.dtype == np.float32
    assert np.abs(samples - tone).max() <= 2.0 ** (1 - 8 * width) + 2.0**-24  # half a level, and float32


@pytest.mark.parametrize("channels", [1, 2])
def test_compressed_sound_is_that_of_the_wav_file(channels, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    tone = write_sound(tmp_path / "a.wav", 4000, 2, channels)
    for name in ("b.flac", "c.FLAC"):
        soundfile.write(tmp_path / name, np.repeat(tone[:, None], channels, 1), 4000, format="FLAC")
    (tmp_path / "d.flac").write_bytes(b"no sound")
    with pytest.raises(UserError, match=r"d\.flac: expected sound"):
        read_audio(str(tmp_path))
    (tmp_path / "d.flac").unlink()
    sounds, _ = read_audio(str(tmp_path))
    assert len(sounds) == 3
    for samples, rate in sounds:
        assert rate == 4000 and samples.dtype == np.float32 and np.abs(samples - tone).max() < 2.0**-14


def test_a_wav_that_claims_more_than_it_has_is_read_as_far_as_it_goes(tmp_path):
    tone = write_sound(tmp_path / "a.wav", 4000, 2, 1)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[40:44] = b"\xfe\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(data)
    [(samples, _)], _ = read_audio(str(tmp_path))
    assert len(samples) == len(tone)


def test_without_soundfile_wav_of_16_bits_is_read(tmp_path, monkeypatch):
    """To the same samples; all else names what to install."""
    pytest.importorskip("soundfile")
    write_sound(tmp_path / "a.wav", 4000, 2, 2)
    (with_it,), _ = read_audio(str(tmp_path))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (without,), _ = read_audio(str(tmp_path))
    assert np.array_equal(with_it[0], without[0]) and with_it[1] == without[1] == 4000
    write_sound(tmp_path / "a.wav", 4000, 3, 1)
    with pytest.raises(UserError, match=r"a\.wav: expected wav of 16 bits \(it has 24 bits\); .* 'headfold\[audio\]'"):
        read_audio(str(tmp_path))
    (tmp_path / "a.wav").rename(tmp_path / "a.mp3")
    (tmp_path / "a.mp3").write_bytes(b"no sound")
    with pytest.raises(UserError, match=r"a\.mp3: expected wav of 16 bits .* pip install 'headfold\[audio\]'"):
        read_audio(str(tmp_path))


def test_sound_becomes_features_and_labels(model, tmp_path):
    WhisperFeatureExtractor(feature_size=10, chunk_length=1).save_pretrained(tmp_path / "whisper")
    for file in model.glob("tokenizer*"):
        (tmp_path / "whisper" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "whisper" / "config.json").write_text('{"model_type": "whisper", "decoder_start_token_id": 3}')
    (tmp_path / "sounds").mkdir()
    for name, rate, text in (("a", 16000, "a b"), ("b", 8000, "b")):
        write_sound(tmp_path / "sounds" / f"{name}.wav", rate, 2, 1)
        (tmp_path / "sounds" / f"{name}.txt").write_text(text)
    sample = draw_sample(
        "audio", str(tmp_path / "sounds"), path=tmp_path / "whisper", num_items=2, context=4, seed=None
    )
    assert sample["labels"].tolist() == [[4, 1], [4, 1]]  # the start that the model adds itself is taken off
    features = sample["input_features"]
    assert features.shape == (2, 10, 100) and features.dtype == torch.float32
    # One tone at two rates: resampled, its band stands out alike.
    assert (
        torch.equal(features.mean(2).argmax(1), torch.tensor([0, 0]))
        and (features[0] - features[1])[0].abs().mean() < 0.05
    )


def test_recordings_without_words_are_none_for_a_model_that_writes(tmp_path):
    """Its decoder would have nothing to read; the extractor's warnings of bands without a frequency are not for users."""
    with pytest.warns(UserWarning, match="mel filter"):
        WhisperFeatureExtractor(feature_size=60, n_fft=40, chunk_length=1).save_pretrained(tmp_path / "whisper")
    (tmp_path / "sounds").mkdir()
    write_sound(tmp_path / "sounds" / "a.wav", 16000, 2, 1)
    config, place = tmp_path / "whisper" / "config.json", {"path": tmp_path / "whisper", "context": 4, "seed": None}
    config.write_text('{"model_type": "whisper", "is_encoder_decoder": true}')
    with pytest.raises(UserError, match=r"sounds: expected a transcript of every recording.*write NAME\.txt"):
        draw_sample("audio", str(tmp_path / "sounds"), num_items=2, **place)
    config.write_text('{"model_type": "whisper"}')
    assert draw_sample("audio", str(tmp_path / "sounds"), num_items=2, **place).keys() == {"input_features"}


REFUSALS = [
    ("pairs", "text.txt", (), "an encoder-decoder needs pairs of text, got one file of text"),
    ("pairs", "missing.jsonl", (), "no such file or folder; expected FILE.jsonl"),
    ("pairs", "rows.jsonl", (), "expected columns source, target, found text, number; name them with --columns"),
    ("pairs", "rows.jsonl", ("text", "number"), "column 'number' holds int, expected text"),
    ("pairs", "rows.jsonl", ("text",), "pairs need two columns, got text"),
    ("pairs", "empty.jsonl", (), "expected rows, found none"),
    ("pairs", "bad.jsonl", (), "write one JSON object per line"),
    ("pairs", "text.txt,longer.txt", (), "expected files with the same number of lines"),
    ("pairs", "text.txt,nothing.txt", (), "nothing.txt: expected text with one item per line, got no such file"),
    ("sentences", "rows.jsonl", ("caption",), "expected columns caption, found text, number"),
    ("sentences", "empty.txt", (), "expected sentences, found none"),
    ("sentences", "text.txt", ("a", "b"), "plain text has no columns a, b"),
    ("sentences", "nosuchthing", (), "no such file or source"),
    ("images", "text.txt", (), "an image model needs images, found none"),
    ("images", "rows.jsonl", (), "an image model needs a column of images, found text, number"),
    ("images", "rows.jsonl", ("text",), "no such file"),
    ("images", "rows.jsonl", ("number",), "expected an encoded image or its path, got int"),
    ("images", "labelled.jsonl", (), "got the label 'bird'"),
    ("images", "nosuchfolder", (), "no such file or folder"),
    ("audio", "text.txt", (), "a speech model needs audio, found none"),
    ("audio", "rows.jsonl", (), "a speech model needs a column of audio"),
    ("audio", "rows.jsonl", ("text",), "no such file"),
    ("text", "self", (), "self: expected a source of text"),
]


@pytest.mark.parametrize(("kind", "source", "columns", "message"), REFUSALS)
def test_what_cannot_be_read_is_refused_in_one_line(kind, source, columns, message, model, tmp_path):
    (tmp_path / "text.txt").write_text("a\nb\n")
    (tmp_path / "longer.txt").write_text("a\nb\nc\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "number": 1}')
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty.txt").write_text("\n")
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "labelled.jsonl").write_text('{"image": "a.png", "label": "bird"}')
    named = ",".join(part if part == "self" else str(tmp_path / part) for part in source.split(","))
    with pytest.raises(UserError, match=message) as refusal:
        draw_sample(kind, named, path=model, num_items=3, context=8, seed=0, columns=columns)
    assert "\n" not in str(refusal.value)


def test_images_need_the_model_s_processor(model, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="expected the model's processor"):
        draw_sample("images", write_images(tmp_path, "parquet"), path=tmp_path, num_items=1, context=0, seed=0)
