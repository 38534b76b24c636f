"""A fuzz of the parsers alone, in this process: what reads a file from outside may raise `UserError` and nothing else.

Where atheris is installed (`pip install atheris`), inputs are chosen by the lines of headfold that they reach; without it they are drawn
from the seed, a few of the corruptions of `mutators` on top of each other.
"""

import base64
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from random import Random
from types import FunctionType, ModuleType
from typing import Any

import headfold
from headfold.core.errors import UserError

from . import mutators, page_readings, readings
from .judging import last_frame
from .models import VOCABULARY, shard, write_model, write_parts_of_words
from .mutators import Mutator
from .sources import write_data

LIMIT_SECONDS = 10.0
"""Of one input, most of which take less than a millisecond."""
LIMIT_BYTES = 6 * 2**30
_STACKED = (1, 1, 2, 4)
"""How many corruptions are put on top of each other."""
_LONGEST = 4000
"""Bytes of an input that a report keeps."""


@dataclass(frozen=True, slots=True)
class Parser:
    """`read` reads what lies in a folder, in which `spoilt` is a file that is corrupted by `mutate`."""

    name: str
    spoilt: str
    mutate: Mutator
    read: Callable[[Path], object]


PARSERS = (
    Parser("json", "llama/config.json", mutators.json_file, readings.json_value),
    Parser("config", "llama/config.json", mutators.json_file, readings.config),
    *(Parser(f"source {name}", f"{name}/config.json", mutators.json_file, readings.source(name)) for name in readings.MODELS),
    Parser("header", "llama/model.safetensors", mutators.header, readings.header),
    Parser("index", "sharded/model.safetensors.index.json", mutators.json_file, readings.index),
    Parser("plan", "plan.json", mutators.json_file, readings.plan),
    Parser("statistics", "stats.safetensors", mutators.header, readings.statistics),
    Parser("sums", "stats.safetensors", mutators.numbers, readings.statistics),
    Parser("sensitivities", "sensitivity.json", mutators.json_file, readings.sensitivities),
    Parser("card", "llama/README.md", mutators.card, readings.card),
    Parser("tokens", "llama/tokenizer.json", mutators.json_file, readings.tokens("llama", VOCABULARY)),
    Parser("words", "bert/tokenizer.json", mutators.json_file, readings.tokens("bert", VOCABULARY)),
    Parser("special tokens", "llama/tokenizer_config.json", mutators.json_file, readings.tokens("llama", VOCABULARY)),
    Parser("ids", "llama/tokenizer.json", mutators.json_file, readings.ids),
    Parser("modules", "encoder/modules.json", mutators.json_file, readings.pooling),
    Parser("pooling", "encoder/1_Pooling/config.json", mutators.json_file, readings.pooling),
    Parser("rows", "pairs.jsonl", mutators.lines, readings.rows),
    Parser("table", "pairs.parquet", mutators.packed, readings.table),
    Parser("parallel texts", "pairs.en.gz", mutators.packed, readings.parallel),
    Parser("sound", "sounds/3.wav", mutators.packed, readings.sound),
    *(Parser(f"result {name}", f"{name}.json", mutators.json_file, page_readings.result(name)) for name in page_readings.RESULTS),
    Parser("methods", "methods/compare.json", mutators.json_file, page_readings.methods),
    Parser("front", "front/frontier.json", mutators.json_file, page_readings.front),
    Parser("page of a plan", "plan.json", mutators.json_file, page_readings.plan),
    Parser("page of a card", "card/README.md", mutators.card, page_readings.card),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Escaped:
    """What left a parser that was no `UserError`: after which corruption, and the input, in base64, if it is short."""

    parser: str
    what: str
    wrong: str
    input: str


def write_whole(root: Path) -> None:
    """Write the whole files, by headfold's own functions where it writes them."""
    root.mkdir(parents=True)
    write_data(root)
    for name in readings.MODELS:
        write_model(root, name)
    shard(root / "llama", root / "sharded")
    stats, plan = root / "stats.safetensors", root / "plan.json"
    headfold.calibrate(root / "llama", stats, calibration=str(root / "text.txt"), tokens=256, context=32)
    headfold.plan(root / "llama", plan, kv_heads=2, stats=stats)
    readings.write_sensitivities_of(root)
    write_parts_of_words(root / "bert")
    readings.write_encoder(root / "encoder")
    page_readings.write_pages(root)


def fuzz(
    root: Path, work: Path, seconds: float, seed: int, run: "Run", tried: Sequence[Parser] = PARSERS
) -> tuple[int, list[Escaped]]:
    """Let every parser be tried by `run` for its share of the time on files of `root`; return the number of inputs and what was found."""
    count, found = 0, list[Escaped]()
    for parser in tried:
        trial = Trial(parser, root, work / parser.name.replace(" ", "-"), seed)
        run(trial, seconds / len(tried))
        count += trial.count
        found += trial.found.values()
        shutil.rmtree(trial.folder)
    return count, found


class Trial:
    """One parser on a copy of its files."""

    def __init__(self, parser: Parser, root: Path, folder: Path, seed: int) -> None:
        self.parser, self.folder, self.random = parser, folder, Random(f"{seed}/{parser.name}")
        self.count, self.found = 0, dict[str, Escaped]()
        self.report: Path | None = None
        folder.mkdir(parents=True)
        for name in {entry.name for entry in root.iterdir()}:
            whole = root / name
            (folder / name).symlink_to(whole) if whole.is_file() else shutil.copytree(whole, folder / name)
        self.file = folder / parser.spoilt
        self.whole = self.file.read_bytes()
        self.file.unlink()  # a link would be written through

    def corrupted(self, data: bytes) -> tuple[str, bytes]:
        """Return other bytes, and what was done."""
        names = []
        for _ in range(self.random.choice(_STACKED)):
            mutate = self.random.choice((self.parser.mutate, self.parser.mutate, mutators.flipped))
            try:
                name, changed = mutate(data, self.random)
            except Exception:  # noqa: BLE001 - what is corrupted already may be nothing that `mutate` can read
                name, changed = mutators.flipped(data, self.random)
            assert isinstance(changed, bytes)
            data = changed
            names.append(name)
        return ", ".join(names), data

    def run(self, what: str, data: bytes) -> None:
        """Let the parser read these bytes."""
        self.count += 1
        if self.count % 256 == 1:
            self.tell()
        self.file.write_bytes(data)
        try:
            with redirect_stdout(StringIO()):
                self.parser.read(self.folder)
        except UserError as error:
            if len(str(error).splitlines()) > 1:
                self._escaped(what, data, "a line break in a message")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # noqa: BLE001 - panics of tokenizers are no Exception
            self._escaped(what, data, last_frame(traceback.format_exc()))

    def _escaped(self, what: str, data: bytes, wrong: str) -> None:
        if wrong not in self.found:
            kept = base64.b64encode(data).decode() if len(data) <= _LONGEST else ""
            what = what.encode("utf-8", "backslashreplace").decode()
            self.found[wrong] = Escaped(self.parser.name, what, wrong, kept)
            self.tell()

    def tell(self) -> None:
        """Write what was found to the report, if this is a child that has one."""
        if self.report is not None:
            found = [asdict(one) for one in self.found.values()]
            self.report.write_text(json.dumps({"count": self.count, "found": found}))


Run = Callable[[Trial, float], None]
"""Tries a parser for so many seconds."""


def at_random(trial: Trial, seconds: float) -> None:
    def hang(*_: object) -> None:
        raise TimeoutError

    before, ends = signal.signal(signal.SIGALRM, hang), time.monotonic() + seconds
    what, data = "nothing", trial.whole
    while not trial.count or time.monotonic() < ends:
        signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
        trial.run(what, data)
        signal.setitimer(signal.ITIMER_REAL, 0)
        what, data = trial.corrupted(trial.whole)
    signal.signal(signal.SIGALRM, before)


def _in_a_child(trial: Trial, seconds: float, run: Callable[[Trial, float], None]) -> None:
    """Let a child run the trial, which leaves the number of its inputs and its findings in a file; a crash or a hang is a finding too."""
    report = trial.folder.with_suffix(".jsonl")
    pid = os.fork()
    if pid == 0:
        trial.report = report
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = 1
        try:
            run(trial, seconds)
            code = 0
        except BaseException:  # noqa: BLE001 - a forked process must end here
            traceback.print_exc()
        finally:
            trial.tell()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if report.exists():
        told = json.loads(report.read_text())
        trial.count, trial.found = told["count"], {one["wrong"]: Escaped(**one) for one in told["found"]}
    if code := os.waitstatus_to_exitcode(status):
        trial._escaped("", trial.file.read_bytes(), f"the process ended with {code}")


def _by_coverage(trial: Trial, seconds: float) -> None:
    """Run atheris, which ends the process."""
    import atheris

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + LIMIT_BYTES, taken + LIMIT_BYTES))
    for function in _functions_of_parsers():
        atheris.instrument_func(function)
    seeds = trial.folder.with_suffix(".seeds")
    seeds.mkdir()
    (seeds / "whole").write_bytes(trial.whole)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        trial.random.seed(seed)
        if trial.random.random() < 0.5:
            return atheris.Mutate(data, most)  # type: ignore[no-any-return]
        return trial.corrupted(data)[1][:most]

    words = [
        sys.argv[0], f"-max_total_time={max(1, round(seconds))}", f"-timeout={LIMIT_SECONDS:g}", "-rss_limit_mb=0", "-print_final_stats=0",
        f"-seed={trial.random.randrange(1, 2**31)}", f"-max_len={2 * len(trial.whole) + 1000}", "-verbosity=0", str(seeds),
    ]  # fmt: skip
    os.chdir(seeds.parent)  # where libFuzzer leaves what hangs
    atheris.Setup(words, partial(trial.run, ""), custom_mutator=mutate)
    atheris.Fuzz()


def _functions_of_parsers() -> Iterator[FunctionType]:
    """Yield the functions of headfold's modules that read files, methods among them."""
    for name in readings.MODULES:
        module = importlib.import_module(f"headfold.{name}")
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__:
                yield from filter(None, (_function(one, module) for one in vars(value).values()))
            elif (function := _function(value, module)) is not None:
                yield function


def _function(value: object, module: ModuleType) -> FunctionType | None:
    """Return the function that a name of a module stands for, if it is the module's own."""
    found = getattr(value, "__func__", value)
    found = getattr(found, "__wrapped__", found)
    return found if isinstance(found, FunctionType) and found.__module__ == module.__name__ else None


def main(root: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Fuzz for so many minutes and return the report."""
    guided = find_spec("atheris") is not None
    write_whole(root / "whole")
    run = partial(_in_a_child, run=_by_coverage if guided else at_random)
    count, found = fuzz(root / "whole", root / "trials", 60 * minutes, seed, run)
    return {"seed": seed, "by_coverage": guided, "inputs": count, "findings": [asdict(one) for one in found]}
