"""The command line that makes a fold again, for its card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def command_of(asked: Mapping[str, Any], source: str, out: str) -> str:
    """What makes a fold again: `asked` are the settings of `recipe.fold` as its job keeps them; a directory goes by its last name."""
    words = ["headfold fold", Path(source).name if Path(source).exists() else source, out]
    if asked["plan"]:
        words += ["--plan plan.json"]
    else:
        wide = [f"--head-dim-multiple {asked['head_dim_multiple']}"] if asked["head_dim_multiple"] > 1 else []
        words += [
            f"--kv-heads {asked['kv_heads']}",
            *wide,
            f"--group {asked['group']}",
            f"--merge {asked['merge']}",
        ]
    words += ["--refit" if asked["refit"] else "--no-refit"]
    words += [f"--heal --heal-tokens {asked['heal']}"] if asked["heal"] else []
    words += _data_words(asked["data"]) if asked["data"] else []
    words += ["--encoder"] if asked["encoder"] else []
    words += ["--stats stats.safetensors"] if asked["stats"] else []
    words += [f"--layout {asked['layout']}"] if asked["layout"] else []
    words += [f"--seed {asked['seed']}"]
    return " ".join(words)


def _data_words(data: Mapping[str, Any]) -> list[str]:
    amount = f"--tokens {data['tokens']}" if data["kind"] == "text" else f"--items {data['items']}"
    words = [f"--calibration {data['source']}", amount]
    words += [f"--columns {','.join(data['columns'])}"] if data["columns"] else []
    return words + ([f"--context {data['context']}"] if data["context"] else [])
