"""Kills, interrupts, full disks and races: what they leave is nothing, or whole, and the same command run again ends as undisturbed."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from . import traps
from .judging import essence, finding, state_of
from .ranks import run_on
from .running import Outcome, run, start
from .scenarios import TRAIN
from .sources import NAMES, PAIRS, TEXT, copied, ensure, made


@dataclass(frozen=True, slots=True)
class Job:
    """A command that writes `out`; what `out` holds while it runs is whole unless `grows`; `old` is a source that lies there before;
    `ranks` is the number of processes that run it together."""

    words: tuple[str, ...]
    needs: tuple[str, ...]
    out: str
    grows: bool = False
    old: str = ""
    ranks: int = 1

    def run(
        self,
        words: Sequence[object],
        folder: Path,
        *,
        victim: int = 0,
        before: Callable[[], None] | None = None,
        **how: Any,
    ) -> Outcome:
        """Run `headfold WORDS` on the job's ranks; traps are set, and a kill arrives, in the `victim` alone."""
        if self.ranks == 1:
            return run(words, folder, before=before, **how)
        return run_on(self.ranks, words, folder, victim=victim, before=before, **how)


def _job(words: str, out: str, *, grows: bool = False, old: str = "", ranks: int = 1) -> Job:
    command = tuple(words.split(" "))
    return Job(command, tuple(sorted({word for word in command if word in NAMES})), out, grows, old, ranks)


_TEXT, _PAIRS, _TRAIN = " ".join(TEXT), " ".join(PAIRS), " ".join(TRAIN)
_FOLD, _HEAL = "fold llama out --kv-heads 2", "--heal --heal-tokens 64"
JOBS = (
    _job(f"{_FOLD} {_TEXT}", "out"),
    _job(f"{_FOLD} {_HEAL} --heal-by model {_TEXT}", "out"),
    _job(f"{_FOLD} {_HEAL} --heal-by block {_TEXT}", "out"),
    _job(f"fold sharded out --kv-heads 2 {_TEXT}", "out"),
    _job("fold sharded out --kv-heads 2 --merge mean --group contiguous --no-refit", "out"),
    _job(f"{_FOLD} --group swap:unequal=true --layout padded {_TEXT}", "out"),
    _job(f"{_FOLD} --force {_TEXT}", "out", old="layered"),
    _job(f"fold t5 out --kv-heads 2 {_PAIRS}", "out"),
    _job(f"calibrate llama made.safetensors {_TEXT}", "made.safetensors"),
    _job("plan llama made.json --kv-heads 2 --stats stats.safetensors", "made.json"),
    _job("plan llama made.json --kv-budget 40% --stats stats.safetensors", "made.json"),
    _job(f"uptrain folded out {_TRAIN} --save-every 1 --data text.txt --distill llama", "out"),
    _job(
        f"compare llama --kv-heads 2 --methods mean,absorb --out rows --limit 64 --text text.txt {_TEXT}",
        "rows",
        grows=True,
    ),
    _job("frontier llama points --measure 1 --stats stats.safetensors", "points", grows=True),
    _job("export folded out --layout native", "out"),
    _job("export layered out --layout decilm", "out"),
    _job("export folded out.gguf --layout gguf", "out.gguf"),
    _job("export folded out --layout ct2", "out"),
    _job(f"route folded out --route kdgqa {_TEXT}", "out"),
    _job("detect llama --out family.py", "family.py"),
)
SHARED = (
    _job(f"{_FOLD} {_TEXT}", "out", ranks=2),
    _job(f"uptrain folded out {_TRAIN} --save-every 1 --data text.txt", "out", ranks=2),
)
"""Jobs of several ranks, of which one is killed."""
RACES = tuple(job for job in JOBS if not job.old)
_RIVAL = _job("fold llama out --kv-heads 4 --merge mean --group contiguous --no-refit", "out")


class Undisturbed:
    """What jobs make undisturbed: the essence of their output, their events and their seconds, measured once each."""

    def __init__(self, root: Path, work: Path) -> None:
        self._root, self._work = root, work
        self._known: dict[Job, tuple[Any, int, float]] = {}

    def __getitem__(self, job: Job) -> tuple[Any, int, float]:
        if job not in self._known:
            counted = self._work.with_name(f"{self._work.name}.events")
            with copied(self._root, self._work, job.needs) as folder:
                lay_old(self._root, folder, job)
                outcome = job.run(job.words, folder, before=traps.counting(folder, counted), limit=300)
                made(outcome, job.words)
                self._known[job] = essence(folder / job.out), int(counted.read_text()), outcome.seconds
            counted.unlink()
        return self._known[job]


def lay_old(root: Path, folder: Path, job: Job) -> None:
    """Put what is to be replaced into the place of the output."""
    if job.old:
        ensure(root, [job.old])
        shutil.copytree(root / job.old, folder / job.out)


def kill(root: Path, folder: Path, undisturbed: Undisturbed, random: Random) -> tuple[Job, str, str]:
    """Kill a job, or one of its ranks, at an event or a time and run it again; return the job, how, and what is wrong."""
    job = random.choice(JOBS + SHARED)
    _, events, seconds = undisturbed[job]
    victim = random.randrange(job.ranks)
    with copied(root, folder, job.needs):
        lay_old(root, folder, job)
        if victim == 0 and random.random() < 0.7:  # rank 0 alone writes
            number = random.randint(1, events)
            how = f"kill at event {number} of {events}"
            trap, after = traps.at(folder, number, traps.killed), None
        else:
            after = random.random() * seconds
            how, trap = f"kill after {after:.2f} s of {seconds:.2f}", None
        how += f" of rank {victim} of {job.ranks}" if job.ranks > 1 else ""
        before = state_of(folder)
        first = job.run([*job.words, "--json"], folder, victim=victim, before=trap, kill_after=after)
        if first.code == 0:
            return job, f"{how}: ended before", ""
        wrong = "" if first.code == -signal.SIGKILL else f"exit code {first.code} by a kill: {first.err[-200:]}"
        wrong = wrong or ("traceback of another rank" if "Traceback" in first.err else "")
        return job, how, wrong or _left(root, folder, job, undisturbed) or _again(folder, job, undisturbed, before)


def interrupt(root: Path, folder: Path, undisturbed: Undisturbed, random: Random) -> tuple[Job, str, str]:
    """Press Ctrl-C at an event and run the job again."""
    job = random.choice(JOBS)
    number = random.randint(1, undisturbed[job][1])
    with copied(root, folder, job.needs):
        lay_old(root, folder, job)
        before = state_of(folder)
        trap = traps.listening(traps.at(folder, number, traps.interrupted))
        first = run([*job.words, "--json"], folder, before=trap)
        how = f"interrupt at event {number} of {undisturbed[job][1]}"
        if first.code == 0:
            return job, f"{how}: ended before", ""
        lines = first.err.strip().splitlines()
        wrong = (
            ""
            if first.code == 130 and len(lines) == 1
            else f"exit code {first.code}, {len(lines)} lines by an interrupt"
        )
        return job, how, wrong or _left(root, folder, job, undisturbed) or _again(folder, job, undisturbed, before)


def full_disk(root: Path, folder: Path, undisturbed: Undisturbed, random: Random) -> tuple[Job, str, str]:
    """Run a job on a disk that is full from some event on, or on a small file system, and again where there is room."""
    job = random.choice(JOBS)
    whole, events, _ = undisturbed[job]
    small = random.random() < 0.5 and os.geteuid() == 0
    if small:
        folder.mkdir(parents=True)
        needed = sum((root / name).stat().st_size for name in job.needs if (root / name).is_file()) + sum(
            path.stat().st_size + 4096 for name in (*job.needs, job.old or "none") for path in (root / name).rglob("*")
        )
        size = needed + 100_000 + random.randrange(400_000)
        small = not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
        ).returncode
    inside = folder / "disk"
    try:
        with copied(root, inside, job.needs):
            lay_old(root, inside, job)
            before = state_of(inside)
            number = random.randint(1, events)
            trap = None if small else traps.full_from(inside, number)
            how = f"{size} bytes of disk" if small else f"full from event {number} of {events}"
            first = run([*job.words, "--json"], inside, before=trap)
            if first.code == 0:
                return job, f"{how}: ended before", ""
            wrong = finding(first, before, _without_staging(state_of(inside), job), job.out)
            wrong = wrong or ("" if "full" in first.err or "room" in first.err else f"says {first.err[:100]}")
            wrong = wrong or _left(root, inside, job, undisturbed)
            if small:
                subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
            return job, how, wrong or _again(inside, job, undisturbed, before)
    finally:
        if small:
            subprocess.run(["umount", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def race(root: Path, folder: Path, undisturbed: Undisturbed, random: Random) -> tuple[Job, str, str]:
    """Run the same job two or three times at once, or another one to the same place."""
    job = random.choice(RACES)
    jobs = [job] * random.choice((2, 2, 3))
    if job.words[:3] == _RIVAL.words[:3] and random.random() < 0.5:
        jobs[-1] = _RIVAL
    delays = sorted(random.random() * undisturbed[job][2] * random.choice((0.05, 1)) for _ in jobs)
    how = f"race of {len(jobs)}" + (" with another" if _RIVAL in jobs else "")
    references = [undisturbed[one][0] for one in jobs]
    with copied(root, folder, job.needs):
        before = state_of(folder)
        running = [
            start([*one.words, "--json"], folder, before=_waiting(delay), name=str(n))
            for n, (one, delay) in enumerate(zip(jobs, delays, strict=True))
        ]
        ended = [one.wait() for one in running]
        return job, how, _of_race(ended, folder, job, references, before)


def _of_race(ended: list[Outcome], folder: Path, job: Job, references: list[Any], before: Any) -> str:
    after = state_of(folder)
    if not any(outcome.code == 0 for outcome in ended):
        return f"none wins: {ended[0].err[:100]}"
    for outcome in ended:
        # A run that finds its output there already has nothing to print.
        ours = (job.out, f"{job.out.removesuffix('.json')}.sensitivity.json")
        written = {name: what for name, what in after.items() if name.partition("/")[0] in ours}
        wrong = finding(outcome, before | (written if outcome.code else {}), after, job.out)
        if wrong and not (wrong == "no JSON value" and "nothing is left to do" in outcome.err):
            return wrong
    return "" if essence(folder / job.out) in references else "the output is of neither"


def _waiting(seconds: float) -> Any:
    import time

    return lambda: time.sleep(seconds)


def _without_staging(state: dict[str, Any], job: Job) -> dict[str, Any]:
    """Leave out what the next run of the same job resumes from, or only removes the mark from: that is compared on its own."""
    left = [f"{job.out}.partial", f"{job.out.removesuffix('.json')}.sensitivity"]
    if f"{job.out}/.headfold-job" in state:
        left.append(job.out)
    return {name: what for name, what in state.items() if not name.startswith(tuple(left))}


def _left(root: Path, folder: Path, job: Job, undisturbed: Undisturbed) -> str:
    """Return what is wrong with the output's place before the job is run again."""
    place = folder / job.out
    if job.grows or not place.exists() or (place.is_dir() and not any(place.iterdir())):
        aside = folder / f".{job.out}.headfold-replaced"
        return "the replaced directory is gone" if job.old and not place.exists() and not aside.exists() else ""
    found = essence(place)
    # The mark of a job that is whole lies in the directory until the next run removes it.
    found = (
        {name: what for name, what in found.items() if not name.startswith(".headfold")} if place.is_dir() else found
    )
    whole = [undisturbed[job][0]] + ([essence(root / job.old)] if job.old else [])
    return "" if found in whole else "half an output"


def _again(folder: Path, job: Job, undisturbed: Undisturbed, before: Any) -> str:
    """Run the job again and return what is wrong with the end."""
    place = folder / job.out
    was_whole = place.exists() and not (place / ".headfold-job").exists() and essence(place) == undisturbed[job][0]
    second = job.run([*job.words, "--json"], folder)
    if second.code == 2 and was_whole and "--force" in second.err:
        second = Outcome(0, "{}", "", second.seconds)  # the run was at its very end, and nothing is replaced unasked
    after = state_of(folder)
    wrong = finding(second, before, after, job.out)
    if wrong and not (wrong == "no JSON value" and "nothing is left to do" in second.err):
        return f"again: {wrong}: {second.err[:200]}"
    if second.code:
        return f"again: {second.err[:200]}"
    return "" if essence(place) == undisturbed[job][0] else "again: another output"
