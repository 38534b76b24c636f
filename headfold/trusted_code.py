"""Run the code that a checkpoint brings for its class, where the user trusts it: as long as a verb runs, and never otherwise."""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from .checkpoint.config import CONFIG, read_config
from .checkpoint.hub import NamedDirectory, locate
from .checkpoint.refusals import class_reference, model_class
from .core.errors import UserError
from .hf_models.building import is_model_type, library_errors, quiet

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TrustedCode:
    """Code of a checkpoint that runs in place of a class of transformers."""

    model_class: Any
    files: tuple[str, ...]
    """Names of the files that were run, that of the class first."""
    digest: str


_running: dict[str, TrustedCode] = {}
"""`model_type` → the code that runs for it."""


def trusted_code(model_type: Any) -> TrustedCode | None:
    """Return the code that the user trusts for a `model_type` while this verb runs; None where there is none."""
    return _running.get(model_type)


def trusts_code(
    *names: str, models: Callable[[Mapping[str, Any]], list[Any]] | None = None
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a verb: if it is called with `trust_remote_code`, it runs the code of the models that its arguments of these names are, or
    that `models` finds in the arguments.

    Code is run only where transformers has no class of the `model_type`, and a verb that another one calls runs what that runs.
    """

    def decorated(verb: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(verb)

        @wraps(verb)
        def run(*arguments: P.args, **keywords: P.kwargs) -> T:
            options = signature.bind(*arguments, **keywords).arguments
            with ExitStack() as stack:
                if options.get("trust_remote_code"):
                    for model in _named(options, names) if models is None else models(options):
                        stack.enter_context(running_code(model))
                return verb(*arguments, **keywords)

        return run

    return decorated


def _named(options: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[Any]:
    """Yield the models that arguments name."""
    for name in names:
        value = options.get(name)
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, str | Path | NamedDirectory):
                yield each


@contextmanager
def running_code(model: str | Path | NamedDirectory) -> Iterator[None]:
    """Return a context in which transformers opens a model by the class that it brings, if it needs that.

    Raises:
        UserError: there is no such model; the code is not one class of a language model in files beside the config, or does not load; other
            code runs for the same `model_type`.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    if is_model_type(model):
        yield
        return
    directory = locate(model)
    config = read_config(directory) if (directory / CONFIG).is_file() else {}
    model_type = str(config.get("model_type"))
    runs = trusted_code(model_type)
    if not config.get("auto_map") or (model_type in CONFIG_MAPPING and runs is None):
        yield
        return
    directory = locate(model, code=True)
    with _registered_as_before():
        code = _load(directory, config)
        if runs is not None:
            if runs.digest != code.digest:
                raise UserError(
                    f"{directory}/{code.files[0]}: expected the same code for every model of model_type {model_type!r:.60}, got two; "
                    "name one of them at a time"
                )
            yield
            return
        config_class = code.model_class.config_class
        with library_errors(directory / code.files[0], "transformers cannot register the class of this code"):
            CONFIG_MAPPING.register(model_type, config_class)
            MODEL_FOR_CAUSAL_LM_MAPPING.register(config_class, code.model_class)
        _running[model_type] = code
        try:
            yield
        finally:
            del _running[model_type]


@contextmanager
def _registered_as_before() -> Iterator[None]:
    """Return a context after which transformers knows the classes that it knew before: what stays would open models by code that nobody
    trusts.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    # transformers has no function for it. Code may register classes too, whether or not it then loads.
    mappings: list[dict[Any, Any]] = [CONFIG_MAPPING._extra_content, MODEL_FOR_CAUSAL_LM_MAPPING._extra_content]
    before = [dict(mapping) for mapping in mappings]
    try:
        yield
    finally:
        for mapping, known in zip(mappings, before, strict=True):
            mapping.clear()
            mapping.update(known)


def _load(directory: Path, config: Mapping[str, Any]) -> TrustedCode:
    """Run the file that `auto_map` names for language models, and return the class in it.

    Raises:
        UserError: as `running_code`.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    where = f"{directory}/{CONFIG}"
    reference = class_reference(config, where)
    file, _, name = reference.partition(".")
    entry = directory / f"{file}.py"
    if not entry.is_file():
        raise UserError(f"{entry}: expected the code that auto_map names, got no such file; copy it there")
    if (saved := model_class(config, where)) != name:
        raise UserError(
            f"{where}: auto_map: expected the class that saved the weights, {saved!r:.60}, got {name!r:.60}; correct the config"
        )
    with library_errors(entry, "the code of the checkpoint does not load"), quiet():
        files = [entry, *sorted(map(Path, get_relative_import_files(entry)))]
        digest = hashlib.sha256(b"".join(f"{path.name}\n".encode() + path.read_bytes() for path in files)).hexdigest()
        found: Any = get_class_from_dynamic_module(reference, str(directory), local_files_only=True)
        model_type = found.config_class.model_type
        found = add_generation_mixin_to_remote_model(found)
    if model_type != config.get("model_type"):
        raise UserError(
            f"{where}: model_type: expected {model_type!r:.60}, that of the code's own config class, got "
            f"{config.get('model_type')!r:.60}; correct the config"
        )
    return TrustedCode(found, tuple(path.name for path in files), digest)
