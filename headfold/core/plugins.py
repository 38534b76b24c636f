"""Methods as files: the folder is the registry, the file name the method's name, its keyword-only parameters its options."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .errors import UserError, suggest

OF_THE_CALLER = ("seed", "head_dim_multiple")
"""Keyword-only parameters that are no options of a method: the plan says them."""


@dataclass(frozen=True, slots=True)
class Method:
    """One plug-in with its options settled."""

    name: str
    function: Callable[..., Any]
    options: dict[str, Any]

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.function(*args, **self.options, **keywords)

    def __str__(self) -> str:
        written = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}:{written}" if written else self.name


def names(package: ModuleType) -> list[str]:
    """The methods in a plug-in package: its modules, packages left out."""
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg)


def load(package: ModuleType, name: str) -> ModuleType:
    """The page of one method.

    Raises:
        UserError: no such method; the nearest names are suggested.
    """
    axis = package.__name__.removeprefix("headfold.").replace(".", " ")
    if name not in names(package):
        raise UserError(f"unknown {axis} method {name!r}; {suggest(name, names(package))}")
    return importlib.import_module(f"{package.__name__}.{name}")


def option_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only parameters of a method with their defaults, but for those that the caller decides."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in OF_THE_CALLER}


def parse(package: ModuleType, text: str, entry: str) -> Method:
    """`name` or `name:key=value,key=value` → the method, options checked against the signature of its `entry` function.

    Raises:
        UserError: unknown method or option, or a value of the wrong type.
    """
    name, _, tail = text.partition(":")
    function = getattr(load(package, name), entry)
    defaults = option_defaults(function)
    options: dict[str, Any] = {}
    for item in filter(None, tail.split(",")):
        key, equals, value = item.partition("=")
        if key not in defaults or not equals:
            listed = ", ".join(f"{k}={v}" for k, v in defaults.items()) or "none"
            raise UserError(f"{name}: no option {item!r}; it takes {listed}")
        options[key] = _convert(name, key, value, defaults[key])
    return Method(name, function, options)


def _convert(name: str, key: str, text: str, default: Any) -> Any:
    """The text as a value of the default's type."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise UserError(f"{name}: {key}={text!r}, expected true or false")
        return text.lower() == "true"
    try:
        return type(default)(text)
    except ValueError as error:
        raise UserError(f"{name}: {key}={text!r}, expected a value like {default!r}") from error


def needs(method: Method) -> tuple[str, ...]:
    """Names of the statistics that a method's page says it cannot do without."""
    return getattr(inspect.getmodule(method.function), "NEEDS", ())


def summary(module: ModuleType) -> str:
    """The first line of a method's page: its help."""
    return (module.__doc__ or "").strip().splitlines()[0]
