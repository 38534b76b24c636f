"""The check of annotations in the tests: types and shapes of what functions of headfold take and return."""

import functools
import inspect
import random
from collections.abc import Callable
from io import TextIOBase
from types import CodeType, FunctionType
from typing import Any, TextIO

import jaxtyping
from beartype import BeartypeConf, FrozenDict, beartype
from beartype._check.code import codemain
from jaxtyping._decorator import _destring_annotation as known
from jaxtyping._storage import pop_shape_memo, push_shape_memo
from torch import SymInt

# beartype checks one item of a container, drawn by the global generator, which tests and hypothesis watch: give it its own.
codemain.getrandbits = random.Random(0).getrandbits

check = beartype(
    conf=BeartypeConf(
        is_pep484_tower=True,
        hint_overrides=FrozenDict({TextIO: TextIOBase | TextIO, int: int | SymInt}),
        violation_type=jaxtyping.TypeCheckError,
    )
)
"""An int is a float here, as PEP 484 says, and a StringIO is a TextIO, as the standard library's annotations say. While torch
traces a model, the sizes of tensors are integers of its own."""

slow = jaxtyping.jaxtyped
_inner = set[CodeType]()
"""Functions within functions that are checked. Each call of the outer one makes them anew, and a check takes long to make: the first of a
process has one.
"""


def jaxtyped(decorated: Any = None, *, typechecker: Callable[..., Any]) -> Any:
    """Check what a function takes and returns, as `jaxtyping.jaxtyped` does, in less time.

    That one binds the arguments at every call, for axes named for them, of which headfold has none, and checks the arguments again
    when it checks the result. Of generators only the arguments are checked.
    """
    if decorated is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(decorated):
        made = vars(decorated).get("__init__")
        if made is not None and not hasattr(made, "__wrapped__") and hasattr(decorated, "__dataclass_fields__"):
            decorated.__init__ = jaxtyped(made, typechecker=typechecker)
        return decorated
    if isinstance(decorated, FunctionType) and "<locals>" in decorated.__qualname__:
        if decorated.__code__ in _inner:
            return decorated
        _inner.add(decorated.__code__)
    if not isinstance(decorated, FunctionType) or inspect.isgeneratorfunction(decorated):
        return slow(decorated, typechecker=typechecker)
    return _checked(decorated, typechecker)


def _checked(function: FunctionType, typechecker: Callable[..., Any]) -> Callable[..., Any]:
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__, copy.__qualname__, copy.__module__ = (
        function.__kwdefaults__, function.__qualname__, function.__module__,
    )  # fmt: skip
    # A name that only type checkers import stands for anything.
    copy.__annotations__ = {name: known(hint, function.__globals__) for name, hint in function.__annotations__.items()}
    checks = typechecker(copy)
    if not any("jaxtyping" in repr(hint) for hint in copy.__annotations__.values()):
        return functools.wraps(function)(checks) if checks is not copy else function

    @functools.wraps(function)
    def within_its_axes(*args: Any, **kwargs: Any) -> Any:
        push_shape_memo({})
        try:
            return checks(*args, **kwargs)
        finally:
            pop_shape_memo()

    return within_its_axes
