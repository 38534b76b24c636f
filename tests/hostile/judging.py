"""What a command may leave behind: one line for an error, whole outputs or none, everything else as it was."""

import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .running import Outcome

State = Mapping[str, tuple[int, int, int]]
PLANTED = Path("/tmp/headfold-owned")
"""What a card would write if its tags were obeyed."""
GROWING = {"rows", "points", "compared", "explored"}
"""Outputs that are filled where they lie: a command that is interrupted leaves what it has measured."""
_TIMES = re.compile(r"(.*_)?seconds(_.*)?|.*_per_second|peak_bytes|resumed_at|estimated.*")
"""Fields of JSON files that tell of a run rather than of its result."""
_DIGEST = re.compile("[0-9a-f]{64}")
"""It depends on the order of a header too, which does not matter."""
_LEFT = re.compile("left there|is kept in")


def state_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return size, time and mode of every file below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (
            (0, 0, status.st_mode) if path.is_dir() else (status.st_size, status.st_mtime_ns, status.st_mode)
        )
    return found


def finding(outcome: Outcome, before: State, after: State, out: str, named: Sequence[str] = ()) -> str:
    """Return what is wrong with how a command ended; an empty text if nothing is. It may write files that it is told to by name."""
    if outcome.hung:
        return f"hang {last_frame(outcome.err)}"
    if outcome.code < 0:
        return f"signal {-outcome.code}"
    if "Traceback (most recent call last)" in outcome.err:
        return f"traceback {last_frame(outcome.err)}"
    if outcome.code not in (0, 2):
        return f"exit code {outcome.code}"
    if PLANTED.exists():
        return "code of the input was run"
    return _of_files(outcome, before, after, out, named) or (
        _of_refusal(outcome, named) if outcome.code else _of_success(outcome, after, out)
    )


def _of_files(outcome: Outcome, before: State, after: State, out: str, named: Sequence[str]) -> str:
    unfinished = f"{out}.partial"  # may lie there before, and is then the command's own
    changed = [
        name
        for name in before
        if after.get(name) != before[name] and not _within(name, out) and not _within(name, unfinished)
    ]
    if outcome.code == 0:  # what is missing in a file of sensitivities is measured and added
        changed = [name for name in changed if not name.endswith("sensitivity.json")]
    if changed:
        return f"changed {changed[0]}"
    new = [name for name in after if name not in before and not _within(name, out) and not out.startswith(f"{name}/")]
    if unfinished in before and unfinished in after:
        new = [name for name in new if not _within(name, unfinished)]
    if outcome.code == 0:
        told = [*named, *(str(parent) for word in named for parent in Path(word).parents)]
        new = [name for name in new if not name.endswith("sensitivity.json") and name not in told]
    if outcome.code and out not in GROWING:
        for name in {*before, *after}:
            if _within(name, out) and before.get(name) != after.get(name):
                return f"refused, but wrote {name}"
    left = [name for name in new if not (name.startswith(f"{out}.partial") and out and _LEFT.search(outcome.err))]
    return f"left {left[0]}" if left else ""


def _of_refusal(outcome: Outcome, named: Sequence[str]) -> str:
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    if len(lines) != 1:
        return f"{len(lines)} lines"
    if not lines[0].startswith("headfold"):
        return "line of another"
    # What the user wrote may be quoted, however long it is.
    return "long line" if len(lines[0]) > 1000 + 2 * max(map(len, named), default=0) else ""


def _of_success(outcome: Outcome, after: State, out: str) -> str:
    if out and out not in after:
        return "no output"
    try:
        json.loads(outcome.out, parse_constant=_refuse)
    except ValueError:
        return "no JSON value"
    return ""


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def essence(place: Path) -> Any:
    """Return what an output says: tensors by their bytes and JSON without what tells of the run."""
    if place.is_dir():
        return {
            str(path.relative_to(place)): essence(path)
            for path in sorted(place.rglob("*"))
            if path.is_file() and path.name != "README.md"
        }
    data = place.read_bytes()
    if place.suffix == ".safetensors":
        return _tensors(data)
    if place.suffix == ".json":
        return _without_times(json.loads(data))
    if place.suffix == ".yaml":
        return _without_times(yaml.safe_load(data))
    if place.suffix == ".html":
        return "a page"  # it quotes the card and times; its other figures are those of the files beside it
    return _gguf(place) if place.suffix == ".gguf" else hashlib.sha256(data).hexdigest()


def _gguf(place: Path) -> dict[str, str]:
    """Return fields and tensors by their names; the tensors lie in the order of the fold's header."""
    from gguf import GGUFReader

    reader = GGUFReader(place)
    fields = {name: b"".join(bytes(part) for part in field.parts[2:]) for name, field in reader.fields.items()}
    tensors = {tensor.name: bytes(tensor.data) for tensor in reader.tensors}
    return {name: hashlib.sha256(data).hexdigest() for name, data in (fields | tensors).items()}


def _tensors(data: bytes) -> dict[str, str]:
    length = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + length])
    entries.pop("__metadata__", None)
    rest = data[8 + length :]
    return {
        name: f"{entry['dtype']} {entry['shape']} {hashlib.sha256(rest[slice(*entry['data_offsets'])]).hexdigest()}"
        for name, entry in entries.items()
    }


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if not _TIMES.fullmatch(key)}
    if isinstance(value, list):
        return [_without_times(item) for item in value]
    return "a digest" if isinstance(value, str) and _DIGEST.fullmatch(value) else value


def _within(name: str, out: str) -> bool:
    return bool(out) and (name == out or name.startswith(f"{out}/"))


def last_frame(err: str) -> str:
    """Return where and with what a traceback ends, so that equal ones are counted together."""
    frames = re.findall(r'File "[^"]*/(headfold/[^"]+)", line (\d+)', err)
    if "most recent call first" in err:
        frames = frames[::-1]
    where = "{}:{}".format(*frames[-1]) if frames else "outside"
    said = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Warning|Iteration)\b.*", err, re.MULTILINE)
    return f"{where} {said[-1][:120] if said else ''}"
