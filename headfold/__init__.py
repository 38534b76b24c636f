"""headfold: fold a checkpoint's key/value heads. Same model, smaller KV cache.

The public functions are those of the command line: `fold`, `uptrain`, `calibrate`, `plan`, `inspect`, `eval`, `frontier`, `compare`,
`bench`, and `load`, which opens what `fold` wrote. Nothing heavy is imported before one of them is asked for. With this package imported,
any transformers model may be opened with `attn_implementation="headfold"`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .runtime.registration import register_attention

if TYPE_CHECKING:
    from .recipe import calibrate, fold, inspect, plan
    from .recipe import evaluate as eval
    from .recipe.benching import bench
    from .recipe.comparing import compare
    from .recipe.frontier import frontier
    from .recipe.uptraining import uptrain
    from .runtime.load import load

    __version__: str

_HOMES = {
    "fold": ("recipe", "fold"),
    "calibrate": ("recipe", "calibrate"),
    "plan": ("recipe", "plan"),
    "inspect": ("recipe", "inspect"),
    "eval": ("recipe", "evaluate"),
    "bench": ("recipe.benching", "bench"),
    "frontier": ("recipe.frontier", "frontier"),
    "compare": ("recipe.comparing", "compare"),
    "uptrain": ("recipe.uptraining", "uptrain"),
    "load": ("runtime.load", "load"),
}
"""Public name → module and name there. A public name must not be that of a submodule, which would take its place."""

__all__ = [
    "__version__",
    "bench",
    "calibrate",
    "compare",
    "eval",
    "fold",
    "frontier",
    "inspect",
    "load",
    "plan",
    "uptrain",
]


register_attention()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("headfold")
    if name in _HOMES:
        module, attribute = _HOMES[name]
        return getattr(import_module(f"{__name__}.{module}"), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
