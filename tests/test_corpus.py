"""Text sources give their documents, all of them, in order or by seed; windows are what the tokenizer makes of them."""

import copy
import json
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import stock_model, tiny_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from headfold.core.errors import UserError
from headfold.corpus import open_corpus, stdlib, text
from headfold.corpus.self import sample_windows
from headfold.corpus.windows import draw_windows, fingerprint, token_stream, token_windows

DOCUMENTS = [f"document {number} says {number * number}\n" for number in range(50)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, `<s>` before each document."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({piece: index for index, piece in enumerate(["<s>", *alphabet])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>")


def write_text(folder: Path) -> str:
    for number, document in enumerate(DOCUMENTS):
        (folder / f"{number:03}.txt").write_text(document)
    return str(folder)


def write_jsonl(folder: Path, column: str = "text") -> str:
    path = folder / "lines.jsonl"
    lines = [json.dumps({"id": 1, column: document}) for document in DOCUMENTS]
    path.write_bytes("\r\n  \n".join(lines).encode())  # line ends of two kinds, blank lines, none at the end
    return str(path)


def write_parquet(folder: Path, column: str = "text") -> str:
    pyarrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = folder / "rows.parquet"
    parquet.write_table(pyarrow.table({"id": list(range(50)), column: DOCUMENTS}), path, row_group_size=7)
    return str(path)


def write_hub(folder: Path) -> str:
    """A local folder is a dataset to the hub client too, so no network is needed."""
    pytest.importorskip("datasets", reason="the data extra is not installed")
    write_jsonl(folder)
    return f"hub:{folder}"


SOURCES = [write_text, write_jsonl, write_parquet, write_hub]


@pytest.mark.parametrize("write", SOURCES)
def test_every_source_gives_all_its_documents_in_order(write, tmp_path):
    assert list(open_corpus(write(tmp_path)).documents) == DOCUMENTS


@pytest.mark.parametrize("write", SOURCES)
def test_a_seed_permutes_the_documents_and_repeats(write, tmp_path):
    source = write(tmp_path)
    first, again, other = (list(open_corpus(source, seed=seed).documents) for seed in (1, 1, 2))
    assert first == again
    assert sorted(first) == sorted(other) == sorted(DOCUMENTS)
    assert first != other and first != DOCUMENTS


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_another_column_is_named_after_a_colon(write, tmp_path):
    source = write(tmp_path, "body")
    assert list(open_corpus(f"{source}:body").documents) == DOCUMENTS
    with pytest.raises(UserError, match=r"'text'.*body"):
        list(open_corpus(source).documents)


def test_standard_library_leaves_out_the_held_out_files():
    root = Path(sysconfig.get_paths()["stdlib"])
    held_out = stdlib.heldout_files()
    paths = {path.relative_to(root).as_posix() for path in stdlib.stdlib_files()}
    assert len(paths) > 100 and held_out and not paths & held_out
    assert any((root / name).exists() for name in held_out)  # else the line above could not fail
    assert next(iter(open_corpus("stdlib", seed=1).documents)) != next(iter(open_corpus("stdlib", seed=2).documents))


@given(st.text(alphabet="ab\n\f", max_size=200), st.integers(1, 40))
def test_cutting_a_long_text_loses_nothing(content, size):
    parts = text.pieces(content, size)
    assert "".join(parts) == content
    assert all(0 < len(part) <= size for part in parts)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("stdlb", "did you mean stdlib"),
        ("no/such/file.txt", "no such file"),
        ("missing.jsonl:body", "no such file"),
        ("hub:/no/such/dataset", "hub:/no/such/dataset: .*CONFIG"),
    ],
)
def test_an_unknown_source_is_refused_in_one_line(source, message):
    with pytest.raises(UserError, match=message) as refusal:
        list(open_corpus(source).documents)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b"{broken\n"), ("b.jsonl", b"[1]\n"), ("c.parquet", b"PAR"), ("d.txt", b"\xff\xfe\xff")],
)
def test_a_broken_file_is_refused_in_one_line(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as refusal:
        list(open_corpus(str(tmp_path / name)).documents)
    assert "\n" not in str(refusal.value)


def test_stream_is_what_the_tokenizer_makes_of_each_document(tokenizer):
    expected = [token for document in DOCUMENTS for token in tokenizer(document)["input_ids"]]
    stream = token_stream(DOCUMENTS, tokenizer)
    assert stream.tolist() == expected and expected[0] == 0
    assert token_stream(iter(DOCUMENTS), tokenizer, 100).tolist() == expected[:100]


LONG = ["".join(f"{number}.{line} " for line in range(400)) for number in range(30)]
"""Documents of many windows each, every piece of 12 characters found once."""


def test_windows_are_cuts_of_documents_drawn_by_seed(tokenizer):
    first, again, other = (token_windows(iter(LONG), tokenizer, 320, 16, seed) for seed in (0, 0, 1))
    assert first.shape == other.shape == (20, 16)
    assert torch.equal(first, again) and not torch.equal(first, other)
    texts = [tokenizer.decode(row) for row in first]
    homes = [
        next(number for number, document in enumerate(LONG) if text.removeprefix("<s>") in document) for text in texts
    ]
    assert len(set(texts)) == 20
    assert len(set(homes)) >= 10  # not one document's head only


def test_no_beginning_is_written_where_a_text_goes_on():
    """With a tokenizer of six characters a token every excerpt is one window, so a `<s>` too many would show in half of them."""

    def six(text: str, add_special_tokens: bool = True, verbose: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [1] * (len(text) // 6)}

    windows = token_windows(iter(["x" * 96 * 100] * 10), six, 16 * 200, 16, 0)
    assert len(windows) == 200
    assert (windows == 0).any(1).sum() <= 10  # one for each document at most


def test_short_documents_are_packed_with_their_beginnings(tokenizer):
    windows = token_windows(iter(DOCUMENTS * 40), tokenizer, 640, 64, 0)
    assert windows.shape == (10, 64)
    assert ((windows == 0).sum(1) >= 2).all()
    whole = tokenizer.decode(windows.flatten()).split("<s>")[1:-1]
    assert set(whole) <= set(DOCUMENTS) and len(set(whole)) > 10


def test_short_text_gives_fewer_windows_and_too_short_is_refused(tokenizer):
    stream = token_stream(DOCUMENTS[:3], tokenizer)
    windows = token_windows(iter(DOCUMENTS[:3]), tokenizer, 10_000, 16, 0)
    assert torch.equal(windows.flatten(), stream[: len(stream) // 16 * 16])  # all there is, in order
    with pytest.raises(UserError, match="gives 0 tokens; need at least one window of 16"):
        token_windows(iter([]), tokenizer, 100, 16, 0)


def test_fingerprint_tells_tokens_and_shape():
    windows = torch.arange(24).view(4, 6)
    print_of = lambda w, name="input_ids": fingerprint({name: w})  # noqa: E731
    assert print_of(windows) == print_of(windows.clone().to(torch.int32)) and len(print_of(windows)) == 64
    assert len({print_of(w) for w in (windows, windows.view(6, 4), windows + 1)} | {print_of(windows, "labels")}) == 4


@pytest.fixture(scope="module")
def writer() -> PreTrainedModel:
    return stock_model(tiny_checkpoint("llama", vocab_size=257))


def test_sampling_repeats_by_seed_and_leaves_the_global_state_alone(writer):
    state = torch.get_rng_state()
    first, again, other = (sample_windows(writer, 5, 12, seed=seed, batch_size=2, bos=3) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (5, 12) and (first[:, 0] == 3).all()


def test_sampling_follows_the_model(writer):
    """At a temperature near zero the samples are the model's greedy continuation, recomputed here without a cache."""
    windows = sample_windows(writer, 3, 10, temperature=1e-6)
    assert len(set(windows[:, 0].tolist())) > 1  # random first tokens where there is no bos
    assert torch.equal(writer(input_ids=windows).logits[:, :-1].argmax(-1), windows[:, 1:])


def test_a_model_whose_logits_are_not_finite_writes_nothing(writer):
    broken = copy.deepcopy(writer)
    broken.lm_head.weight.data[5] = torch.inf
    with pytest.raises(UserError, match="finite logits"):
        sample_windows(broken, 3, 10)


def test_after_an_end_of_text_comes_the_next_beginning(writer):
    free = sample_windows(writer, 4, 30, bos=3)
    eos = int(free[0, 5])
    windows = sample_windows(writer, 4, 30, bos=3, eos=eos)
    ends = (windows[:, :-1] == eos).nonzero()
    assert len(ends) and all(windows[row, at + 1] == 3 for row, at in ends.tolist())


def test_self_is_a_source_like_any_other(writer, tokenizer):
    windows = draw_windows("self", tokenizer=tokenizer, model=writer, num_tokens=64, context=16, seed=0)
    assert windows.shape == (4, 16) and (windows[:, 0] == 0).all()
