"""A campaign: cases by number, each wholly drawn from the seed and its number, spread over processes, and counted."""

import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from . import disasters
from .disasters import Undisturbed
from .judging import PLANTED, essence, finding, state_of
from .mutators import VALUES, Mutator, entry
from .running import run
from .scenarios import SCENARIOS, WORDS, Scenario, options
from .sources import copied, made

_SHARES = (("input", 92), ("kill", 5), ("race", 1), ("full disk", 1), ("interrupt", 1))
"""Of a hundred cases."""
OPTIONS, ENTRIES = 0.12, 0.05
"""Shares of inputs whose options are corrupted, and of those with no file in the place of a file."""
_DISASTERS = {
    "kill": disasters.kill, "race": disasters.race, "full disk": disasters.full_disk, "interrupt": disasters.interrupt,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """What happened: `ended` is done, refused or, of disasters, held; `wrong` says what must not be."""

    number: int
    group: str
    kind: str
    verb: str
    what: str
    words: str
    ended: str
    wrong: str
    seconds: float


class Campaign:
    """Runs cases on sources in `root`, in a folder `work` of its own."""

    def __init__(self, root: Path, work: Path, seed: int) -> None:
        self._root, self._work, self._seed = root, work, seed
        self._undisturbed = Undisturbed(root, work / "undisturbed")
        self._references: dict[tuple[str, ...], Any] = {}

    def case(self, number: int) -> Case:
        """Run the case of that number; an error of the campaign itself is a finding too."""
        try:
            return self._case(number)
        except Exception as error:  # noqa: BLE001 - the other cases are still to be run
            shutil.rmtree(self._work / "case", ignore_errors=True)
            return Case(number, group_of(number), "campaign", "", "", "", "", f"campaign: {error!r}", 0.0)

    def _case(self, number: int) -> Case:
        random, started = Random(f"{self._seed}/{number}"), time.monotonic()
        group = group_of(number)
        if group == "input":
            kind, verb, what, words, ended, wrong = self._input(random)
        else:
            job, what, wrong = _DISASTERS[group](self._root, self._work / "case", self._undisturbed, random)
            kind, verb, words = group, job.words[0], job.words
            ended = "ended before" if what.endswith("ended before") else "held"
        seconds = time.monotonic() - started
        shutil.rmtree(self._work / "case", ignore_errors=True)
        return Case(number, group, kind, verb, what, " ".join(words), ended, wrong, round(seconds, 2))

    def _input(self, random: Random) -> tuple[str, str, str, tuple[str, ...], str, str]:
        """Return kind, verb, what was changed, the command, how it ended and what is wrong."""
        scenario, share = random.choice(SCENARIOS), random.random()
        if share < OPTIONS:
            scenario = random.choice(WORDS)
            what, words = options(scenario.words, random)
            kind = "options"
        else:
            mutate, words, what = (entry if share < OPTIONS + ENTRIES else scenario.mutate), scenario.words, ""
            kind = mutate.__name__
        with copied(self._root, self._work / "case", scenario.needs) as folder:
            if kind != "options":
                what = _spoil(folder, scenario.spoilt, mutate, random)
            before = state_of(folder)
            outcome = run([words[0], "--json", *words[1:]], folder)
            wrong = finding(outcome, before, state_of(folder), _place(scenario, words), words)
            if not wrong and ": same" in what:
                wrong = self._of_same(scenario, outcome.code, folder)
            if wrong:
                wrong = f"{wrong} | {outcome.err[-300:]}"
        PLANTED.unlink(missing_ok=True)
        what = what.encode("utf-8", "backslashreplace").decode()
        return kind, scenario.verb, what, words, "refused" if outcome.code else "done", wrong

    def _of_same(self, scenario: Scenario, code: int, folder: Path) -> str:
        """Return what differs after a change that must not matter."""
        if code:
            return "refused what is the same"
        if not scenario.out:
            return ""
        return "" if essence(folder / scenario.out) == self._reference(scenario) else "another output of the same input"

    def _reference(self, scenario: Scenario) -> Any:
        if scenario.words not in self._references:
            with copied(self._root, self._work / "reference", scenario.needs) as folder:
                made(run([scenario.words[0], "--json", *scenario.words[1:]], folder), scenario.words)
                self._references[scenario.words] = essence(folder / scenario.out)
        return self._references[scenario.words]


def list_digest() -> str:
    """Return a digest of the lists that cases are drawn from: with others, a number means another case."""
    inputs = [(one.words, one.spoilt, one.mutate.__name__) for one in SCENARIOS]
    jobs = [(job.words, job.ranks) for job in disasters.JOBS + disasters.SHARED]
    return hashlib.sha256(repr((inputs, jobs, VALUES)).encode("utf-8", "replace")).hexdigest()[:12]


def group_of(number: int) -> str:
    """Return the group of a case."""
    place = number % 100
    for group, share in _SHARES:
        if place < share:
            return group
        place -= share
    raise AssertionError


def numbers(group: str | None, first: int, step: int) -> Iterator[int]:
    """Yield the numbers of cases from `first` on, of one group or of all."""
    number = first
    while True:
        if group is None or group_of(number) == group:
            yield number
        number += step


def counted(cases: list[Case]) -> dict[str, Any]:
    """Return the counts by class, and the findings."""
    table = Counter((case.group, case.verb, case.kind, "wrong" if case.wrong else case.ended) for case in cases)
    rows = [
        {"group": group, "verb": verb, "kind": kind, "ended": ended, "cases": count}
        for (group, verb, kind, ended), count in sorted(table.items())
    ]
    groups = Counter(case.group for case in cases)
    return {
        "cases": dict(sorted(groups.items())),
        "findings": [asdict(case) for case in cases if case.wrong],
        "slowest_seconds": max((case.seconds for case in cases), default=0.0),
        "rows": rows,
    }


def _place(scenario: Scenario, words: tuple[str, ...]) -> str:
    """Return the output's place in words whose arguments may be others: what stands where `out` stood."""
    if scenario.out in words or scenario.out not in scenario.words:
        return scenario.out
    at = scenario.words.index(scenario.out)
    return os.path.normpath(words[at]) if at < len(words) else scenario.out


def _spoil(folder: Path, name: str, mutate: Mutator, random: Random) -> str:
    """Corrupt a file; return what was done to it."""
    files = sorted(path for path in folder.glob(name) if path.is_file())
    file = random.choice(files)
    what, change = mutate(file.read_bytes(), random)
    file.unlink()
    file.write_bytes(change) if isinstance(change, bytes) else change(file)
    return f"{file.relative_to(folder)}: {what}"
