"""headfold: fold a checkpoint's key/value heads. The same model with a smaller KV cache.

The public functions are the verbs of the command line, under the same names and with the same words: `fold`, `run`, `calibrate`, `plan`,
`inspect`, `eval`, `export`, `check`, `route`, `uptrain`, `compare`, `frontier`, `bench`, `report`, `detect`, `methods`, `demo`; and `load`,
which opens what `fold` wrote. Importing the package loads nothing heavy. It does one thing: transformers models may then be opened with
`attn_implementation="headfold"`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .runtime.registration import register_attention

if TYPE_CHECKING:
    from .runtime.load import load
    from .verbs.bench import bench
    from .verbs.calibrate import calibrate
    from .verbs.check import check
    from .verbs.compare import compare
    from .verbs.demo import demo
    from .verbs.detect import detect
    from .verbs.evaluate import evaluate as eval
    from .verbs.export import export
    from .verbs.fold import fold
    from .verbs.frontier import frontier
    from .verbs.inspect import inspect
    from .verbs.methods import methods
    from .verbs.plan import plan
    from .verbs.report import report
    from .verbs.route import route
    from .verbs.run import run
    from .verbs.uptrain import uptrain

    __version__: str

_VERBS = (
    "bench",
    "calibrate",
    "check",
    "compare",
    "demo",
    "detect",
    "export",
    "fold",
    "frontier",
    "inspect",
    "methods",
    "plan",
    "report",
    "route",
    "run",
    "uptrain",
)
_HOMES = {
    **{name: (f"verbs.{name}", name) for name in _VERBS},
    "eval": ("verbs.evaluate", "evaluate"),
    "load": ("runtime.load", "load"),
}
"""Public name → module and name there. A public name must not be that of a submodule, which would take its place."""

__all__ = [
    "__version__",
    "bench",
    "calibrate",
    "check",
    "compare",
    "demo",
    "detect",
    "eval",
    "export",
    "fold",
    "frontier",
    "inspect",
    "load",
    "methods",
    "plan",
    "report",
    "route",
    "run",
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
