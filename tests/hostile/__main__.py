"""Run a campaign: `python -m hostile --minutes 10 [--seed 0]`, in the directory `tests`."""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path

# Read when torch and transformers are imported, which the modules below do.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

from . import running  # noqa: E402
from .campaign import Campaign, Case, counted, list_digest, numbers  # noqa: E402

MEMORY = Path("/dev/shm")
"""Where Linux keeps files in memory: waiting for a disk would take most of the time."""


def main() -> int:
    """Run cases until the time or the number is used up; print and write what was found; return 1 if something was."""
    reader = argparse.ArgumentParser(prog="hostile", description=__doc__)
    reader.add_argument("--minutes", type=float, default=10.0)
    reader.add_argument(
        "--cases", type=int, default=None, help="number of cases; the default is what the minutes allow"
    )
    reader.add_argument("--seed", type=int, default=0)
    reader.add_argument("--first", type=int, default=0, help="number of the first case")
    reader.add_argument("--group", help="input, kill, race, full disk or interrupt alone")
    reader.add_argument("--only", help="run these cases alone: numbers, with commas between them")
    reader.add_argument("--parsers", action="store_true", help="fuzz the parsers alone, in this process")
    reader.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    reader.add_argument("--work", type=Path, help="folder to work in; the default is a temporary one")
    reader.add_argument("--out", type=Path, help="file to write the report to")
    asked = reader.parse_args()
    running.prepare()
    kept = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="headfold-hostile-", dir=kept) as temporary:
        work = (asked.work or Path(temporary)).resolve()
        if asked.parsers:
            return _of_parsers(work, asked)
        cases = _only(work, asked) if asked.only is not None else _spread(work, asked)
    report = {"seed": asked.seed, "list": list_digest(), **counted(cases)}
    for found in report["findings"]:
        print(f"{found['number']}: {found['words']}: {found['what']}: {found['wrong']}")
    print(
        ", ".join(f"{count} {group}" for group, count in report["cases"].items())
        + f": {len(report['findings'])} findings"
    )
    if asked.out:
        asked.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["findings"] else 0


def _of_parsers(work: Path, asked: argparse.Namespace) -> int:
    from . import parsers

    report = parsers.main(work / "parsers", asked.minutes, asked.seed)
    for found in report["findings"]:
        print(f"{found['parser']}: {found['what']}: {found['wrong']}")
    by = "by the lines that they reach" if report["by_coverage"] else "at random"
    print(f"{report['inputs']} inputs chosen {by}: {len(report['findings'])} findings")
    if asked.out:
        asked.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["findings"] else 0


def _only(work: Path, asked: argparse.Namespace) -> list[Case]:
    campaign = Campaign(work / "sources", work / "only", asked.seed)
    return [campaign.case(int(number)) for number in asked.only.split(",")]


def _spread(work: Path, asked: argparse.Namespace) -> list[Case]:
    """Run every N-th case in each of N forked processes, which write a line per case."""
    ends, children = time.monotonic() + 60 * asked.minutes, []
    for process in range(asked.processes):
        pid = os.fork()
        if pid == 0:
            _share(work, asked, process, ends)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    lines = [line for file in sorted(work.glob("cases-*.jsonl")) for line in file.read_text().splitlines()]
    return sorted((Case(**json.loads(line)) for line in lines), key=lambda case: case.number)


def _share(work: Path, asked: argparse.Namespace, process: int, ends: float) -> None:
    code = 1
    try:
        campaign = Campaign(work / "sources", work / f"process-{process}", asked.seed)
        share = None if asked.cases is None else len(range(process, asked.cases, asked.processes))
        with (work / f"cases-{process}.jsonl").open("w") as file:
            for number in islice(numbers(asked.group, asked.first + process, asked.processes), share):
                if time.monotonic() > ends:
                    break
                file.write(json.dumps(asdict(campaign.case(number))) + "\n")
                file.flush()
        code = 0
    except BaseException as error:  # noqa: BLE001 - a forked process must end here
        print(f"hostile: process {process}: {error!r}", file=sys.stderr)
        raise
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
