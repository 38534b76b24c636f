"""The page of `headfold report`: it shows what the files say, whatever stands in them is text, and what it cannot read is one line."""

# ruff: noqa: F811 - fixtures are arguments

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from results import PAIRED
from test_budget import stats  # noqa: F401 - fixture
from test_cli import copy, model, run  # noqa: F401 - fixtures
from test_docs import parses
from tiny import tiny_checkpoint
from wrapped_models import wrapped_checkpoint

import headfold
from headfold.budget.frontier import Point
from headfold.checkpoint.staging import write_json
from headfold.comparison import MethodRow, write_rows
from headfold.core.errors import UserError
from headfold.core.groups import Groups
from headfold.core.plan import Plan
from headfold.evaluate.perplexity import open_language_model
from headfold.hf_models import open_tokenizer
from headfold.pages import contents, costs, grouping, summary, writing
from headfold.pages.cards import card_of
from headfold.pages.continuations import PROMPTS, _greedy
from headfold.pages.elements import as_script
from headfold.pages.folds import open_fold, open_original
from headfold.pages.page import require_charts
from headfold.verbs.frontier import Frontier

pytest.importorskip("vl_convert", reason="charts need vl-convert-python: pip install 'headfold[report]'")
HOSTILE = "<img src=x onerror=alert(1)> & \"</script><script>alert(2)</script>'"


class Read(HTMLParser):
    """What a page holds: elements by name with their attributes, text, and the content of scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self.absent = "", [], []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self._open]
        if "script" in tags:
            self.scripts.append(data)
        elif "style" not in tags:
            self.text += data
        if tags[-1:] == ["code"] and any(attrs.get("class") == "absent" for _, attrs in self._open):
            self.absent.append(data)

    @property
    def charts(self) -> dict[str, dict]:
        return json.loads(self.scripts[0]) if self.scripts else {}


@pytest.fixture(scope="module")
def fold(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pages") / "tiny-half"
    text = str(model.parent / "text.txt")
    headfold.fold(model, out, kv_heads=2, calibration=text, tokens=512, context=32)
    return out


@pytest.fixture
def page(run, tmp_path: Path):
    """`headfold report WORDS`, read."""

    def write(*words: object) -> Read:
        out = tmp_path / "page.html"
        ran = run("report", *words, "--out", out, "--force")
        assert ran.code == 0, ran.err
        return Read(out)

    return write


def test_the_page_of_a_fold_says_what_its_files_say(page, fold: Path) -> None:
    found = page(fold)
    plan = Plan.load(fold / "plan.json")
    card = card_of(fold)
    assert card.table and all(cell in found.text for row in card.table for cell in row)
    assert card.command in found.text and card.summary in found.text
    shares = [row["share"] for row in found.charts["errors"]["data"]["values"]]
    sites = plan.sites.values()
    assert shares == [share for s in sites for share in (s.error.key / s.energy.key, s.error.value / s.energy.value)]
    assert f"vllm serve {fold}" in found.text and "no samples" not in found.text
    assert "with --original DIR the original and each fold write for the same inputs" in found.text


def test_what_was_not_measured_is_said_with_a_command_that_exists(page, fold: Path) -> None:
    found = page(fold)
    verbs = Counter(command.split()[1] for command in found.absent)
    assert verbs.keys() == {"bench", "eval", "frontier"}
    assert all(parses(command.partition(" > ")[0]) for command in found.absent), found.absent


def test_a_fold_without_its_card_is_counted_with_the_original(model: Path, fold: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(fold, bare)
    (bare / "README.md").unlink()
    opened = open_fold(bare, "bare")
    alone = contents.Contents(folds=[opened])
    assert "not recorded: the card is gone" in "".join(summary.section(alone).parts)
    assert "not recorded: give --original DIR" in "".join(costs.section(alone).parts)
    original = open_original(str(model), [opened])
    before, after = original.costs["bare"]
    assert after.kv_bytes_per_token == opened.kv_bytes_per_token < before.kv_bytes_per_token
    shown = "".join(costs.section(contents.Contents(folds=[opened], original=original)).parts)
    assert all(row[1] in shown and row[2] in shown for row in card_of(fold).table)
    assert f"headfold bench {model} {bare} --json" in shown


def test_the_picture_colours_each_query_head_by_its_kv_head(fold: Path) -> None:
    row = grouping._shared(Groups((0, 1, 0, 1)), 2)
    assert row == (0, 0, 1, 1, 0, 0, 1, 1) and grouping._members(row) == [(0, [0, 1, 4, 5]), (1, [2, 3, 6, 7])]
    assert grouping._ranges([0, 1, 4, 5, 7]) == "0-1, 4-5, 7"
    opened = open_fold(fold, "f")
    section = grouping.section(contents.Contents(folds=[opened]))
    assert section is not None
    paths = re.findall(r'<path fill="([^"]+)" d="([^"]+)">', "".join(section.parts))
    drawn = Counter(colour for colour, cells in paths for _ in re.findall("M", cells))
    expected = Counter(
        grouping.colour_of(group)
        for site in opened.plan.sites.values()
        for group in site.groups.group_of_head
        for _ in range(opened.query_heads["layers.0.self"])
    )
    assert drawn == expected
    assert len({grouping.colour_of(group) for group in range(64)}) == 64


BASELINE = dict(merge="mean", group="contiguous", refit=False, verify=False)


@pytest.mark.parametrize("how", ["nested", "fields left out", "flat", "unequal groups"])
def test_the_picture_of_a_wrapper_has_the_query_heads_of_its_language_model(how: str, tmp_path: Path) -> None:
    """Two for each of four K/V heads, wherever the config says so."""
    kind = {"nested": "llava", "fields left out": "gemma3", "flat": "qwen2_vl", "unequal groups": "llava"}[how]
    source = Path(shutil.copytree(wrapped_checkpoint(kind, num_key_value_heads=4), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    if how == "fields left out":
        del config["text_config"]["num_attention_heads"]
    if how == "flat":
        config = {**config.pop("text_config"), **config}
    write_json(source / "config.json", config)
    uneven = {"kv_heads": 3, "group": "kmeans:cost=wse"} if how == "unequal groups" else {"kv_heads": 2}
    headfold.fold(source, tmp_path / "out", **{**BASELINE, **uneven})
    opened = open_fold(tmp_path / "out", "out")
    assert opened.query_heads == {"layers.0.self": 2, "layers.1.self": 2}
    per_head = 2 * 2 * opened.plan.sites["layers.0.self"].head_dim * 8
    assert opened.kv_bytes_per_token == uneven["kv_heads"] * per_head


def test_the_original_of_a_wrapper_continues_texts_and_has_its_costs(page, model: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(wrapped_checkpoint("llava", torch.float32), source)
    open_tokenizer(model).save_pretrained(source)
    headfold.fold(source, out, kv_heads=2, **BASELINE)
    found = page(out, "--original", source, "--prompt", "the quick", "--new-tokens", 2)
    assert "Sample 1" in found.text and f"headfold bench {source} {out} --json > bench.json" in found.absent
    before, after = open_original(str(source), [open_fold(out, "out")]).costs["out"]
    assert before.kv_bytes_per_token == 4 * after.kv_bytes_per_token == 2 * 2 * 8 * 8 * 4


@pytest.mark.parametrize("encoder", [False, True])
def test_the_original_of_an_encoder_decoder_is_counted_as_it_was_folded(encoder: bool, tmp_path: Path) -> None:
    source = tiny_checkpoint("t5")
    result = headfold.fold(source, tmp_path / "out", kv_heads=2, encoder=encoder, **BASELINE)
    assert open_original(str(source), [open_fold(tmp_path / "out", "out")]).costs == {
        "out": (result.before, result.after)
    }


def test_numbers_that_json_lacks_are_null_in_a_script() -> None:
    lost = {"points": [float("nan"), {"loss": (float("-inf"), 0.5)}], "name": "</script>"}
    text = as_script(lost)
    assert json.loads(text) == {"points": [None, {"loss": [None, 0.5]}], "name": "</script>"} and "<" not in text


def test_samples_are_what_the_models_write(page, model: Path, fold: Path, tmp_path: Path) -> None:
    """The original is continued as stock transformers does it; a fold that keeps all heads never parts from it."""
    tokenizer, opened = open_tokenizer(model), open_language_model(model, torch.float32, "cpu")
    prompt = tokenizer("the quick")["input_ids"]
    stock = opened.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)[0, len(prompt) :].tolist()
    assert _greedy(opened, prompt, 8) == stock
    same = tmp_path / "same"
    headfold.fold(model, same, kv_heads="100%", merge="mean", group="contiguous", refit=False, verify=False)
    words = ("--original", model, "--prompt", "the quick", "--new-tokens", 8)
    found = page(same, fold, *words)
    assert re.search(
        r"writes the same; after the original's own words it chooses the same token (\d) of \1 times", found.text
    )
    assert "Sample 1" in found.text and "Sample 2" not in found.text
    parts = re.findall(r"parts at token (\d+); .* the same token \d+ of \d+ times", found.text)
    marks = [tag for tag, _ in found.elements if tag == "mark"]
    assert len(parts) == len(marks) <= 1


def test_whatever_stands_in_a_file_is_text(page, model: Path, fold: Path, tmp_path: Path) -> None:
    directory = tmp_path / "<b>fold & 'co'"
    shutil.copytree(fold, directory)
    plan = json.loads((directory / "plan.json").read_text())
    plan["group"] = HOSTILE
    write_json(directory / "plan.json", plan)
    card = (directory / "README.md").read_text()
    (directory / "README.md").write_text(
        card.replace("- Verified:", f"- {HOSTILE}\n- Verified:") + f"\n## {HOSTILE}\n\n{HOSTILE}\n"
    )
    write_json(tmp_path / "paired.json", [{**row, "model": HOSTILE, "source": HOSTILE} for row in PAIRED])
    rows = tmp_path / "rows"
    rows.mkdir()
    write_rows(rows, {}, [replace(ROW, method=HOSTILE)])
    found = page(
        directory, rows, tmp_path / "paired.json", "--original", model, "--prompt", "<script>a", "--new-tokens", 2
    )
    names = Counter(tag for tag, _ in found.elements)
    assert (names["script"], names["img"], names["b"], names["iframe"]) == (2, 0, 0, 0)
    assert not any(name.startswith("on") for _, attrs in found.elements for name in attrs)
    assert found.text.count(HOSTILE) >= 6 and "<script>a" in found.text
    assert found.charts["methods-0"]["data"]["values"][0]["method"] == HOSTILE


def test_nothing_on_the_page_can_be_fetched(page, fold: Path) -> None:
    """The policy allows the page's own script and style, by digest, and nothing else; no element names an address."""
    found = page(fold)
    policy = next(
        attrs["content"] for _, attrs in found.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert parts["default-src"] == "'none'" and "unsafe" not in policy
    assert all(re.fullmatch(r"'sha256-[\w+/]+={0,2}'", parts[name]) for name in ("script-src", "style-src"))
    addresses = [attrs[name] for _, attrs in found.elements for name in ("src", "href") if name in attrs]
    assert addresses and all(address.startswith("#") for address in addresses)


ROW = MethodRow("mean", 2, 4096, "nll", 2.5, 2.25, 0.25, 0.2, 1.5, 10_000_000, 65_536, 1_000_000)
POINTS = [
    Point("plan-4096.json", 4096, {"layers.0.self": 4, "layers.1.self": 2}, 0.01, 0.0125, False),
    Point("plan-2048-uniform.json", 2048, {"layers.0.self": 2, "layers.1.self": 2}, 0.02, None, True, 2, 512),
]


def comparison(directory: Path, rows: list[MethodRow]) -> Path:
    directory.mkdir()
    write_rows(directory, {}, rows)
    return directory


def frontier(directory: Path, points: list[Point]) -> Path:
    directory.mkdir()
    facts = Frontier(points, float("nan"), 0.5, str(directory)).to_json()
    write_json(directory / "frontier.json", facts)
    measured = {"layers.0.self": {"2": 0.125, "4": 0.0}}
    write_json(directory / "sensitivity.json", {"format": "headfold-sensitivity-3", "loss_increase": measured})
    return directory


def test_the_page_of_a_comparison_and_of_a_frontier(page, tmp_path: Path) -> None:
    rows = [
        ROW,
        replace(ROW, method="absorb", loss_increase=-0.125, kl=None),
        replace(ROW, method="broken", value=float("nan")),
    ]
    found = page(comparison(tmp_path / "rows", rows), frontier(tmp_path / "front", POINTS))
    assert "+0.2500" in found.text and "absorb (best)" in found.text and "2,2 × 2" in found.text
    assert "sites and their measured losses: 0.50" in found.text and "of the points" not in found.text
    assert "not shown: broken" in found.text and "not shown: absorb" not in found.text
    methods = {row["method"]: row for row in found.charts["methods-0"]["data"]["values"]}
    assert methods["absorb"]["loss"] == -0.125 and methods["absorb"]["drawn"] == 0.125  # a logarithm has no zero
    points = [(row["bytes"], row["what"], row["loss"]) for row in found.charts["front-0"]["data"]["values"]]
    assert points == [(4096, "predicted", 0.01), (2048, "predicted", 0.02), (4096, "measured", 0.0125)]
    assert [row["loss"] for row in found.charts["sensitivity-0"]["data"]["values"]] == [0.125, 0.0]
    assert "Samples of text" not in found.text and not found.absent


def test_folders_have_pages_of_their_own_that_replace_no_file_of_a_user(tmp_path: Path) -> None:
    directory = comparison(tmp_path / "rows", [ROW])
    assert writing.methods_page(directory) == f"wrote {directory / writing.NAME}"
    assert writing.methods_page(directory) == f"wrote {directory / writing.NAME}"
    (directory / writing.NAME).write_text("<html>mine</html>")
    assert writing.methods_page(directory).startswith("no page: ")
    assert (directory / writing.NAME).read_text() == "<html>mine</html>"


def test_without_the_extra_a_line_says_how_to_install_it(run, fold: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    ran = run("report", fold, "--out", tmp_path / "p.html")
    assert ran.code == 2 and "pip install 'headfold[report]'" in ran.err and len(ran.err.splitlines()) == 1
    assert not (tmp_path / "p.html").exists()
    with pytest.raises(UserError):
        require_charts()


def test_bad_input_is_one_line(run, model: Path, fold: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text('{"rows": [')
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "mine.html").write_text("mine")
    shutil.copytree(fold, tmp_path / "again" / fold.name)
    rows = comparison(tmp_path / "rows", [ROW])
    write_json(rows / "compare.json", {"rows": [{"method": 1}]})
    lost = comparison(tmp_path / "lost", [replace(ROW, num_kv_heads=0)])
    front = frontier(tmp_path / "front", POINTS)
    write_json(
        front / "frontier.json", {"points": [{"plan": "p"}], "rank_correlation": None, "site_rank_correlation": None}
    )
    bad = frontier(tmp_path / "bad", POINTS)
    (bad / "sensitivity.json").write_text("[]")
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    write_json(other / "config.json", config | {"rms_norm_eps": 0.125})
    cases = [
        ((tmp_path / "empty",), "expected a fold"),
        ((tmp_path / "nothing",), "found nothing there"),
        ((tmp_path / "broken.json",), "not valid JSON"),
        ((tmp_path / "other.json",), "expected a result of headfold"),
        ((model / "model.safetensors",), "not valid JSON"),
        ((fold, tmp_path / "again" / fold.name), "directories of different names"),
        ((fold, fold), "directories of different names"),
        ((rows,), "method: expected a text"),
        ((lost,), "expected rows of positive counts"),
        ((front,), "expected a field kv_bytes_per_token, found none"),
        ((bad,), "sensitivity.json"),
        ((fold, "--prompt", "a"), "--original DIR"),
        ((rows, "--original", model), "compare.json"),
        ((bad.parent / "other.json", "--original", model), "expected a result"),
        ((fold, "--original", other), "fingerprints differ"),
        ((fold, "--original", model, "--prompt", ""), "at least one token"),
        ((fold, "--original", model, "--new-tokens", 100_000), "the context of the model"),
        ((fold, "--out", tmp_path / "mine.html"), "pass --force"),
    ]  # fmt: skip
    for words, said in cases:
        ran = run("report", *(() if "--out" in words else ("--out", tmp_path / "p.html")), *words)
        assert ran.code == 2 and said in ran.err, (words, ran.err)
        assert len([line for line in ran.err.splitlines() if line.startswith("headfold: ")]) == 1
    assert not (tmp_path / "p.html").exists() and (tmp_path / "mine.html").read_text() == "mine"


def test_the_page_can_be_asked_for_as_json(run, fold: Path, tmp_path: Path) -> None:
    found = json.loads(run("report", fold, "--out", tmp_path / "p.html", "--json").out)
    assert found["folds"] == ["tiny-half"] and found["num_bytes"] == (tmp_path / "p.html").stat().st_size
    assert len(PROMPTS) == 3 and found["samples"] == 0
