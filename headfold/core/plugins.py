"""Methods as files: the folder is the registry, the file name the method's name, its keyword-only parameters its options."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar

from .errors import UserError, suggest
from .methods import MethodRecord

SET_BY_CALLER = ("seed", "head_dim_multiple")
"""Keyword-only parameters that are not options of a method: the plan sets them."""

Record = TypeVar("Record")
SomeMethod = TypeVar("SomeMethod", bound=MethodRecord)


@dataclass(frozen=True, slots=True)
class Method(Generic[SomeMethod]):
    """One method, chosen by name, with the options that were given."""

    name: str
    record: SomeMethod
    options: dict[str, Any]

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Call the page's function with the options."""
        return self.record.function(*args, **self.options, **keywords)

    def __str__(self) -> str:
        written = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}:{written}" if written else self.name


def names(package: ModuleType) -> list[str]:
    """Return the names of the methods in a plug-in package: its modules, without subpackages."""
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg)


def _page(package: ModuleType, name: str) -> ModuleType:
    axis = package.__name__.removeprefix("headfold.").replace(".", " ")
    if name not in names(package):
        raise UserError(f"unknown {axis} method {name!r}; {suggest(name, names(package))}")
    try:
        return importlib.import_module(f"{package.__name__}.{name}")
    except Exception as error:  # whatever a page does on import
        raise UserError(
            f"{_file(package, name)}: expected a method page, got {type(error).__name__}: {error}"
        ) from error


def _file(package: ModuleType, name: str) -> str:
    return f"{package.__name__.replace('.', '/')}/{name}.py"


def load(package: ModuleType, name: str, kind: type[Record]) -> Record:
    """Return the record of one page: its only constant of the type `kind`.

    Raises:
        UserError: there is no such page, and the nearest names are suggested; or the page is broken.
    """
    records = [value for value in vars(_page(package, name)).values() if isinstance(value, kind)]
    if len(records) != 1:
        raise UserError(
            f"{_file(package, name)}: expected one {kind.__name__} at the end of the page, got {len(records)}"
        )
    return records[0]


def option_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the options of a method with their defaults: its keyword-only parameters, except those that the caller sets."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in SET_BY_CALLER}


def parse(package: ModuleType, text: str, kind: type[SomeMethod]) -> Method[SomeMethod]:
    """Return the method that `name` or `name:key=value,key=value` names.

    Raises:
        UserError: unknown method or option, or a value of the wrong type.
    """
    name, _, options = text.partition(":")
    record = load(package, name, kind)
    return Method(name, record, parse_options(name, options, record.function))


def parse_options(name: str, text: str, function: Callable[..., Any]) -> dict[str, Any]:
    """Return the options in `key=value,key=value`, checked against the signature of `function`; `name` is for messages.

    Raises:
        UserError: unknown option, or a value of the wrong type.
    """
    defaults = option_defaults(function)
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if key not in defaults or not equals:
            listed = ", ".join(f"{k}={v}" for k, v in defaults.items()) or "none"
            raise UserError(f"{name}: no option {item!r}; its options are {listed}")
        options[key] = _convert(name, key, value, defaults[key])
    return options


def _convert(name: str, key: str, text: str, default: Any) -> Any:
    """Return the text as a value of the default's type."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise UserError(f"{name}: {key}={text!r}, expected true or false")
        return text.lower() == "true"
    try:
        return type(default)(text)
    except ValueError as error:
        raise UserError(f"{name}: {key}={text!r}, expected a value like {default!r}") from error


def documentation(package: ModuleType, name: str) -> str:
    """Return the docstring of a page.

    Raises:
        UserError: there is no such page.
    """
    return (_page(package, name).__doc__ or "").strip()


def summary(package: ModuleType, name: str) -> str:
    """Return the first line of a page's docstring: its help."""
    return documentation(package, name).splitlines()[0]
