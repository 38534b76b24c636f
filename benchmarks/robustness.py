"""Run the hostile campaign of tests/hostile for a table: corrupted inputs, kills, races, full disks and interrupts, counted by class.

    python benchmarks/robustness.py [--cases 11000] [--minutes 120] [--seed 0] [--name robustness]
    python benchmarks/robustness.py --more 7000 [--cases 4000]
    python benchmarks/robustness.py --again [--name robustness]

Of a hundred cases 92 are inputs, 5 kills, and a race, a full disk and an interrupt one each. Results go to
benchmarks/results/NAME.json, findings among them. `--more` goes on after an earlier campaign, with cases from that number on, and adds
to its counts. `--again` repeats the findings, after they were mended, and keeps what they were
under `mended`, where those of earlier campaigns stay. The number of a case has a meaning for one list of scenarios, whose digest is `list`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import describe

RESULTS = Path(__file__).parent / "results"
TESTS = Path(__file__).parents[1] / "tests"


def campaign(out: Path, *words: str) -> dict[str, Any]:
    """Run a campaign, or a case of one, and return its report."""
    subprocess.run([sys.executable, "-m", "hostile", *words, f"--out={out}"], cwd=TESTS, check=False)
    report: dict[str, Any] = json.loads(out.read_text().replace(f"{TESTS.parent}/", ""))  # in tracebacks
    return report


def joined(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Return the report of both campaigns, which ran different cases of one list."""
    if later["list"] != earlier["list"] or later["seed"] != earlier["seed"]:
        sys.exit("robustness: the list of scenarios or the seed has changed since the campaign; run it anew")
    rows: dict[tuple[str, ...], int] = {}
    for row in (*earlier["rows"], *later["rows"]):
        key = row["group"], row["verb"], row["kind"], row["ended"]
        rows[key] = rows.get(key, 0) + row["cases"]
    groups = sorted({*earlier["cases"], *later["cases"]})
    return earlier | {
        "cases": {group: earlier["cases"].get(group, 0) + later["cases"].get(group, 0) for group in groups},
        "findings": [*earlier["findings"], *later["findings"]],
        "slowest_seconds": max(earlier["slowest_seconds"], later["slowest_seconds"]),
        "rows": listed(rows),
    }


def listed(rows: dict[tuple[str, ...], int]) -> list[dict[str, Any]]:
    """Return counts by class as a report lists them."""
    return [
        {"group": group, "verb": verb, "kind": kind, "ended": ended, "cases": count}
        for (group, verb, kind, ended), count in sorted(rows.items())
        if count
    ]


def repeated(report: dict[str, Any]) -> dict[str, Any]:
    """Return the report with its findings repeated: each counts as it ends now."""
    rows = {tuple(row[key] for key in ("group", "verb", "kind", "ended")): row["cases"] for row in report["rows"]}
    numbers = ",".join(str(found["number"]) for found in report["findings"])
    with tempfile.TemporaryDirectory() as folder:
        now = campaign(Path(folder) / "cases.json", f"--only={numbers}", f"--seed={report['seed']}")
    for found in report["findings"]:
        rows[found["group"], found["verb"], found["kind"], "wrong"] -= 1
    for row in now["rows"]:
        key = row["group"], row["verb"], row["kind"], row["ended"]
        rows[key] = rows.get(key, 0) + row["cases"]
    if now["list"] != report.get("list"):
        sys.exit(
            "robustness: the list of scenarios has changed since the campaign, and its numbers mean other cases; run it anew"
        )
    findings = now["findings"]
    still = {found["number"] for found in findings}
    gone = [found | {"list": report["list"]} for found in report["findings"] if found["number"] not in still]
    mended = report.get("mended", []) + gone
    return report | {"rows": listed(rows), "findings": findings, "mended": mended}


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("--cases", type=int, default=11000)
    reader.add_argument("--minutes", type=float, default=120)
    reader.add_argument("--seed", type=int, default=0)
    reader.add_argument(
        "--more", type=int, metavar="FIRST", help="run cases from this number on, and add them to the last campaign"
    )
    reader.add_argument("--again", action="store_true", help="repeat the findings of the last campaign")
    reader.add_argument("--name", default="robustness", help="name of the result")
    options = reader.parse_args()
    out = RESULTS / f"{options.name}.json"
    if options.again:
        report = repeated(json.loads(out.read_text()))
        out.write_text(json.dumps(report, indent=1) + "\n")
        return
    words = [f"--{name}={getattr(options, name)}" for name in ("cases", "minutes", "seed")]
    if options.more is not None:
        with tempfile.TemporaryDirectory() as folder:
            later = campaign(Path(folder) / "cases.json", *words, f"--first={options.more}")
        report = joined(json.loads(out.read_text()), later)
    else:
        mended = json.loads(out.read_text()).get("mended", []) if out.exists() else []
        report = {"machine": describe(), "seeds": [options.seed], **campaign(out, *words), "mended": mended}
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
