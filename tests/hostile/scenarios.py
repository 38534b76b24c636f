"""What is corrupted and which command then reads it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from . import mutators
from .mutators import VALUES, Mutator
from .sources import COMPARED, EXPLORED, HEALED, ITEMS, NAMES, PAIRS, SMALL, TEXT, UNFINISHED

LIMIT = ("--text", "text.txt", "--limit", "128", "--context", "32")
SENTENCES = ("--calibration", "text.txt", *ITEMS)
IMAGES = ("--calibration", "images", *ITEMS)
CAPTIONS = ("--calibration", "captions.jsonl", *ITEMS)
SOUNDS = ("--calibration", "sounds", *ITEMS)
TRAIN = ("--steps", "2", "--batch", "2", "--context", "16")


@dataclass(frozen=True, slots=True)
class Scenario:
    """A command on copies of some sources, `out` being what it writes; `spoilt` is the file that is corrupted, by `mutate`; a star stands
    for any file of a directory."""

    words: tuple[str, ...]
    needs: tuple[str, ...]
    spoilt: str = ""
    mutate: Mutator = mutators.flipped
    out: str = ""

    @property
    def verb(self) -> str:
        return self.words[0]


_SHORT = {
    "FOLD": "fold llama out --kv-heads 2",
    "MADE": "calibrate t5 made.safetensors --items 8",
    "PLAN": "plan llama made.json --stats stats.safetensors",
    "TRAIN": f"out {' '.join(TRAIN)}",
    **{name: " ".join(words) for name, words in (
        ("UNFINISHED", UNFINISHED), ("TEXT", TEXT), ("PAIRS", PAIRS), ("LIMIT", LIMIT), ("SENTENCES", SENTENCES),
        ("IMAGES", IMAGES), ("SMALL", SMALL), ("CAPTIONS", CAPTIONS), ("SOUNDS", SOUNDS), ("HEALED", HEALED), ("COMPARED", COMPARED),
        ("EXPLORED", EXPLORED),
    )},
}  # fmt: skip
_TABLE = """
4 FOLD TEXT < llama
6 FOLD TEXT < llama/model.safetensors:numbers
2 FOLD TEXT < text.txt llama/generation_config.json
4 FOLD --merge mean --group contiguous --no-refit --no-verify < llama/config.json llama/model.safetensors
2 fold sharded out --kv-heads 1 --merge mean --group contiguous --no-refit < sharded
1 fold sharded out --kv-heads 1 TEXT < sharded
5 fold llama out --plan plan.json TEXT < plan.json
3 fold llama out --plan plan.json --stats stats.safetensors --no-refit < plan.json stats.safetensors
1 FOLD --group swap:unequal=true --layout padded TEXT < llama/config.json
1 FOLD --heal --heal-tokens 64 TEXT < llama/config.json llama/model.safetensors:numbers
1 fold gpt2 out --kv-heads 2 TEXT < gpt2 gpt2/model.safetensors:numbers
2 fold t5 out --kv-heads 2 PAIRS < t5 pairs.jsonl
1 fold bert out --kv-heads 2 SENTENCES < bert text.txt
1 fold vit out --kv-heads 2 IMAGES < vit vit/preprocessor_config.json images/3.png vit/model.safetensors:numbers
4 inspect llama < llama/config.json llama/model.safetensors
2 inspect llama < llama/model.safetensors:numbers
3 inspect t5 < t5/config.json
3 inspect vit < vit/config.json
3 inspect llama --stats stats.safetensors < stats.safetensors stats.safetensors:numbers
2 calibrate llama made.safetensors TEXT < text.txt llama/tokenizer.json llama/config.json
2 calibrate llama made.safetensors --calibration lines.jsonl SMALL < lines.jsonl
2 MADE --columns source,target --calibration pairs.jsonl < pairs.jsonl
2 MADE --columns source,target --calibration pairs.csv < pairs.csv
2 MADE --columns source,target --calibration pairs.parquet < pairs.parquet
1 MADE --calibration pairs.en,pairs.de < pairs.en pairs.de
1 MADE --calibration pairs.en.gz,pairs.de.gz < pairs.en.gz pairs.de.gz
1 calibrate vit made.safetensors IMAGES < images/0.png vit/preprocessor_config.json
3 PLAN --kv-heads 2 < stats.safetensors llama/config.json stats.safetensors:numbers
3 PLAN --kv-budget 40% --sensitivity sensitivity.json < sensitivity.json
1 eval folded LIMIT < folded text.txt
1 eval folded --reference llama LIMIT < folded/model.safetensors:numbers llama/config.json
2 export folded out --layout native < folded/config.json folded/plan.json folded/model.safetensors
1 export layered out --layout decilm < layered/config.json layered/plan.json
1 export layered out.gguf --layout gguf < layered/config.json layered/tokenizer.json layered/model.safetensors
1 route folded out --route kdgqa TEXT < folded/config.json folded/plan.json folded/model.safetensors
1 uptrain folded TRAIN --data text.txt < folded text.txt
1 uptrain folded TRAIN --data text.txt --distill llama < llama/config.json
1 uptrain folded-t5 TRAIN --data pairs.jsonl --columns source,target < folded-t5/config.json pairs.jsonl
4 uptrain folded trained UNFINISHED < trained.partial/**/*
4 fold llama healed HEALED < healed.partial/**/*
1 compare llama --kv-heads 2 --methods mean --out rows --limit 64 --text text.txt TEXT < llama/config.json llama/model.safetensors
1 frontier llama points --measure 0 --stats stats.safetensors --sensitivity sensitivity.json < sensitivity.json stats.safetensors
2 report folded --out page.html < folded/plan.json folded/README.md folded/config.json
1 report compared --out page.html < compared/compare.json
1 bench --shape llama --layers 1 --batch 1 --context 8 --new-tokens 2 --rounds 1 < llama/config.json
1 fold whisper out --kv-heads 2 SOUNDS < whisper whisper/preprocessor_config.json whisper/generation_config.json sounds/3.wav sounds/3.txt
1 fold clip out --kv-heads 2 CAPTIONS < clip clip/preprocessor_config.json captions.jsonl images/3.png clip/model.safetensors:numbers
1 calibrate whisper made.safetensors SOUNDS < sounds/0.wav whisper/preprocessor_config.json whisper/tokenizer.json
1 fold wordpiece out --kv-heads 2 SENTENCES < wordpiece/vocab.txt wordpiece/tokenizer_config.json wordpiece/config.json
1 calibrate wordpiece made.safetensors SENTENCES < wordpiece/vocab.txt wordpiece/tokenizer_config.json
1 inspect whisper < whisper/config.json
1 inspect clip < clip/config.json
3 detect llama < llama/config.json
1 detect gpt2 --out family.py < gpt2/config.json
3 check folded < folded/config.json folded/model.safetensors
1 check llama < llama/config.json
1 export folded out --layout ct2 < folded/config.json folded/tokenizer.json folded/generation_config.json folded/model.safetensors
1 export folded-t5 out --layout ct2 < folded-t5/config.json folded-t5/tokenizer.json folded-t5/model.safetensors
1 export folded-bert out --layout onnx < folded-bert/config.json folded-bert/model.safetensors
4 uptrain folded early UNFINISHED < early.partial/**/checkpoint-2/*.json
1 uptrain folded early UNFINISHED < early.partial/**/*
2 uptrain folded trained UNFINISHED < trained.partial/**/checkpoint-2/headfold-whole:json
4 compare llama --out compared COMPARED < compared/*.json
2 compare llama --out compared COMPARED < compared/**/*
4 frontier llama explored EXPLORED < explored/**/*.json explored/.headfold-unfinished:json
2 frontier llama explored EXPLORED < explored/**/*
"""
"""How often a command is drawn, the command, and the files that are corrupted for it, each with its way unless its name says it; a model
stands for the files that a fold reads of it, a star for those of an unfinished run. A command needs the sources that it names."""
_WAYS: dict[str, Mutator] = {
    "json": mutators.json_file, "safetensors": mutators.header, "jsonl": mutators.lines, "md": mutators.card, "txt": mutators.text,
    "csv": mutators.text, "en": mutators.text, "de": mutators.text, "gz": mutators.packed, "parquet": mutators.packed,
    "png": mutators.packed, "wav": mutators.packed, "numbers": mutators.numbers, "*": mutators.planted,
}  # fmt: skip
_OUTPUTS = (
    "out", "made.safetensors", "made.json", "out.gguf", "rows", "points", "trained", "healed", "early", "compared", "explored", "family.py",
    "page.html",
)  # fmt: skip


def _all() -> Iterator[Scenario]:
    for line in _TABLE.strip().splitlines():
        command, _, files = line.partition(" < ")
        times, *words = " ".join(_SHORT.get(word, word) for word in command.split(" ")).split(" ")
        out = next((word for word in words if word in _OUTPUTS), "")
        named = [part for word in words for part in word.split(",")]
        named += ["images"] if "captions.jsonl" in named else []
        needs = tuple(sorted({part for part in [*named, f"{out}.partial"] if part in NAMES}))
        for file in (file for name in files.split(" ") for file in _files(name)):
            name, _, way = file.partition(":")
            mutate = _WAYS[way or ("*" if name.endswith("*") else name.rpartition(".")[2])]
            yield from [Scenario(tuple(words), needs, name, mutate, out)] * int(times)


def _files(name: str) -> list[str]:
    """Return the files of a model that `fold` reads, or a file alone."""
    if "/" in name or "." in name:
        return [name]
    files = ["config.json", "README.md"]
    if name != "vit":
        files += ["tokenizer.json", "tokenizer_config.json"]
    if name == "sharded":
        one, two, three = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
        files += ["model.safetensors.index.json", one, f"{two}:numbers", three]
    else:
        files += ["model.safetensors"]
    return [f"{name}/{file}" for file in files]


SCENARIOS = tuple(_all())
WORDS: tuple[Scenario, ...] = tuple({scenario.words: scenario for scenario in SCENARIOS}.values())
"""One scenario for each command, whose options are corrupted instead of a file."""
_OTHERS = (
    "--kv-heads", "--plan", "--group", "--merge", "--heal", "--heal-by", "--seed", "--calibration", "--tokens", "--items", "--columns",
    "--context", "--stats", "--device", "--dtype", "--layout", "--no-verify", "--head-dim-multiple", "--encoder", "--kv-budget", "--text",
    "--allowed", "--tp", "--route", "--sensitivity", "--force", "--limit", "--data", "--distill", "--wgqa", "--learning-rate", "--nothing",
)  # fmt: skip

_BOUNDS = {
    "--tokens",
    "--items",
    "--limit",
    "--steps",
    "--batch",
    "--heal-tokens",
    "--new-tokens",
    "--rounds",
    "--layers",
}


def options(words: Sequence[str], random: Random) -> tuple[str, tuple[str, ...]]:
    """Return other words: an option's value replaced, an option removed, added or doubled, or an argument replaced."""
    values = [
        *(str(value).encode("utf-8", "replace").decode() for value in VALUES if value != "\x00"),
        "hub:",
        "hub:../../x",
        "/dev/null",
        ".",
        "mean:x=1",
        "1/3",
        "50%",
    ]
    changed = list(words)
    # Without a bound, or with a large one, honest work takes long.
    at = random.choice([n for n in range(1, len(words)) if not _BOUNDS & {words[n], words[n - 1]}])
    kind = random.choice(("value", "value", "removed", "added", "doubled"))
    if kind == "value":
        name, changed[at] = changed[at], random.choice(values)
        return f"{kind} for {name}", tuple(changed)
    if kind == "removed":
        return f"{kind} {changed.pop(at)}", tuple(changed)
    if kind == "doubled":
        return f"{kind} {changed[at]}", (*changed, changed[at])
    name = random.choice(_OTHERS)
    return f"{kind} {name}", (*changed, name, random.choice(values))
