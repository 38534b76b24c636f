"""The command line end to end on a tiny model, and what it says to those who ask for the impossible."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, tiny_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import headfold
from headfold import cli
from headfold.conversion.calibration_config import DEFAULT_SOURCE, DEFAULT_TOKENS
from headfold.exports.formats import engine_formats
from headfold.exports.layout import export_layouts

LETTERS = "\n etaoinshrdlcumwfgypbvkjxqz.,()=_:'0123456789\"[]-#+*/"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of single letters, and a text beside it."""
    path = tmp_path_factory.mktemp("cli") / "tiny-llama"
    shutil.copytree(tiny_checkpoint("llama", torch.float32), path)
    words = {letter: index for index, letter in enumerate(["<u>", "<s>", *LETTERS][:VOCABULARY])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<u>", bos_token="<s>").save_pretrained(path)
    (path.parent / "text.txt").write_text("the quick brown fox jumps over the lazy dog, and then again.\n" * 60)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`headfold WORDS` in this process: exit code, stdout, stderr."""

    def call(*words: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["headfold", *map(str, words)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as leaving:
            code = leaving.code
        captured = capsys.readouterr()
        return SimpleNamespace(code=code or 0, out=captured.out, err=captured.err)

    return call


@pytest.fixture(scope="module")
def copy(model: Path, tmp_path_factory: pytest.TempPathFactory):
    """A fresh copy of the model to spoil."""
    return lambda: Path(shutil.copytree(model, tmp_path_factory.mktemp("spoilt") / "model"))


def test_the_whole_path(run, model: Path, tmp_path: Path) -> None:
    """calibrate, inspect, plan, fold by that plan, eval: every verb's JSON and its words for people agree on the facts."""
    text, stats, out = model.parent / "text.txt", tmp_path / "stats.safetensors", tmp_path / "out"
    source = ("--calibration", text, "--tokens", 1024)
    made = json.loads(run("calibrate", model, stats, *source, "--json").out)
    assert made["tokens"] == 1024 and made["sites"] == 2
    seen = json.loads(run("inspect", model, "--stats", stats, "--json").out)
    assert seen["num_kv_heads"] == 8 and seen["kv_bytes_per_token"] == 2 * 2 * 8 * 8 * 4
    assert all(0 <= share <= 1 for site in seen["sites"] for share in (*site["key"].values(), *site["value"].values()))
    strips = run("inspect", model, "--stats", stats)
    assert strips.err.startswith("inspect: 2 sites") and all(
        f"{tensor} 1/{part}" in strips.out for tensor in "KV" for part in (2, 4, 8)
    )
    plan = run("plan", model, tmp_path / "plan.json", "--kv-heads", "1/4", "--stats", stats)
    assert plan.code == 0 and "layers.1.self" in plan.out and "plan: 2 sites" in plan.err
    folded = run("fold", model, out, "--plan", tmp_path / "plan.json", "--stats", stats, *source, "--json")
    result = json.loads(folded.out)
    assert (
        folded.err == ""
        and result["num_kv_heads_after"] == 2
        and result["refitted"]
        and result["verification"]["passed"]
    )
    assert result["plan"] == json.loads((tmp_path / "plan.json").read_text())
    assert headfold.load(out).config.num_key_value_heads == 2
    scores = json.loads(run("eval", out, "--reference", model, "--text", text, "--context", 32, "--json").out)
    assert scores["kv_bytes_per_token"] * 4 == scores["reference_kv_bytes_per_token"] and scores["kl"] > 0
    shown = run("eval", out, "--reference", model, "--text", text, "--context", 32)
    assert f"{scores['perplexity']:.3f}" in shown.out and f"{scores['kl']:.4f}" in shown.out


def test_folding_in_one_go_writes_a_card(run, model: Path, tmp_path: Path) -> None:
    ran = run(
        "fold", model, tmp_path / "out", "--kv-heads", 4, "--calibration", model.parent / "text.txt", "--tokens", 512
    )
    assert ran.code == 0 and "verified" in ran.out and "write:" in ran.err
    card = (tmp_path / "out" / "README.md").read_text()
    front = card.split("---")[1]
    assert "base_model: tiny-llama" in front and "headfold" in front and "library_name: transformers" in front
    assert "| K/V heads | 8 | 4 |" in card and str(tmp_path) not in card


def test_baselines_need_no_text(run, model: Path, tmp_path: Path) -> None:
    words = ("--merge", "mean", "--group", "contiguous", "--no-refit", "--no-verify")
    ran = run("fold", model, tmp_path / "out", "--kv-heads", "1/2", *words)
    assert ran.code == 0 and "not verified" in ran.out and "calibrate:" not in ran.err


def test_methods(run) -> None:
    assert "procrustes" in run("methods").out
    page = run("methods", "procrustes")
    assert "2412.20677" in page.out and "norm=false" in page.out
    pages = json.loads(run("methods", "random", "--json").out)["methods"]
    assert [page["option"] for page in pages] == ["--merge", "--group"]


def test_methods_list_the_layouts(run) -> None:
    """Each as its record and its file describe it."""
    listed = json.loads(run("methods", "--json").out)["methods"]
    pages = {page["name"]: page for page in listed if page["option"] == "--layout"}
    assert list(pages) == [*export_layouts(), *engine_formats()] and "--layout" in run("methods").out
    for name, layout in export_layouts().items():
        assert pages[name]["page"].startswith(pages[name]["summary"]) and len(pages[name]["summary"]) <= 140
        assert all(model_type in pages[name]["page"] for model_type in layout.model_types)
    assert "--layout decilm" in run("methods", "decilm").out and "q4_0" in run("methods", "gguf").out


def refused(ran: SimpleNamespace, *expected: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr after the progress lines, and no traceback."""
    lines = ran.err.splitlines()
    assert ran.code == 2 and ran.out == "", ran
    assert lines[-1].startswith("headfold: ") and sum(line.startswith("headfold: ") for line in lines) == 1
    assert "Traceback" not in ran.err
    assert all(word in lines[-1] for word in expected), lines[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), ("--kv-heads", "--plan")),
        (("--kv-heads", 2, "--plan", "p.json"), ("both",)),
        (("--plan", "p.json", "--merge", "mean"), ("--merge", "plan decides")),
        (("--plan", "p.json", "--group", "swap", "--merge", "mean"), ("--group and --merge",)),
        (("--plan", "nowhere.json"), ("nowhere.json",)),
        (("--kv-heads", 3), ("3", "1, 2, 4")),
        (("--kv-heads", 16), ("16", "8")),
        (("--kv-heads", "many"), ("many", "1/2")),
        (("--kv-heads", 4, "--merge", "absorbe"), ("absorbe", "absorb")),
        (("--kv-heads", 4, "--merge", "procrustes:nrm=true"), ("nrm=true", "norm")),
        (("--kv-heads", 4, "--group", "swap:cost=absrob"), ("absrob", "absorb")),
        (("--kv-heads", 4, "--stats", "nowhere.safetensors"), ("nowhere.safetensors",)),
        (("--kv-heads", 4, "--calibration", "nowhere.txt"), ("nowhere.txt",)),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_bad_requests(run, model: Path, tmp_path: Path, words, expected) -> None:
    """Refused before any work is done: nothing was read, sampled or written."""
    ran = run("fold", model, tmp_path / "out", *words)
    refused(ran, *expected)
    assert len(ran.err.splitlines()) == 1


def _config(**fields: object):
    def spoil(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **fields}))

    return spoil


def _truncate(path: Path) -> None:
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 100)


def _nan(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 3] = float("nan")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def _pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


SPOILT = {
    "unknown": (_config(model_type="lama"), "llama"),
    "wrapper": (_config(model_type="mllama", text_config={"model_type": "llama"}), "text model"),
    "quantised": (_config(quantization_config={"quant_method": "gptq"}), "quantization_config: bits"),
    "remote code": (_config(auto_map={"AutoModel": "x.Y"}, model_type="mine"), "auto_map"),
    "norm gains that are missing": (_config(model_type="olmo2"), "q_norm"),
    "norm with a mean": (_config(model_type="persimmon"), "persimmon"),
    "wrong head count": (_config(num_attention_heads=4), "4 query heads"),
    "wrong head size": (_config(head_dim=4), "shape"),
    "truncated": (_truncate, "model.safetensors"),
    "nan": (_nan, "layers.1"),
    "pickled": (_pickled, "safetensors"),
    "no tokenizer": (lambda path: [file.unlink() for file in path.glob("tokenizer*")], "tokenizer"),
    "gone": (shutil.rmtree, "no such directory"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_bad_sources(run, copy, tmp_path: Path, fault: str) -> None:
    spoil, word = SPOILT[fault]
    path = copy()
    spoil(path)
    refused(run("fold", path, tmp_path / "out", "--kv-heads", 4, "--tokens", 512), word)
    assert not (tmp_path / "out").exists()


def test_nan_is_named_whatever_is_asked(run, copy, tmp_path: Path) -> None:
    """Also where the model is not run at all, or on given text."""
    path = copy()
    _nan(path)
    blind = ("--merge", "mean", "--group", "contiguous", "--no-refit")
    refused(run("fold", path, tmp_path / "out", "--kv-heads", 4, *blind), "layers.1")
    source = ("--calibration", path.parent / "text.txt")
    (path.parent / "text.txt").write_text("the quick brown fox\n" * 100)
    refused(run("calibrate", path, tmp_path / "s.safetensors", *source), "layers.1")
    assert not (tmp_path / "out").exists() and not (tmp_path / "s.safetensors").exists()


def test_bad_text(run, model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refused(run("calibrate", model, tmp_path / "s.safetensors", "--calibration", empty), "empty.txt")
    refused(run("eval", model, "--text", empty), "empty.txt")
    assert not (tmp_path / "s.safetensors").exists()


def test_nothing_is_overwritten_unasked(run, model: Path, tmp_path: Path) -> None:
    out, stats = tmp_path / "out", tmp_path / "s.safetensors"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    stats.write_text("keep")
    words = ("--kv-heads", 4, "--merge", "mean", "--group", "contiguous", "--no-refit")
    refused(run("fold", model, out, *words), "--force")
    refused(run("calibrate", model, stats), "--force")
    refused(run("fold", model, model, *words), str(model))
    assert (out / "mine.txt").read_text() == "keep" and stats.read_text() == "keep"
    assert run("fold", model, out, *words, "--force").code == 0
    assert (out / "plan.json").exists()


def test_a_place_that_cannot_be_written(run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(run("fold", model, tmp_path / "file" / "out", "--kv-heads", 4), str(tmp_path / "file"))
    words = ("--kv-heads", 4, "--merge", "mean", "--group", "contiguous", "--no-refit")
    refused(run("fold", model, "/proc/out", *words), "/proc")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["headfold", "fold", "a", "b", "--debug"])
    with pytest.raises(headfold.core.errors.UserError):
        cli.main()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("fold", "a", "b", "--kv-hed", 4),
            "headfold fold: No such option: --kv-hed",
        ),
        (("fold", "a"), "headfold fold: Missing argument 'OUT'; see headfold fold --help"),
        (("fold", "a", "b", "--seed", "x"), "headfold fold: Invalid value for '--seed': "),
        (("fold", "a", "b", "--tokens", 0), "headfold fold: Invalid value for '--tokens': "),
        (("folt",), "headfold: No such command 'folt'"),
        (("--nope",), "headfold: No such option: --nope; see headfold --help"),
    ],
)
def test_usage_errors_are_one_line(run, words: tuple[object, ...], said: str) -> None:
    ran = run(*words)
    assert ran.code == 2 and ran.out == "" and ran.err.count("\n") == 1 and ran.err.startswith(said), ran.err


def test_without_words_there_is_help(run) -> None:
    ran = run()
    assert ran.code == 2 and "calibrate" in ran.out + ran.err


def test_a_share_is_written_in_any_form(run, model: Path, tmp_path: Path) -> None:
    words = ("--merge", "mean", "--group", "contiguous")
    counts = []
    for number, share in enumerate(("1/4", "25%", "0.25", "2")):
        ran = run("plan", model, tmp_path / f"{number}.json", "--kv-heads", share, *words)
        assert ran.code == 0, ran.err
        counts.append(json.loads((tmp_path / f"{number}.json").read_text())["sites"])
    assert counts[1:] == counts[:1] * 3
    for wrong in ("1e999999999", "0%", "%", "-1/2", "1/0", "9" * 5000, "30%"):
        refused(run("plan", model, tmp_path / "no.json", f"--kv-heads={wrong}", *words), "--kv-heads")


def test_what_names_no_file_is_refused(run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty source is not the working directory, and not the default either; a FIFO or a device is not waited for."""
    monkeypatch.chdir(model.parent)
    os.mkfifo(tmp_path / "fifo")
    out = tmp_path / "out"
    for source in ("", tmp_path / "fifo", "/dev/zero", "hub:", "hub:../../x"):
        refused(run("calibrate", model, tmp_path / "s", "--calibration", source), str(source) or "empty")
        refused(run("eval", model, "--text", source), str(source) or "empty")
        refused(run("fold", model, out, "--kv-heads", 4, "--calibration", source), str(source) or "empty")
    for file in ("", tmp_path / "fifo", "/dev/zero"):
        refused(run("inspect", model, "--stats", file), str(file) or ".")
        refused(run("fold", model, out, "--kv-heads", 4, "--stats", file), str(file) or ".")
        refused(run("fold", model, out, "--plan", file), str(file) or ".")
        refused(run("inspect", file), str(file) or "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo"]


def test_pictures_and_traces_overwrite_nothing(run, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    mine = tmp_path / "mine.png"
    mine.write_text("keep")
    refused(run("bench", model, "--plot", mine), "--force")
    refused(run("bench", model, "--profile", tmp_path), "--force")
    refused(run("uptrain", model, tmp_path / "out", "--steps", 1, "--plot", mine), "--force")
    refused(run("compare", model, "--kv-heads", 4, "--plot", mine), "--force")
    assert mine.read_text() == "keep"


def test_an_interrupt_is_one_line(run, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    def interrupted(*args: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("headfold.verbs.inspect.inspect", interrupted)
    ran = run("inspect", model)
    assert ran.code == 130 and ran.err == "headfold: interrupted\n"


def test_help_states_the_defaults(run) -> None:
    text = " ".join(run("fold", "--help").out.replace("│", " ").split())
    assert f"Default: {DEFAULT_SOURCE}." in text and f"Default: {DEFAULT_TOKENS}." in text


def test_installed_command() -> None:
    command = Path(sys.executable).with_name("headfold")
    ran = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout == f"headfold {headfold.__version__}\n"


def test_load_refuses_what_is_no_finished_fold(run, model: Path, tmp_path: Path) -> None:
    words = ("--kv-heads", 2, "--merge", "mean", "--group", "contiguous", "--no-refit", "--no-verify")
    run("fold", model, tmp_path / "out", *words)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 4}))
    with pytest.raises(headfold.core.errors.UserError, match=r"2 K/V heads.* = 4"):
        headfold.load(tmp_path / "out")
    with pytest.raises(headfold.core.errors.UserError, match="unfinished"):
        headfold.load(tmp_path / "out.partial")
    with pytest.raises(headfold.core.errors.UserError, match=r"no config\.json"):
        headfold.load(tmp_path)


@pytest.mark.parametrize(
    ("words", "old", "new"),
    [
        (("probe", "nosuch"), "probe", "detect"),
        (("fold", "MODEL", "OUT", "--kv-heads", 2, "--head-width", 3, "--merge", "mean"), "--head-width", "--head-dim-multiple"),
        (("plan", "MODEL", "OUT", "--max-rise", 0.1), "--max-rise", "--max-loss-increase"),
        (("plan", "MODEL", "OUT", "--kv-budget", "50%", "--spread", "exact"), "--spread", "--allocation"),
    ],
)  # fmt: skip
def test_former_names_work_and_say_the_new_ones(
    run, model: Path, tmp_path: Path, words: tuple, old: str, new: str
) -> None:
    places = {"MODEL": model, "OUT": tmp_path / "out"}
    ran = run(*(places.get(word, word) for word in words))
    assert f"headfold: {old} is now called {new}" in ran.err and ran.code == 2
    assert "no such option" not in ran.err.lower()


@pytest.mark.parametrize("words", [("--device", "nonsense"), ("--device", "cuda:99"), ("--dtype", "int8")])
@pytest.mark.parametrize("verb", ["eval", "calibrate", "fold", "compare"])
def test_a_place_or_dtype_that_is_none_is_refused_in_one_line(
    run, model: Path, tmp_path: Path, verb: str, words: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rest = {
        "eval": (),
        "calibrate": (tmp_path / "s",),
        "fold": (tmp_path / "o", "--kv-heads", 2),
        "compare": ("--kv-heads", 2),
    }
    ran = run(verb, model, *rest[verb], *words)
    assert ran.code == 2 and ran.out == "" and len(ran.err.splitlines()) == 1 and f"{words[0]} {words[1]}" in ran.err
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.compare"))
