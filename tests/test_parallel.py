"""Two processes find what one finds, say what one says, and end together."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from grades import assert_bitwise, assert_differs, assert_tight, assert_tight_through_float32_norms
from processes import BATCH_TOKENS, CASES, TOKENS, found
from safetensors.torch import load_file, save_file
from test_corpus import tokenizer  # noqa: F401 (a fixture)
from tiny import tiny_checkpoint
from torch import Tensor

import headfold
from headfold import calibration, parallel
from headfold.conversion import site_files as fitted
from headfold.core.plan import Plan
from headfold.refine import distill, heal
from headfold.stats_file import StatsFile

HERE = Path(__file__).parent
SECONDS = 120
"""No test waits longer for a process."""
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
}  # fmt: skip
TEXT = "What the first process reads, all of them measure; none but the first needs the file. " * 40
HAS_TASKS = find_spec("lm_eval") is not None
FOLD: dict[str, Any] = dict(kv_heads=4, tokens=512, context=32)


@pytest.fixture(autouse=True)
def _sizes_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """`found` sets them. The others are those of processes.py, as a refit takes its samples batch by batch."""
    monkeypatch.setattr(calibration, "TOKENS_PER_BATCH", BATCH_TOKENS)
    monkeypatch.setattr(heal, "BATCH_TOKENS", BATCH_TOKENS)
    monkeypatch.setattr(distill, "BATCH_TOKENS", BATCH_TOKENS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:  # noqa: F811
    """With a tokenizer of bytes: the model can be calibrated on text of its own."""
    directory = tmp_path_factory.mktemp("source") / "readable"
    shutil.copytree(tiny_checkpoint("llama", vocab_size=len(tokenizer)), directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def grouped(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 4 K/V heads, whose keys have unlike lengths."""
    directory = tmp_path_factory.mktemp("grouped") / "readable"
    shutil.copytree(source, directory)
    vocab_size = json.loads((source / "config.json").read_text())["vocab_size"]
    few = tiny_checkpoint("llama", vocab_size=vocab_size, num_key_value_heads=4)
    shutil.copyfile(few / "config.json", directory / "config.json")
    tensors = load_file(few / "model.safetensors")
    for name, tensor in tensors.items():
        if "k_proj.weight" in name:
            tensor *= torch.linspace(1, 1.6, 4, dtype=tensor.dtype).repeat_interleave(len(tensor) // 4)[:, None]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task file and its five texts."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": TEXT[at : at + 30 + at]} for at in range(5)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "my_rolling.yaml").write_text(json.dumps({  # JSON is YAML
        "task": "my_rolling", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "",
        "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}],
        "dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}},
    }))  # fmt: skip
    return folder


def launched_by_two(part: str, directory: Path) -> list[Any]:
    """What each of two processes answers to the commands in `directory`, in that part of processes.py."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    ran = subprocess.run(
        [*launcher, str(HERE / "processes.py"), part, str(directory)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return [json.loads((directory / f"answers-{rank}.json").read_text()) for rank in range(2)]


def words(source: Path, out: str) -> list[str]:
    options = [word for key, value in FOLD.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return ["fold", str(source), out, *options]


@dataclass(frozen=True, slots=True)
class Launched:
    """What two processes left: by case what each found, by command what each answered (code, stdout, stderr), and rank 0's directory."""

    found: dict[str, list[dict[str, Tensor]]]
    answers: dict[str, list[list[Any]]]
    of_rank_0: Path


@pytest.fixture(scope="module")
def launched(source: Path, grouped: Path, task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """`processes.py` twice, by torchrun."""
    directory = tmp_path_factory.mktemp("launched")
    shutil.copytree(source, directory / "first" / "mine")
    data = ["--tokens", "512", "--context", "32"]
    commands = {
        "calibrate": ["calibrate", str(source), "stats.safetensors", *data],
        "refused": ["fold", str(source), "refused", "--kv-heads", "3"],
        "refused by the second": ["fold", "mine", "elsewhere", "--kv-heads", "4", *data],
        "refused by both": ["fold", str(source), "both"],
        "fold": words(source, "out"),
        "healed": [*words(source, "healed"), "--heal", "--heal-by", "model", "--heal-tokens", "1024", "--json"],
        "alone": ["inspect", str(source)],
        "evaluated": [
            "eval",
            str(source),
            "--reference",
            str(source),
            "--text",
            "mine.txt",
            "--context",
            "32",
            "--json",
        ],
        "routed": ["route", str(grouped), "routed", "--calibration", "mine.txt", *data, "--json"],
        "planned": ["plan", str(source), "plan.json", "--kv-budget", "50%", "--stats", "stats.safetensors"],
    }
    if HAS_TASKS:
        tasks = ["--task", "my_rolling", "--include-path", str(task_folder), "--json"]
        commands["on a task"] = ["eval", str(source), *tasks]
    (directory / "first" / "mine.txt").write_text(TEXT)
    (directory / "commands.json").write_text(json.dumps(list(commands.values())))
    answers = launched_by_two("work", directory)
    return Launched(
        {
            name: [load_file(directory / f"{number}-{rank}.safetensors") for rank in range(2)]
            for number, name in enumerate(CASES)
        },
        {name: [answer[number] for answer in answers] for number, name in enumerate(commands)},
        directory / "first",
    )


@pytest.mark.parametrize("name", CASES)
def test_every_process_finds_the_same(name: str, launched: Launched) -> None:
    first, second = launched.found[name]
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert_bitwise(second[key], tensor)


ALONE = {
    "even": (2 * BATCH_TOKENS, TOKENS),
    "uneven": (2 * BATCH_TOKENS, TOKENS * 3 // 4),
    "one batch to train on": (BATCH_TOKENS, TOKENS),
    "fewer batches than processes": (BATCH_TOKENS, TOKENS),
    "padded": (110, TOKENS * 3 // 4),
}
"""Batches and tokens of one process whose healing has the same steps: each sees what two processes see together. As one batch is held back
of three, and of two as well, the tokens of an average step are not twice as many there."""


@pytest.mark.parametrize("name", CASES)
def test_two_processes_find_what_one_does(name: str, launched: Launched) -> None:
    together, alone = launched.found[name][0], found(name, *ALONE[name])
    assert together.keys() == alone.keys() and {key.split("/")[0] for key in alone} == {
        "count", "statistics", "refit", "heal", "distill",
    }  # fmt: skip
    for key, tensor in alone.items():
        grade = assert_tight if key.startswith(("count", "statistics")) else assert_tight_through_float32_norms
        grade(together[key], tensor)
    for key in [key for key in alone if key.startswith("refit/")]:
        for trained in ("heal", "distill"):
            assert_differs(alone[key.replace("refit", trained)], alone[key])


def test_the_first_process_writes_and_speaks_alone(launched: Launched) -> None:
    of_rank_0, answers = launched.of_rank_0, launched.answers
    for name in ("calibrate", "fold", "healed", "alone", "evaluated", "planned", "routed"):
        (code, out, err), second = answers[name]
        assert code == 0 and out, err
        assert second == [0, "", ""]
    made = {path.name for path in of_rank_0.parent.iterdir() if path.suffix not in (".json", ".safetensors")}
    assert made == {"first"}
    made = {"stats.safetensors", "out", "healed", "plan.json", "plan.sensitivity.json", "routed"}
    assert {path.name for path in of_rank_0.iterdir()} == made | {"mine", "mine.txt"}
    result = json.loads(answers["healed"][0][1])
    assert result["healed"] == 1024 and result["verification"]["passed"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("refused", "cannot split 8 K/V heads into 3"),
        ("refused by the second", "process 1: mine: neither a directory here nor a hub model"),
        ("refused by both", "expected either --kv-heads N or --plan PLAN.json, got none"),
    ],
)
def test_what_one_refuses_all_refuse_in_one_line(name: str, said: str, launched: Launched) -> None:
    (code, out, err), second = launched.answers[name]
    assert code == 2 and out == "" and second[0] == 2
    refusals = [line for line in err.splitlines() if line.startswith("headfold: ")]
    assert len(refusals) == 1 and said in refusals[0] and err.endswith(refusals[0] + "\n")
    if name != "refused by both":  # which each finds by itself
        assert second == [2, "", ""]


def test_the_sample_and_its_fingerprint_are_those_of_one_process(
    source: Path, launched: Launched, tmp_path: Path
) -> None:
    headfold.calibrate(source, tmp_path / "alone.safetensors", tokens=512, context=32)
    together, alone = StatsFile(launched.of_rank_0 / "stats.safetensors"), StatsFile(tmp_path / "alone.safetensors")
    assert together.metadata == alone.metadata and together.metadata["source"] == "self"
    assert_bitwise(together.sample()["input_ids"], alone.sample()["input_ids"])
    for site in alone:
        assert together[site].count == alone[site].count
        for name, tensor in alone[site].tensors.items():
            assert_tight(together[site].tensors[name], tensor)


def test_a_text_is_measured_as_by_one_process(source: Path, launched: Launched) -> None:
    together = json.loads(launched.answers["evaluated"][0][1])
    alone = headfold.eval(source, reference=source, text=str(launched.of_rank_0 / "mine.txt"), context=32)
    assert together["num_tokens"] == alone.num_tokens and together["num_windows"] == alone.num_windows > 2
    assert_tight(torch.tensor(together["nll"]).double(), torch.tensor(alone.nll).double())


def test_a_route_is_settled_as_by_one_process(grouped: Path, launched: Launched, tmp_path: Path) -> None:
    """Of batches that each process measured half of."""
    text = str(launched.of_rank_0 / "mine.txt")
    alone = headfold.route(grouped, tmp_path / "routed", calibration=text, tokens=512, context=32)
    together = json.loads(launched.answers["routed"][0][1])
    assert together["sizes"] == {name: list(sizes) for name, sizes in alone.sizes.items()}
    assert any(len(set(sizes)) > 1 for sizes in alone.sizes.values())
    a, b = ((path / "routed/model.safetensors").read_bytes() for path in (launched.of_rank_0, tmp_path))
    assert a == b


@pytest.mark.skipif(not HAS_TASKS, reason="the tasks extra is not installed")
def test_a_task_is_measured_as_by_one_process(source: Path, launched: Launched, task_folder: Path) -> None:
    """Each process answers a part of the requests."""
    (code, out, err), second = launched.answers["on a task"]
    assert (code, second) == (0, [0, "", ""]), err
    alone = headfold.eval(source, task="my_rolling", include_path=task_folder)
    (one,), (both,) = alone.tasks, json.loads(out)["tasks"]
    assert both["num_items"] == one.num_items == 5
    assert both["value"] == pytest.approx(one.value, rel=1e-6) and both["low"] == pytest.approx(one.low, rel=1e-6)


def test_a_budget_is_allocated_as_by_one_process(source: Path, launched: Launched, tmp_path: Path) -> None:
    stats = launched.of_rank_0 / "stats.safetensors"
    alone = headfold.plan(source, tmp_path / "plan.json", kv_budget="50%", stats=stats)
    assert Plan.load(launched.of_rank_0 / "plan.json") == alone
    both = [json.loads((folder / "plan.sensitivity.json").read_text()) for folder in (launched.of_rank_0, tmp_path)]
    for name, row in both[1]["loss_increase"].items():
        for count, increase in row.items():
            assert both[0]["loss_increase"][name][count] == pytest.approx(increase, rel=1e-3), (name, count)


def same_weights(a: Path, b: Path) -> None:
    left, right = (load_file(path / "model.safetensors") for path in (a, b))
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert_tight_through_float32_norms(left[name], tensor)


@pytest.fixture(scope="module")
def alone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fold of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "TOKENS_PER_BATCH", BATCH_TOKENS)
        headfold.fold(source, out, **FOLD)
    assert not torch.distributed.is_initialized() and parallel.world_size() == 1
    return out


def test_the_fold_is_that_of_one_process(alone: Path, launched: Launched) -> None:
    out = launched.of_rank_0 / "out"
    together, one = (Plan.load(path / "plan.json") for path in (out, alone))
    assert together.calibration == one.calibration
    assert {n: s.groups for n, s in together.sites.items()} == {n: s.groups for n, s in one.sites.items()}
    same_weights(out, alone)


def test_after_a_process_was_killed_one_goes_on_from_the_sites_that_are_done(
    source: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, put = tmp_path / "out", []
    (tmp_path / "command.json").write_text(json.dumps(words(source, str(out))))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ran = [
        subprocess.Popen(
            [sys.executable, str(HERE / "processes.py"), "die", str(tmp_path)],
            env=ENVIRONMENT | both | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        (said, errors), (_, unsaid) = (process.communicate(timeout=SECONDS) for process in ran)
    finally:
        for process in ran:
            process.kill()
    assert [process.returncode for process in ran] == [2, -9]
    assert said == "" and unsaid == ""
    assert errors.splitlines()[-1].startswith("headfold: another process of this run cannot be reached")
    assert "Traceback" not in errors and not out.exists()

    def noted(tensors: Any, path: Path, facts: Any) -> None:
        put.append(path.stem)
        save_file(tensors, path, facts)

    monkeypatch.setattr(fitted, "save_file", noted)
    headfold.fold(source, out, **FOLD)
    assert put == ["layers.1.self"]
    same_weights(out, alone)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]
