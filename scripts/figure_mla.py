"""The tables of folds to multi-head latent attention: beside every other layout of as large a cache, and in engines."""

from fractions import Fraction

from figure_data import load
from figure_tables import Block, number, table

TITLES = {"vllm": "vLLM on a CPU, its kernel of rotary frequencies off", "llama-cpp": "llama.cpp"}
MODELS = {"pylib-llama": "pylib-llama"}
ROWS = {
    "mla": "**MLA**",
    "mla without refit": "MLA, no refit",
    "grouped heads": "grouped heads (default)",
    "twice the head_dim": "head_dim × 2",
    "groups of different sizes": "groups of different sizes",
    "TransMLA": "TransMLA",
    "CARE": "CARE",
    "MHA2MLA": "MHA2MLA",
}


def latent() -> str:
    """Loss increase by layout; a column per model and share of the cache."""
    found = {
        (model, row["share"], row["row"]): row["loss_increase"]
        for model in MODELS
        for row in load(f"{model}-mla")["rows"]
    }
    columns = sorted({key[:2] for key in found}, key=lambda each: ([*MODELS].index(each[0]), -Fraction(each[1])))
    names = [row for row in ROWS if any((*column, row) in found for column in columns)]
    lines = [
        [ROWS[name], *(number(found[*column, name]) if (*column, name) in found else "–" for column in columns)]
        for name in names
    ]
    return table(["layout", *(f"{MODELS[model]}, {share} of the cache" for model, share in columns)], lines)


def engines() -> str:
    """What engines compute of a fold, beside transformers."""
    found = load("mla-engines")
    lines = [
        [
            TITLES[name],
            f"{row['num_same_greedy']} of {row['num_greedy']}",
            f"{row['kl']:.0e}",
            f"{row['kv_bytes_per_token']:,.0f} bytes",
        ]
        for name, row in found["engines"].items()
    ]
    lines.append(["latent and rotary key", "", "", f"{found['fold']['kv_bytes_per_token']:,} bytes"])
    return table(
        ["engine", "greedy tokens of transformers", "KL from transformers, nats per token", "cache per token"], lines
    )


LATENT = {
    "mla": Block(latent, tuple(f"{model}-mla" for model in MODELS)),
    "mla-engines": Block(engines, ("mla-engines",)),
}
