"""Run headfold detect on every language model of transformers whose config counts K/V heads.

    .venv/bin/python scripts/detect_all.py             # all types → benchmarks/results/detect.json
    .venv/bin/python scripts/detect_all.py qwen3 phi   # these alone, printed

`make figures` writes the tables of docs/families.md from the results.
"""

import argparse
import json
import os
import signal
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "detect.json"
SECONDS_EACH = 60
"""A type that takes longer is stopped; on an idle core all take less than ten."""
COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv")


def model_types() -> list[str]:
    """Return the types of causal language models whose config has a count of K/V heads, in order."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    return [name for name in sorted(CAUSAL) if _counts(CONFIG_MAPPING[name])]


def _counts(config_class: Any) -> bool:
    if any(name in getattr(config_class, "__dataclass_fields__", {}) for name in COUNTS):
        return True
    try:
        return any(name in config_class().to_dict() for name in COUNTS)
    except Exception:  # a class without defaults has its fields above
        return False


def detected(model_type: str) -> dict[str, Any]:
    """Return what is detected of one type, or why nothing is."""
    import headfold
    from headfold.core.errors import UserError

    signal.alarm(SECONDS_EACH)
    try:
        found = headfold.detect(model_type)
        return {**found.to_json(), "key": found.position}
    except UserError as refusal:
        return {"model_type": model_type, "proven": False, "reason": str(refusal)}
    except Overdue:
        return {"model_type": model_type, "proven": False, "reason": f"takes longer than {SECONDS_EACH} s"}
    finally:
        signal.alarm(0)


class Overdue(BaseException):
    """The time is up. Not an Exception, so that no experiment takes it for its own failure."""


def _stop(*_: object) -> None:
    raise Overdue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="MODEL_TYPE")
    names = parser.parse_args().types
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    signal.signal(signal.SIGALRM, _stop)
    results, started = {}, time.perf_counter()
    for name in names or model_types():
        results[name] = detected(name)
        print(name, results[name]["reason"] or results[name]["key"], flush=True)
    seconds = round(time.perf_counter() - started)
    number = sum(found["proven"] for found in results.values())
    print(f"{number} of {len(results)} proven in {seconds} s")
    if names:
        return
    versions = {name: version(name) for name in ("torch", "transformers")}
    facts = {"versions": versions, "seconds": seconds, "proven": number, "of": len(results), "types": results}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n")
    print("make figures writes the tables of docs/families.md from it")


if __name__ == "__main__":
    main()
