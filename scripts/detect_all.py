"""Probe every language model of transformers whose config counts K/V heads, and write the table of the README from it.

.venv/bin/python scripts/detect_all.py             # all types → benchmarks/results/probe.json, README.md
.venv/bin/python scripts/detect_all.py qwen3 phi   # these alone, printed
"""

import argparse
import json
import os
import signal
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "probe.json"
BEGIN, END = "<!-- probe: begin -->", "<!-- probe: end -->"
SECONDS_EACH = 60
"""A type that takes longer is stopped; on an idle core all take under ten."""
COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv")


def model_types() -> list[str]:
    """Types of causal language models whose config has a count of K/V heads, in order."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    return [name for name in sorted(CAUSAL) if _counts(CONFIG_MAPPING[name])]


def _counts(config_class: Any) -> bool:
    if any(name in getattr(config_class, "__dataclass_fields__", {}) for name in COUNTS):
        return True
    try:
        return any(name in config_class().to_dict() for name in COUNTS)
    except Exception:  # a class that assumes nothing has its fields above
        return False


def probed(model_type: str) -> dict[str, Any]:
    """What is seen of one type, or why nothing is."""
    from headfold.core.errors import UserError
    from headfold.detect import detect

    signal.alarm(SECONDS_EACH)
    try:
        found = detect(model_type)
        return {**found.to_json(), "key": found.position}
    except UserError as refusal:
        return {"model_type": model_type, "proven": False, "reason": str(refusal)}
    except Overdue:
        return {"model_type": model_type, "proven": False, "reason": f"takes longer than {SECONDS_EACH} s"}
    finally:
        signal.alarm(0)


class Overdue(BaseException):
    """No Exception, so that no experiment takes it for its own failure."""


def _stop(*_: object) -> None:
    raise Overdue


def table(results: dict[str, dict[str, Any]], transformers: str) -> str:
    """The README's part: which types fold, by what is free on K, and why the others do not."""
    proven, others = defaultdict(list), []
    for name, found in results.items():
        if found["proven"]:
            proven[found["key"]].append(name)
        else:
            others.append(f"| {name} | {_brief(found['reason'])} |")
    rows = [f"| {key} | {', '.join(names)} |" for key, names in sorted(proven.items(), key=lambda item: -len(item[1]))]
    number = sum(map(len, proven.values()))
    return "\n".join(
        [
            "`headfold probe` on every causal language model in transformers "
            f"{transformers} whose config counts K/V heads, on toy models of",
            f"the config that its class assumes: {number} of {len(results)} types fold under all laws. "
            "A checkpoint may differ from that (lfm2's have layers without",
            "attention), and is probed by its own config.",
            "",
            "| free on K | model types |",
            "| --- | --- |",
            *rows,
            "",
            f"<details><summary>The other {len(others)}, and why</summary>",
            "",
            "| model type | reason |",
            "| --- | --- |",
            *others,
            "",
            "</details>",
        ]
    )


def _brief(reason: str, most: int = 160) -> str:
    line = " ".join(reason.replace("|", "/").split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="MODEL_TYPE")
    names = parser.parse_args().types
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    signal.signal(signal.SIGALRM, _stop)
    results, started = {}, time.perf_counter()
    for name in names or model_types():
        results[name] = probed(name)
        print(name, results[name]["reason"] or results[name]["key"], flush=True)
    seconds = round(time.perf_counter() - started)
    number = sum(found["proven"] for found in results.values())
    print(f"{number} of {len(results)} proven in {seconds} s")
    if names:
        return
    versions = {name: version(name) for name in ("torch", "transformers")}
    facts = {"versions": versions, "seconds": seconds, "proven": number, "of": len(results), "types": results}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n")
    write_readme(table(results, versions["transformers"]))


def write_readme(text: str) -> None:
    """Put the table between its markers."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    assert rest, f"README.md has no {BEGIN}"
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
