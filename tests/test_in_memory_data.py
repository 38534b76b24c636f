"""Data that a Python program hands over: what becomes of texts, rows and batches, how far they are read, and what is refused."""

import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import one_line
from test_samples import CONTEXT, model, text_pair, write_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from headfold.core.errors import UserError
from headfold.corpus.rows import Table
from headfold.corpus.samples import draw_sample
from headfold.corpus.windows import fingerprint
from headfold.in_memory.given import read_given
from headfold.in_memory.loaded import Need

__all__ = ["model"]
VOCABULARY = 50
IGNORED = -100


def need(kind: str = "text", limit: int | None = None, context: int = 16, **config: Any) -> Need:
    return Need(kind, {"vocab_size": VOCABULARY, **config}, context, limit)


def padded_rows(lengths: list[int], *, left: bool = False, width: int = 0) -> dict[str, Tensor]:
    """Texts 1, 2, 3 … of these lengths, padded by 49."""
    width = width or max(lengths)
    rows = [list(range(1, length + 1)) for length in lengths]
    pads = [[49] * (width - length) for length in lengths]
    ids = [pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)]
    mask = [
        [0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad)
        for row, pad in zip(rows, pads, strict=True)
    ]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_side_of_the_padding_does_not_matter() -> None:
    """Nor does what stands there, or how wide it is: texts keep their mask, and their content is the data's fingerprint."""
    left, right = ([padded_rows([3, 5], left=side), padded_rows([4, 2], left=side)] for side in (True, False))
    other = [
        {"input_ids": b["input_ids"] * b["attention_mask"], "attention_mask": b["attention_mask"].bool()} for b in left
    ]
    wide = [padded_rows([3, 5], width=9), padded_rows([4, 2], left=True, width=7)]
    samples = [read_given(each, need()) for each in (left, right, other, wide)]
    assert samples[0]["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5, [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert samples[0]["input_ids"][3].tolist() == [1, 2, 0, 0, 0]
    assert len({fingerprint(sample) for sample in samples}) == 1
    assert fingerprint(read_given([padded_rows([3, 4])], need())) != fingerprint(samples[0])


def test_texts_of_one_length_are_packed_text() -> None:
    batch = padded_rows([6, 6], left=True, width=9)
    assert same(read_given([batch], need()), {"input_ids": torch.arange(1, 7).repeat(2, 1)})
    assert read_given([batch], need("sentences")).keys() == {"input_ids", "attention_mask"}
    assert same(read_given([{"input_ids": batch["input_ids"][:, 3:]}], need()), read_given([batch], need()))


def test_texts_are_cut_at_the_context() -> None:
    found = read_given([padded_rows([3, 9], left=True)], need(context=4))
    assert found["input_ids"].tolist() == [[1, 2, 3, 0], [1, 2, 3, 4]]


def endless(seen: list[int]) -> Iterator[dict[str, Tensor]]:
    for number in itertools.count():
        seen.append(number)
        yield padded_rows([5, 3])


@pytest.mark.parametrize(
    ("kind", "limit", "items", "read"), [("text", 20, 5, 3), ("text", 1, 1, 1), ("sentences", 5, 5, 3)]
)
def test_an_endless_loader_is_read_up_to_the_limit(kind: str, limit: int, items: int, read: int) -> None:
    seen: list[int] = []
    sample = read_given(endless(seen), need(kind, limit))
    assert (len(sample["input_ids"]), len(seen)) == (items, read)


def test_endless_texts_and_rows_are_read_up_to_the_limit() -> None:
    texts = ("x" * 10 for _ in itertools.count())
    assert read_given(texts, need("text", 100)).count == 60  # six characters for a token
    assert next(texts)
    assert read_given(({"text": "a", "label": 1} for _ in itertools.count()), need("sentences", 7)).count == 7


def test_without_a_limit_data_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for page in ("given", "loaded"):
        monkeypatch.setattr(f"headfold.in_memory.{page}.MOST", 50)
    for data in (endless([]), ("x" * 100 for _ in itertools.count())):
        with pytest.raises(UserError) as error:
            read_given(data, need())
        one_line(error, "expected at most 50", "name how many")


class Rows(Dataset):
    """Tokenized texts one by one, as a map-style dataset gives them."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < 6:
            raise IndexError(number)
        return {"input_ids": [number + 1] * (number + 1), "name": f"row {number}"}


def test_tokenized_rows_are_batches_of_one() -> None:
    """In their own order or one drawn by the seed; what else is in them is left out, and said."""
    notes: list[str] = []
    wanted = Need("text", {}, 16, None, notes.append)
    assert read_given(Rows(), wanted)["attention_mask"].sum(1).tolist() == [1, 2, 3, 4, 5, 6]
    assert notes == ["python:Rows: name of every batch left out"]
    drawn = [read_given(Rows(), wanted, seed=seed)["attention_mask"].sum(1).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and sorted(drawn[0]) == [1, 2, 3, 4, 5, 6]
    arrays = [{"input_ids": np.array([1, 2, 3])}, {"input_ids": torch.tensor([4, 5, 6])}]
    assert read_given(arrays, wanted)["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_data_loader_gives_what_its_batches_give() -> None:
    batches = [padded_rows([3, 5]), padded_rows([4, 2])]
    loader = DataLoader(batches, batch_size=None)
    assert same(read_given(loader, need(), seed=0), read_given(iter(batches), need(), seed=0))


def test_the_labels_of_decoder_inputs_are_the_inputs_after_them() -> None:
    read = torch.tensor([[2, 7, 8, 9], [2, 5, 0, 0]])
    batch = padded_rows([3, 2]) | {
        "decoder_input_ids": read,
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    found = read_given([batch], need("pairs"))
    assert torch.equal(found["decoder_input_ids"], read)
    assert found["labels"].tolist() == [[7, 8, 9, 9], [5, 0, IGNORED, IGNORED]]
    labelled = padded_rows([3]) | {"labels": torch.tensor([[4, 5]])}
    wider = padded_rows([2]) | {"labels": torch.tensor([[4, 5, 6]])}
    assert read_given([labelled, wider], need("pairs"))["labels"].tolist() == [[4, 5, IGNORED], [4, 5, 6]]


IMAGE, SOUND = torch.zeros(2, 3, 6, 6), torch.zeros(2, 5, 8)
VIT = {"model_type": "vit", "image_size": 6, "num_channels": 3}
WHISPER = {"num_mel_bins": 5, "max_source_positions": 4}


def test_images_and_sound_are_float32() -> None:
    images = read_given([{"pixel_values": IMAGE.half(), "labels": torch.tensor([0, 1])}], need("images", **VIT))
    assert images["pixel_values"].dtype == torch.float32 and images["labels"].tolist() == [0, 1]
    sound = {"input_features": SOUND.double(), "labels": torch.ones(2, 3)}
    with pytest.raises(UserError, match="expected whole numbers"):
        read_given([sound], need("audio", **WHISPER))
    found = read_given([sound | {"labels": torch.ones(2, 3).long()}], need("audio", **WHISPER))
    assert found["input_features"].dtype == torch.float32 and found["labels"].shape == (2, 3)


def test_sound_as_it_is_has_a_mask_where_it_is_padded() -> None:
    """Speech always; an encoder of sound only where batches have different lengths, or masks of their own."""
    batches = [{"input_values": torch.ones(2, 40).double()}, {"input_values": torch.ones(1, 30)}]
    for kind, options in (("sound", {}), ("audio", {"model_type": "moonshine"})):
        labels = {} if kind == "sound" else {"labels": torch.ones(2, 3).long()}
        found = read_given(
            [batch | {key: t[: len(batch["input_values"])] for key, t in labels.items()} for batch in batches],
            need(kind, **options),
        )
        assert found["input_values"].shape == (3, 40) and found["input_values"].dtype == torch.float32
        assert found["attention_mask"].sum(1).tolist() == [40, 40, 30] and ("labels" in found) == (kind == "audio")
    assert read_given(batches[:1], need("sound")).keys() == {"input_values"}
    rows = [{"input_values": [0.5] * 20}, {"input_values": [0.5] * 20}]
    assert read_given(rows, need("sound"))["input_values"].shape == (2, 20)


LLAVA: dict[str, Any] = {"model_type": "llava", "vision_config": {}, "text_config": {"vocab_size": VOCABULARY}}
SEEN = padded_rows([3, 5], left=True) | {"pixel_values": torch.ones(2, 3, 6, 6).double()}


def test_a_wrapper_is_given_images_with_their_texts() -> None:
    """All of what its processor makes, up to the limit of items; texts alone are text."""
    wanted = replace(need("text", 100, **LLAVA), beside_text=3)
    types = (SEEN["input_ids"] == 3).long()
    batch = SEEN | {"mm_token_type_ids": types, "image_sizes": torch.full((2, 2), 6), "labels": SEEN["input_ids"]}
    found = read_given(itertools.repeat(batch), wanted)
    assert found["input_ids"].tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 4, 5], [1, 2, 3, 0, 0]]
    assert torch.equal(found["mm_token_type_ids"], (found["input_ids"] == 3).long())
    assert found["pixel_values"].shape == (3, 3, 6, 6) and found["pixel_values"].dtype == torch.float32
    assert found["image_sizes"].shape == (3, 2) and "labels" not in found
    tiles = read_given([SEEN | {"pixel_values": torch.ones(2, 4, 3, 6, 6)}], wanted)
    assert tiles["pixel_values"].shape == (2, 4, 3, 6, 6)
    assert read_given([GOOD], wanted).keys() == {"input_ids", "attention_mask"}
    with pytest.raises(UserError) as error:
        read_given([SEEN], replace(wanted, context=4))
    one_line(error, "at most 4 tokens in a text with images", "got 5")
    with pytest.raises(UserError) as joined:
        read_given([SEEN | {"pixel_values": torch.ones(8, 6)}], wanted)
    one_line(joined, "pixel_values: expected 2 items as in input_ids", "one image or recording with each text")


GOOD = padded_rows([3, 5])
REFUSED: dict[str, tuple[Any, Need, str]] = {
    "no batches": ([], need(), "got none; was the loader read before?"),
    "a spent iterator": (iter([]), need(), "got none"),
    "one dict": (GOOD, need(), "got a dict; give a list of batches, [batch]"),
    "a tensor": (GOOD["input_ids"], need(), "got Tensor"),
    "a number": (3, need(), "got int"),
    "other keys": ([GOOD, {"input_ids": GOOD["input_ids"]} | {"token_type_ids": GOOD["input_ids"]}], need("sentences"), "as in the first"),
    "tuples": (DataLoader(TensorDataset(GOOD["input_ids"])), need(), "expected a dict of tensors by name"),
    "no tokens": ([{"pixel_values": IMAGE}], need(), "expected input_ids, which the model reads, got pixel_values"),
    "beyond": ([GOOD, {"input_ids": torch.tensor([[1, 50]])}], need(), "batch 2: input_ids: expected tokens from 0 to 49"),
    "negative": ([{"input_ids": torch.tensor([[1, -1]])}], need(), "got -1 to 1"),
    "fractions": ([{"input_ids": torch.tensor([[1.0]])}], need(), "expected whole numbers"),
    "padding alone": ([GOOD | {"attention_mask": torch.zeros(2, 5)}], need(), "got padding alone in item 1"),
    "another mask": ([GOOD | {"attention_mask": torch.ones(2, 4)}], need(), "expected the shape of input_ids, (2, 5), got (2, 4)"),
    "fewer labels": ([GOOD | {"labels": torch.ones(1, 4).long()}], need("pairs"), "expected 2 items as in input_ids"),
    "ragged": ([{"input_ids": [[1, 2], [1]]}], need(), "pad its items to one length"),
    "no items": ([{"input_ids": torch.zeros(0, 4).long()}], need(), "got the shape (0, 4)"),
    "three axes": ([{"input_ids": torch.zeros(1, 2, 3).long()}], need(), "expected 2 axes"),
    "a mixture": (["a text", None], need("sentences"), "item 2: expected a text"),
    "no outputs": ([GOOD], need("pairs"), "expected labels or decoder_input_ids"),
    "labels alone padding": ([GOOD | {"labels": torch.full((2, 3), IGNORED)}], need("pairs"), "labels: expected tokens"),
    "other size": ([{"pixel_values": torch.zeros(2, 3, 8, 6)}], need("images", **VIT), "items of 3x6x6, which the model takes, got 3x8x6"),
    "other sizes": ([{"pixel_values": IMAGE}, {"pixel_values": torch.zeros(2, 3, 8, 8)}], need("images"), "as in the first batch"),
    "other bands": ([{"input_features": torch.zeros(1, 4, 8), "labels": [[1]]}], need("audio", **WHISPER), "expected items of 5x8"),
    "images where there is text": ([GOOD, SEEN], need(**LLAVA), "batch 2: expected text alone, got pixel_values"),
    "sound where there is text": ([GOOD | {"input_features": SOUND}], need(**LLAVA), "expected text alone, got input_features"),
    "features for samples": ([{"input_features": SOUND}], need("audio", model_type="moonshine"), "expected input_values, which"),
    "a mask of frames": ([{"input_values": torch.ones(1, 9), "attention_mask": torch.ones(1, 3)}], need("sound"), "of input_values"),
    "no sound": ([{"input_values": torch.ones(1, 9), "attention_mask": torch.zeros(1, 9)}], need("sound"), "padding alone in item 1"),
    "not finite": ([{"pixel_values": IMAGE / 0}], need("images", **VIT), "got NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_data_are_refused_in_one_line(name: str) -> None:
    data, wanted, words = REFUSED[name]
    with pytest.raises(UserError) as error:
        found = read_given(data, wanted)
        list(found.take(range(found.count), ["text"]))
    one_line(error, "python:", words)


def test_tables_with_other_ways_are_named(tmp_path: Path) -> None:
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    rows = datasets.Dataset.from_list([{"text": "a"}])
    for data, words in (
        (pandas.DataFrame({"text": ["a"]}), "to_dict"),
        (datasets.DatasetDict(train=rows), "its parts, train"),
    ):
        with pytest.raises(UserError) as error:
            read_given(data, need())
        one_line(error, words)


def drawn(kind: str, source: str | Table, path: Path, columns: tuple[str, ...] = ()) -> dict[str, Tensor]:
    return draw_sample(kind, source, path=path, num_items=20, context=CONTEXT, seed=3, columns=columns)


def test_rows_in_memory_give_what_their_file_gives(tmp_path: Path, model: Path) -> None:  # noqa: F811
    """Texts, pairs and tables draw the items that a file with them draws."""
    datasets = pytest.importorskip("datasets")
    pairs = [text_pair(number) for number in range(60)]
    rows = [{"source": source, "target": target, "text": source} for source, target in pairs]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    table = datasets.Dataset.from_list(rows)
    for kind, forms in {
        "pairs": (pairs, rows),
        "sentences": ([source for source, _ in pairs], rows, table["text"]),
    }.items():
        expected = drawn(kind, str(file), model)
        for form in (*forms, table):
            assert same(drawn(kind, read_given(form, need(kind)), model), expected)
    named = read_given(rows, need("sentences"), ("target",))
    assert same(drawn("sentences", named, model, ("target",)), drawn("sentences", str(file), model, ("target",)))
    with pytest.raises(UserError, match="expected columns question, found source, target, text"):
        drawn("sentences", named, model, ("question",))


def test_images_in_memory_give_what_their_file_gives(tmp_path: Path, model: Path) -> None:  # noqa: F811
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    file = Path(write_images(tmp_path, "parquet"))
    expected = drawn("images", str(file), model)
    table = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    assert same(drawn("images", read_given(table, need("images")), model), expected)
    decoded = [row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"] for row in table]
    images = [one if isinstance(one, Image.Image) else Image.open(io.BytesIO(one)) for one in decoded]
    assert torch.equal(
        drawn("images", read_given(images, need("images")), model)["pixel_values"], expected["pixel_values"]
    )
