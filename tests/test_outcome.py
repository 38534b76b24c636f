"""The top of the page says in words what came of it, a folder of `headfold run` is taken as it is, and every kind of writer has samples."""

# ruff: noqa: F811 - fixtures are arguments

import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from results import CLASSES, EVALUATION
from test_cli import copy, model, run  # noqa: F401 - fixtures
from test_pages import POINTS, ROW, fold, page  # noqa: F401 - fixtures
from test_recipes import several
from test_wrong_words import whisper  # noqa: F401 - a fixture
from tiny import tiny_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import headfold
from headfold.core.errors import UserError
from headfold.pages import outcome, texts
from headfold.pages.contents import Contents, Front, MethodTable, OutputSample
from headfold.pages.folds import open_fold, open_original
from headfold.pages.results import read_result
from headfold.pages.samples import SamplesRequest
from headfold.recipes.steps import finished_folds
from headfold.reports.tables import percent, size

pytest.importorskip("vl_convert", reason="charts need vl-convert-python: pip install 'headfold[report]'")


def said(contents: Contents) -> str:
    section = outcome.section(contents)
    return "" if section is None else html.unescape(re.sub(r"<[^>]+>", "", "".join(section.parts)))


def test_the_outcome_of_a_fold_is_told_from_its_files(model: Path, fold: Path, tmp_path: Path) -> None:
    opened = open_fold(fold, "tiny-half")
    original = open_original(str(model), [opened])
    before, after = (cost.kv_bytes_per_token for cost in original.costs["tiny-half"])
    alone, beside = said(Contents([opened])), said(Contents([opened], original))
    assert f"{model.name} with 2 instead of 8 key/value heads at its 2 attention blocks, merged by absorb." in alone
    assert (
        f"Its cache takes {size(after)} per token instead of {size(before)}" in alone
        and percent(after / before) in beside
    )
    assert alone.endswith("Its loss was not measured.")
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES.to_json()))
    results = [EVALUATION, read_result(tmp_path / "classes.json")]
    measured = said(Contents([opened], results=results))
    assert (
        "On 63 tokens of text.txt, its loss is 2.500 nats per token, the original's 2.250 nats per token. The KL to the original is 0.125"
        in measured
    )
    assert "accuracy" not in measured and "not measured" not in measured  # the classes are of another model
    adapted = replace(EVALUATION, model=f"{EVALUATION.model} + mine")
    assert "With the adapter mine, on 63 tokens of text.txt, its loss is 2.500" in said(
        Contents([opened], results=[adapted])
    )
    of_classes = said(Contents([replace(opened, name="a")], results=results))
    assert "On 10 images of folder, its accuracy is 50.0 %, the original's 75.0 %." in of_classes


def test_the_outcome_of_comparisons_is_told(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, method="absorb", loss_increase=0.125), replace(ROW, num_kv_heads=4, loss_increase=0.0625)]
    told = said(Contents(tables=[MethodTable("rows", rows)], fronts=[Front("front", "front", POINTS, None, None, {})]))
    assert "Of the 2 methods in rows, at 4 K/V heads mean loses least (+0.062 nats per token), at 2" in told
    assert "at 2 K/V heads absorb loses least (+0.125 nats per token)." in told
    assert "from 2 KiB per token, with a predicted loss increase of 0.02, to 4 KiB, with 0.01." in told
    assert said(Contents()) == ""


def test_words_of_a_fold_that_differ_are_marked(fold: Path) -> None:
    text, num_other, num_missing = texts._differences(
        ["the", "cat", "<sat>", "on", "it"], ["the", "dog", "<sat>", "it", "now"]
    )
    expected = "the <del>cat</del> <mark>dog</mark> &lt;sat&gt; <del>on</del> it <mark>now</mark>"
    assert text == expected and (num_other, num_missing) == (2, 2)
    shown = texts.section(Contents([open_fold(fold, "f")], samples=[OutputSample("given", "", "a b", {"f": "a b"})]))
    assert shown is not None and "writes the same" in "".join(shown.parts) and "in the data" not in "".join(shown.parts)


def test_models_of_speech_have_samples(page, whisper: tuple[str, str, str]) -> None:
    original, folded, sounds = whisper
    found = page(folded, "--original", original, "--text", sounds)
    assert (
        "recording 1 of sounds, 0.4 s" in found.text and "recording 3" in found.text and "recording 4" not in found.text
    )
    assert found.text.count("in the data") == 3 and "a b c b" in found.text
    assert found.text.count("words differ;") + found.text.count("writes the same") == 3
    assert "give --text with recordings" in page(folded, "--original", original).text


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny T5 with words, and a fold of it."""
    folder = tmp_path_factory.mktemp("translator")
    original, folded = shutil.copytree(tiny_checkpoint("t5"), folder / "t5"), folder / "t5-half"
    headfold.fold(original, folded, kv_heads="1/2", group="contiguous", merge="mean", refit=False, verify=False)
    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *map(str, range(40))])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(original)
    return original, folded


def test_encoder_decoders_have_samples(page, translator: tuple[Path, Path], tmp_path: Path) -> None:
    original, folded = translator
    (tmp_path / "p.jsonl").write_text(
        "\n".join(json.dumps({"source": f"31 32 3{n}", "target": f"27 2{n}"}) for n in range(5))
    )
    found = page(folded, "--original", original, "--text", tmp_path / "p.jsonl", "--new-tokens", 8)
    assert [text in found.text for text in ("31 32 30", "27 22", "31 32 33")] == [True, True, False]
    given = page(folded, "--original", original, "--prompt", "33 34 35", "--new-tokens", 8)
    assert "33 34 35" in given.text and "in the data" not in given.text and "Sample 2" not in given.text


def test_a_folder_of_run_is_reported_as_it_is(page, run, tmp_path: Path) -> None:
    recipe = several(tmp_path, eval={"text": str(tmp_path / "held-out.txt"), "limit": 64})
    (tmp_path / "held-out.txt").write_text("abcde" * 100)
    headfold.run(recipe, tmp_path / "out")
    found = page(tmp_path / "out")
    assert "half is" in found.text and "mean is" in found.text and found.text.count("its loss is") == 2
    assert [path.name for path in finished_folds(tmp_path / "out")] == ["half", "mean"]
    for facts, why in (({"begun": [], "done": {}}, "finished folds"), ({"begun": [1], "done": {}}, "begun")):
        (tmp_path / "out" / "run.json").write_text(json.dumps(facts))
        ran = run("report", tmp_path / "out", "--out", tmp_path / "p.html")
        assert ran.code == 2 and why in ran.err and len(ran.err.splitlines()) == 1, ran.err
    outside = json.dumps({"begun": [], "done": {"..": _fold_facts()}})
    (tmp_path / "out" / "run.json").write_text(outside)
    with pytest.raises(UserError, match="directory beside it for each fold"):
        finished_folds(tmp_path / "out")


def _fold_facts() -> dict[str, object]:
    numbers = ("num_kv_heads_least", "num_kv_heads_after", "kv_bytes_before", "kv_bytes_after")
    return {**dict.fromkeys(numbers, 1), "seconds": 1.0, "notes": []}


@pytest.mark.parametrize(
    ("request_", "kind", "why"),
    [
        (SamplesRequest(text="t"), None, "--original DIR"),
        (SamplesRequest(columns=("a", "b")), "pairs", "expected --text SOURCE"),
        (SamplesRequest(text="t"), "text", "give --prompt"),
        (SamplesRequest(text="t"), "images", "leave it out"),
        (SamplesRequest(prompts=("p",)), "audio", "give recordings by --text"),
        (SamplesRequest(prompts=("p",), text="t"), "pairs", "exclude each other"),
    ],
)
def test_options_of_samples_that_nothing_reads_are_refused(
    fold: Path, request_: SamplesRequest, kind: str | None, why: str
) -> None:
    folds = [replace(open_fold(fold, "f"), kind=kind or "pairs")]
    with pytest.raises(UserError, match=why):
        request_.check(kind is not None, folds)
