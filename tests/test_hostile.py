"""A short slice of the hostile campaign, and that its judge and its corruptions do what the campaign relies on."""

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hostile import mutators, traps
from hostile.campaign import Case, counted, group_of
from hostile.judging import essence, finding, state_of
from hostile.running import Outcome
from hostile.scenarios import SCENARIOS, WORDS, options

TENSORS = (
    b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}'
)
SHARD = struct.pack("<Q", len(TENSORS)) + TENSORS + struct.pack("<3f", 1, 2, 3)
TRACEBACK = 'Traceback (most recent call last):\n  File "/x/headfold/a.py", line 3\nKeyError: 1\n'
CONFIG = json.dumps({"model_type": "llama", "rope_parameters": {"rope_theta": 1e4}, "architectures": ["A"]}).encode()


def test_a_slice_of_the_campaign_finds_nothing() -> None:
    """Two corrupted inputs, two kills, a race, a full disk and an interrupt."""
    words = ("--only", "90,91,92,95,97,98,99", "--processes", "1", "--minutes", "4", "--seed", "1760")
    ran = subprocess.run(
        [sys.executable, "-m", "hostile", *words], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert ran.returncode == 0 and "0 findings" in ran.stdout, ran.stdout + ran.stderr[-2000:]
    assert "1 full disk, 2 input, 1 interrupt, 2 kill, 1 race" in ran.stdout


@pytest.mark.parametrize(
    ("outcome", "wrong"),
    [
        (Outcome(0, "{}", "", 1), ""),
        (Outcome(2, "", "headfold: x: expected y, got z\n", 1), ""),
        (Outcome(2, "", "headfold: x\nmore\n", 1), "2 lines"),
        (Outcome(2, "", "x: y\n", 1), "line of another"),
        (Outcome(2, "", "", 1), "0 lines"),
        (Outcome(0, "nothing", "", 1), "no JSON value"),
        (Outcome(0, '{"loss": NaN}', "", 1), "no JSON value"),
        (Outcome(1, "", "", 1), "exit code 1"),
        (Outcome(-signal.SIGSEGV, "", "", 1), "signal 11"),
        (Outcome(-9, "", "", 60, hung=True), "hang"),
        (Outcome(1, "", TRACEBACK, 1), "traceback headfold/a.py:3 KeyError: 1"),
    ],
)  # fmt: skip
def test_the_judge_on_how_a_command_ended(outcome: Outcome, wrong: str) -> None:
    assert finding(outcome, {}, {}, "").startswith(wrong) and bool(finding(outcome, {}, {}, "")) == bool(wrong)


@pytest.mark.parametrize(
    ("code", "do", "wrong"),
    [
        (0, lambda path: (path / "out").mkdir(), ""),
        (0, lambda path: None, "no output"),
        (2, lambda path: (path / "model").write_text("other"), "changed model"),
        (2, lambda path: (path / "model").unlink(), "changed model"),
        (2, lambda path: (path / "out.partial").mkdir(), "left out.partial"),
        (2, lambda path: (path / "out").mkdir(), "refused, but wrote out"),
        (0, lambda path: ((path / "out").mkdir(), (path / "new").write_text("")), "left new"),
    ],
)
def test_the_judge_on_what_is_left(tmp_path: Path, code: int, do, wrong: str) -> None:
    (tmp_path / "model").write_text("a model")
    before = state_of(tmp_path)
    do(tmp_path)
    outcome = Outcome(code, "{}", "headfold: x\n" if code else "", 1)
    assert finding(outcome, before, state_of(tmp_path), "out") == wrong


def test_the_essence_of_an_output_is_its_tensors_and_what_does_not_tell_of_the_run(tmp_path: Path) -> None:
    for name, shard, config in (
        ("a", SHARD, {"x": 1, "seconds": 2}),
        ("b", mutators._safetensors(TENSORS + b"  ", SHARD[8 + len(TENSORS) :]), {"seconds": 3, "x": 1}),
        ("c", SHARD[:-1] + b"\1", {"x": 1}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(shard)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    a, b, c = (essence(tmp_path / name) for name in "abc")
    assert a == b and a != c


@pytest.mark.parametrize(
    ("mutate", "whole"),
    [
        (mutators.json_file, CONFIG), (mutators.header, SHARD), (mutators.numbers, SHARD), (mutators.text, b"a line\n" * 9),
        (mutators.lines, CONFIG + b"\n" + CONFIG + b"\n"), (mutators.card, b"---\na: b\n---\n# x\n"), (mutators.packed, b"PAR1" * 30),
    ],
)  # fmt: skip
def test_corruptions_follow_from_the_seed_and_change_the_bytes(mutate: mutators.Mutator, whole: bytes) -> None:
    made = [mutate(whole, Random(seed)) for seed in range(60)]
    assert made == [mutate(whole, Random(seed)) for seed in range(60)]
    assert sum(data != whole for _, data in made) > 45


def test_options_are_changed_but_for_the_bounds_of_honest_work() -> None:
    for seed in range(300):
        scenario = WORDS[seed % len(WORDS)]
        _, words = options(scenario.words, Random(seed))
        assert words != scenario.words or len(words) == len(scenario.words)
        assert all(
            words[words.index(bound) + 1] == scenario.words[scenario.words.index(bound) + 1]
            for bound in ("--tokens", "--steps")
            if bound in scenario.words
        )


def test_every_scenario_names_a_file_that_it_needs_and_every_group_has_its_share() -> None:
    assert all(scenario.spoilt.partition("/")[0] in scenario.needs for scenario in SCENARIOS)
    groups = [group_of(number) for number in range(1000)]
    assert (groups.count("input"), groups.count("kill"), groups.count("race")) == (920, 50, 10)


def test_counts_add_up_and_findings_are_named() -> None:
    cases = [
        Case(0, "input", "header", "fold", "x", "fold", "refused", "", 1.0),
        Case(1, "input", "header", "fold", "y", "fold", "refused", "hang", 2.0),
        Case(2, "kill", "kill", "fold", "z", "fold", "held", "", 3.0),
    ]
    report = counted(cases)
    assert report["cases"] == {"input": 2, "kill": 1} and [found["number"] for found in report["findings"]] == [1]
    assert sum(row["cases"] for row in report["rows"]) == 3 and report["slowest_seconds"] == 3.0


def test_a_trap_acts_at_its_event_alone(tmp_path: Path) -> None:
    """In a child, whose functions of the system it replaces."""
    (tmp_path / "inside").mkdir()
    for number, expected in ((1, []), (4, ["y"]), (99, ["z"])):
        pid = os.fork()
        if pid == 0:
            traps.at(tmp_path / "inside", number, traps.killed)()
            (tmp_path / "outside").write_text("")
            (tmp_path / "inside" / "x").touch()  # events 1 and 2
            os.rename(tmp_path / "inside" / "x", tmp_path / "inside" / "y")  # 3 and 4
            os.rename(tmp_path / "inside" / "y", tmp_path / "inside" / "z")
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        left = sorted(path.name for path in (tmp_path / "inside").iterdir())
        assert left == expected
        assert os.waitstatus_to_exitcode(status) == (0 if number == 99 else -signal.SIGKILL)
        for name in left:
            (tmp_path / "inside" / name).unlink()
