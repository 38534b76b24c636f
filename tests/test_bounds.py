"""Data larger than it looks, of no end or of no name ends in one line: no hang, and no memory beyond the bounds."""

import gzip
import io
import json
import os
import struct
import wave
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from checkpoints import one_line
from PIL import Image

from headfold.core.errors import UserError
from headfold.corpus import bounds, images, open_corpus, parquet, rows, text
from headfold.corpus.audio import read_audio
from headfold.corpus.hub import open_stream
from headfold.corpus.images import image_blocks
from headfold.corpus.lines import parallel_lines
from headfold.corpus.pairs import encode_pairs, padded, read_pairs
from headfold.corpus.rows import open_rows
from headfold.corpus.sentences import encode_sentences, read_sentences


def texts(source: object) -> list[str]:
    return list(open_corpus(str(source), seed=0).documents)


def first_rows(source: object) -> list[object]:
    table = open_rows(str(source))
    return list(table.draw(table.columns, 2, 0, lambda row: True))


def pictures(source: object) -> object:
    return next(image_blocks(str(source), _as_tensors))


def _as_tensors(images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.tensor(np.stack([np.asarray(image) for image in images]))}


def refused(read: Callable[[], object], *words: object) -> None:
    with pytest.raises(UserError) as error:
        read()
    one_line(error, *words)


def gz_of(path: Path, part: bytes, times: int) -> Path:
    with gzip.open(path, "wb") as file:
        for _ in range(times):
            file.write(part)
    return path


def test_a_gzip_bomb_of_one_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = gz_of(tmp_path / "bomb.gz", b"a" * 2**20, 10)
    assert bomb.stat().st_size < 20_000
    monkeypatch.setattr(bounds, "LONGEST_LINE", 2**20)
    refused(lambda: read_sentences(str(bomb)), bomb, "lines of at most 1048576 bytes")
    honest = gz_of(tmp_path / "honest.gz", b"a\n", 1)
    refused(lambda: read_pairs(f"{honest},{bomb}"), bomb, "break it into several")


def test_a_gzip_bomb_of_many_lines_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "DECOMPRESSED", (200, 2**16))
    bomb = gz_of(tmp_path / "bomb.gz", b"a\n" * 2**15, 10)
    refused(lambda: read_sentences(str(bomb)), bomb, "200 times")
    honest = gz_of(tmp_path / "honest.gz", b"a honest line of text\n", 100)
    assert len(read_sentences(str(honest))[0]) == 100


def test_lines_are_those_of_a_file(tmp_path: Path) -> None:
    """However long, and whatever ends them."""
    path = tmp_path / "lines.txt"
    for content in ("a\nb\r\nc\rd", "\n\na" + "x" * 300_000 + "\nb\n", "é" * 70_000 + "\nb"):
        path.write_text(content, newline="", encoding="utf-8")
        expected = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = parallel_lines([path], ["text"])
        assert [row["text"] for row in found.take(range(found.count), ["text"])] == expected


def test_longer_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "a" * 200_000}))
    (tmp_path / "long.txt").write_text("a\n" * 500)
    monkeypatch.setattr(bounds, "LONGEST_LINE", 1000)
    for read in (texts, first_rows):
        refused(lambda read=read: read(tmp_path / "long.jsonl"), "long.jsonl", "lines of at most 1000 bytes")
    monkeypatch.setattr(text, "LARGEST_TEXT", 900)
    refused(lambda: texts(tmp_path / "long.txt"), "long.txt", "at most 900 bytes, got 1000")
    monkeypatch.setattr("headfold.corpus.lines.MOST_ROWS", 400)
    monkeypatch.setattr(bounds, "MOST_ROWS", 400)
    refused(lambda: read_sentences(str(tmp_path / "long.txt")), "long.txt", "at most 400 rows")


def test_a_table_of_equal_values_is_decoded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet stores a value once; 50 000 rows of 100 KB are a file of a few bytes."""
    path = tmp_path / "same.parquet"
    value = pa.DictionaryArray.from_arrays(pa.array([0] * 50_000, pa.int32()), pa.array(["a" * 100_000]))
    pq.write_table(pa.table({"text": value}), path, store_schema=False)
    assert path.stat().st_size < 20_000
    before = pa.total_allocated_bytes()
    monkeypatch.setattr(parquet, "SLICE_BYTES", 2**22)
    assert len(first_rows(path)) == 2
    assert pa.default_memory_pool().max_memory() - before < 2**26
    monkeypatch.setattr(parquet, "LARGEST_TEXT", 10**6)
    refused(lambda: texts(path), path, "at most 1000000 characters")


def test_rows_of_parquet_come_in_any_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"text": [f"row {n}" for n in range(1000)], "n": list(range(1000))})
    pq.write_table(table, path, row_group_size=300)
    numbers = [0, 1, 299, 300, 301, 555, 998, 999]
    for size in (1, 7, 256, 5000):
        monkeypatch.setattr(parquet, "SLICE", size)
        found = list(open_rows(str(path)).take(numbers, ["n"]))
        assert [row["n"] for row in found] == numbers
        assert list(open_corpus(str(path)).documents) == table["text"].to_pylist()


@pytest.mark.parametrize("at", [0.2, 0.5, 0.9])
def test_broken_parquet_is_one_line(at: float, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": [f"row {n} of many" * 9 for n in range(3000)]}), path, compression="gzip")
    data = bytearray(path.read_bytes())
    place = int(len(data) * at)
    data[place : place + 64] = bytes(64)
    path.write_bytes(data)
    for read in (texts, first_rows):
        try:
            read(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_long_tables_are_drawn_from_without_a_list_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    table = rows.Table("long", ("n",), 2**28, lambda numbers, columns: ({"n": n} for n in numbers))
    some, more = (list(table.draw(["n"], count, 3, lambda row: True)) for count in (5, 50))
    assert some == more[:5] and len({row["n"] for row in more}) == 50 and max(row["n"] for row in more) > 2**26
    monkeypatch.setattr(bounds, "SHUFFLED_ROWS", 10)
    assert sorted(bounds.drawn_order(100, 0)) == list(range(100))


def png(width: int, height: int) -> bytes:
    """A black image by its header; its rows end early."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(200_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width", [14_000, 20_000, 2**30])
def test_an_image_of_too_many_pixels_is_refused(width: int, tmp_path: Path) -> None:
    """Pillow itself warns of some, and refuses others."""
    (tmp_path / "bomb.png").write_bytes(png(width, 10_000))
    refused(lambda: pictures(tmp_path), "bomb.png", "unreadable image", "pixels")


def test_images_are_processed_before_too_many_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    held = []

    def processor(images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
        held.append(len(images))
        return _as_tensors(images, return_tensors)

    monkeypatch.setattr(images, "MOST_PIXELS", 40)
    found = next(image_blocks(str(tmp_path), processor))["pixel_values"]
    assert held == [3, 2] and found[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_an_image_that_another_program_would_decode_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    refused(lambda: pictures(tmp_path), "page.png", "not an image that pillow reads")


def wav(frames: int, rate: int = 16_000, channels: int = 1, width: int = 2, claimed: int | None = None) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((channels, min(width, 4), rate, 0, "NONE", ""))
        out.writeframes(bytes(frames * channels * width))
    data = bytearray(file.getvalue())
    if claimed is not None:
        data[40:44] = struct.pack("<I", claimed)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (wav(0), "no length"),
        (wav(10, rate=2**31 - 1), "at most 6 hours"),
        (wav(10, channels=1000), "1000 channels"),
        (b"RIFF" + wav(10)[4:20], "expected sound"),
    ],
)
def test_sound_of_absurd_length_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(data)
    refused(lambda: read_audio(str(tmp_path)), "a.wav", message)


def test_compressed_silence_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a.flac", np.zeros(200_000), 8000)
    monkeypatch.setattr("headfold.corpus.audio.PIECE", 1000)
    ((samples, rate),), _ = read_audio(str(tmp_path))
    assert len(samples) == 200_000 and rate == 8000
    monkeypatch.setattr("headfold.corpus.audio.MOST_FRAMES", 100_000)
    refused(lambda: read_audio(str(tmp_path)), "a.flac", "got 200000 samples")


@pytest.mark.parametrize("source", ["", " "])
@pytest.mark.parametrize("read", [texts, first_rows, read_pairs, read_sentences, read_audio, pictures])
def test_a_source_without_a_name_reads_no_directory(
    read: Callable[[str], object], source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a.jsonl", "a.png"):
        (tmp_path / name).write_text('{"text": "mine"}')
    refused(lambda: read(source), "got an empty one")


@pytest.mark.parametrize("name", ["fifo", "fifo.jsonl", "fifo.parquet", "fifo.txt", "fifo.wav", "/dev/zero"])
@pytest.mark.parametrize("read", [texts, first_rows, read_pairs, read_sentences, read_audio, pictures])
def test_what_has_no_end_is_not_opened(read: Callable[[str], object], name: str, tmp_path: Path) -> None:
    if not name.startswith("/"):
        os.mkfifo(tmp_path / name)
    refused(lambda: read(str(tmp_path / name)), name)


@pytest.mark.parametrize("name", ["fifo.jsonl", "fifo.parquet", "fifo.txt", "fifo.wav", "fifo.png"])
def test_neither_is_what_lies_in_a_folder(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    for read in (texts, first_rows, read_pairs, read_sentences, read_audio, pictures):
        refused(lambda read=read: read(str(tmp_path)), tmp_path)


@pytest.mark.parametrize("named", ["/dev/zero", "fifo", "nowhere", "a\0b", "."])
@pytest.mark.parametrize(("read", "column"), [(pictures, "image"), (read_audio, "audio")])
def test_neither_is_what_a_row_names(read: Callable[[object], object], column: str, named: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "rows.jsonl").write_text(json.dumps({column: named}))
    refused(lambda: read(str(tmp_path / "rows.jsonl")), "rows.jsonl")


@pytest.mark.parametrize("name", ["", "../../x", "/x/y/z", "a//b", "a b"])
def test_no_dataset_has_such_a_name(name: str) -> None:
    refused(lambda: open_stream(name, None, "train"), f"hub:{name}: expected a dataset")


def test_texts_without_tokens_are_refused() -> None:
    """A row of padding alone would be a row of NaN in some models, and divide by zero in others."""

    class NoTokens:
        pad_token_id = 0

        def __call__(self, texts: list[str] | None = None, text_target: list[str] | None = None, **how: object) -> dict:
            ids = [[1] * len(text.strip("~")) for text in texts or text_target or []]
            return {"input_ids": ids, "attention_mask": ids}

    for texts_ in (["a", "~", "b"], ["~"]):
        refused(lambda texts_=texts_: encode_sentences(texts_, NoTokens(), 8), "at least one token")
    for pairs in ([("a", "~")], [("~", "a")]):
        refused(lambda pairs=pairs: encode_pairs(pairs, NoTokens(), 8), "at least one token")
    assert padded([[1], [1, 2]], 0).tolist() == [[1, 0], [1, 2]]
