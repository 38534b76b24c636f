"""The table of folds in the engines that serve them, measured by benchmarks/engines.py."""

from typing import Any

from figure_data import load
from figure_tables import Block, number, table

ENGINES = {
    "llama_cpp": "llama.cpp", "transformers": "transformers", "mlx": "mlx-lm", "vllm": "vLLM", "openvino": "OpenVINO",
    "onnxruntime_genai": "onnxruntime-genai", "onnxruntime": "onnxruntime", "ctranslate2": "CTranslate2", "mistralrs": "mistral.rs",
}  # fmt: skip
"""Driver → the name of its engine."""
READS = {
    "llama_cpp": "by export", "onnxruntime": "by export", "ctranslate2": "by export", "gguf": "by export",
    "headfold": "headfold's script",
}  # fmt: skip
"""Driver, or the end of its name, → what it reads; others read the checkpoint, by their own reader or builder."""
NEAR, SOME = 1e-6, 64
"""The divergence and the number of greedy tokens of an engine that computes the same; llama.cpp takes GELU from a table in float16."""


def _cell(row: dict[str, Any] | None) -> str:
    """Return what a cell says: the divergence where the engine computes the same, else what it does."""
    if row is None:
        return ""
    if "refused" in row:
        return "refused"
    if row["kl"] < NEAR and row["same_greedy"] == SOME:
        return f"✓ {row['kl']:.0e}"
    return f"**wrong** (KL {row['kl']:.0e}, {row['same_greedy']} of {SOME})"


def engines() -> str:
    """One row per engine, one column per fold."""
    return _matrix(load("engines-pylib-llama")["rows"])


def toys() -> str:
    """One row per engine, one column per random model."""
    return _matrix(load("engines-toys")["rows"])


def _called(name: str, found: dict[str, Any]) -> str:
    version = next((row[name]["version"] for row in found.values() if "version" in row.get(name, {})), "")
    return f"{ENGINES[name.partition('-')[0]]} {version}".strip()


def _matrix(found: dict[str, Any]) -> str:
    names = sorted(
        {name for row in found.values() for name in row}, key=lambda name: (_called(name, found).lower(), name)
    )
    lines = [
        [
            _called(name, found), READS.get(name) or READS.get(name.partition("-")[2], "the checkpoint"),
            *(_cell(row.get(name)) for row in found.values()),
        ]
        for name in names
    ]  # fmt: skip
    return table(["engine", "reads", *found], lines)


def quantised() -> str:
    """One row per model and number type."""
    header = ["model", "numbers", "file", "KL", "perplexity"]
    lines = [
        [
            QUANTISED_NAMES[row["model"]],
            row["numbers"],
            f"{row['bytes'] / 1e6:.1f} MB",
            f"{row['kl']:.1e}",
            number(row["perplexity"]),
        ]
        for result in QUANTISED
        for row in load(result)["rows"]
    ]
    return table(header, lines)


def speed() -> str:
    """One row per engine and fold, one column per depth: tokens a second, and how many times those of the original."""
    found = load("engine_speed")["rows"]
    depths = list(found[0]["seconds_at"])
    originals = {row["engine"]: row["seconds_at"] for row in found if row["fold"] == "original"}
    lines = []
    for row in found:
        cells = []
        for depth in depths:
            taken, before = row["seconds_at"].get(depth), originals[row["engine"]].get(depth)
            times = "" if taken is None or row["fold"] == "original" else f" ({before / taken:.2f} ×)"
            cells.append("" if taken is None else f"{1 / taken:.1f}{times}")
        lines.append([ENGINES[row["engine"].replace("-", "_")], row["fold"], *cells])
    return table(["engine", "fold", *(f"{int(depth):,} tokens before" for depth in depths)], lines)


def formats() -> str:
    """One row per model and number of K/V heads, one column per layout."""
    found = load("formats")["rows"]
    layouts = {row["layout"]: f"{ENGINES[FORMATS[row['layout']]]} {row['version']}, `{row['layout']}`" for row in found}
    cells = {(row["model"], row["kv_heads"], row["layout"]): _format_cell(row) for row in found}
    lines = [
        [FORMAT_NAMES[model], {"1/2": "half of the K/V heads", "1": "one K/V head"}[count], *(cells[model, count, one] for one in layouts)]
        for model, count in dict.fromkeys((row["model"], row["kv_heads"]) for row in found)
    ]  # fmt: skip
    return table(["model", "folded to", *layouts.values()], lines)


def _format_cell(row: dict[str, Any]) -> str:
    return "refused" if "refused" in row else f"✓ {row['difference']:.0e}"


FORMATS = {"ct2": "ctranslate2", "onnx": "onnxruntime"}
FORMAT_NAMES = {
    "multi30k-t5": "T5", "whisper-tiny.en": "whisper-tiny.en", "cifar10-vit": "ViT", "all-minilm-l6-v2": "all-MiniLM-L6-v2",
}  # fmt: skip


def choices() -> str:
    """One row per part that q4_0 rounds, one column per free choice; a cell has the divergence of each model."""
    found = [load(result)["rows"] for result in CHOICES]
    columns = list(dict.fromkeys(row["choice"] for rows in found for row in rows))
    lines = []
    for case, said in CHOICE_NAMES.items():
        kls = [{row["choice"]: row["kl"] for row in rows if _case(row) == case} for rows in found]
        cells = [" / ".join(f"{by[column]:.1e}" if column in by else "–" for by in kls) for column in columns]
        lines.append([said, *("" if set(cell) <= {"–", " ", "/"} else cell for cell in cells)])
    return table(["in q4_0", *columns], lines)


def _case(row: dict[str, Any]) -> tuple[str, str, bool]:
    return row["numbers"], row["part"], row.get("rotated_by_engine", False)


CHOICES = ("quantised-choices-native", "quantised-choices-smollm2-unequal-healed")
CHOICE_NAMES = {
    ("f16", "", False): "a file of type f16 instead",
    ("q4_0", "", False): "a file of type q4_0",
    ("q4_0-pure", "", False): "a file of type q4_0-pure",
    **{("f32", role, False): f"{role.upper()} alone" for role in "qkvo"},
    ("f32", "q4_0/f16", False): "keys in the cache, not rotated",
    ("f32", "q4_0/f16", True): "keys in the cache, rotated by llama.cpp",
    ("f32", "f16/q4_0", False): "values in the cache, not rotated",
    ("f32", "f16/q4_0", True): "values in the cache, rotated by llama.cpp",
}
"""Numbers of the file, the part that alone is in q4_0, whether llama.cpp rotates it → as the table calls it."""


QUANTISED_NAMES = {
    "pylib-llama": "small Llama",
    "native": "fold of it to 2 of 8 K/V heads",
    "twice-the-head_dim": "the same cache as one head of twice the head_dim",
    "smollm2-135m-instruct": "SmolLM2-135M-Instruct",
    "smollm2-default": "default fold of it to 1 of 3 K/V heads",
    "smollm2-per-layer": "fold of it to 3 and 1 K/V heads in turns, without refit",
    "smollm2-unequal-healed": "fold of it to 2 of 3 K/V heads, groups of different sizes, healed",
}
"""Directory of a measurement → as the table calls it."""
QUANTISED = ("quantised-pylib-llama", "quantised-smollm2", "quantised-smollm2-default", "quantised-smollm2-per-layer")
ENGINE_BLOCKS = {
    "engines": Block(engines, ("engines-pylib-llama",)),
    "engines-toys": Block(toys, ("engines-toys",)),
    "formats": Block(formats, ("formats",)),
    "engine-speed": Block(speed, ("engine_speed",)),
    "quantised": Block(quantised, QUANTISED),
    "quantised-choices": Block(choices, CHOICES),
}
