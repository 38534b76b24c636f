"""The runtime as one file that does not need headfold, to save beside a checkpoint's weights, and the `auto_map` that points to it."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BASE = "modeling_headfold"
PAGES = HERE / "forwards"


def remote_files(config: Mapping[str, Any]) -> dict[str, str]:
    """Return file name → text of the code to write into the directory of a grouped checkpoint with this config.json."""
    return {f"{BASE}.py": remote_code(*sorted(set(_model_types(config))))}


def auto_map(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the grouped class for every auto class that transformers has for the config's `model_type`."""
    from transformers.models.auto import modeling_auto

    found = {}
    autos = {name: auto for name, auto in vars(modeling_auto).items() if name.startswith("AutoModel")}
    for name, auto in autos.items():
        mapping = getattr(auto, "_model_mapping", None)
        # A mapping is asked for its length where it is tested for truth, and imports every model of transformers to find it.
        stock = mapping._model_mapping.get(config["model_type"]) if mapping is not None else None
        if stock:
            choices = [stock] if isinstance(stock, str) else stock
            saved = config["architectures"][0]
            found[name] = f"{BASE}.Grouped{saved if saved in choices else choices[0]}"
    return found


def remote_code(*model_types: str) -> str:
    """Return one self-contained text: the runtime, and the own forwards of these model types where there are any."""
    parts: dict[Path, str] = {}
    imports: set[str] = set()
    for path in (HERE / f"{BASE}.py", *(PAGES / f"{page}.py" for page in model_types)):
        if path.is_file():
            _gather(path, parts, imports)
    title = ast.get_docstring(ast.parse((HERE / f"{BASE}.py").read_text()))
    head = f'"""{title}\n\nWritten by headfold; needs torch and transformers alone.\n"""\n'
    return "\n".join([head, *sorted(imports, key=_import_order), *(f"\n\n{part}" for part in parts.values())])


def _gather(path: Path, parts: dict[Path, str], imports: set[str]) -> None:
    """Add a file's code to `parts` after that of the files it imports from here, and its other imports to `imports`."""
    if path in parts:
        return
    text = path.read_text()
    lines, tree = text.splitlines(), ast.parse(text)
    dropped = {line for node in tree.body[:1] for line in _lines_of(node)}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            dropped |= set(_lines_of(node))
            if isinstance(node, ast.ImportFrom) and node.level:
                _gather(path.parents[node.level - 1] / f"{node.module}.py", parts, imports)
            else:
                imports.add(ast.unparse(node))
    kept = [line for number, line in enumerate(lines, 1) if number not in dropped]
    parts[path] = "\n".join(kept).strip() + "\n"


def _lines_of(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _import_order(line: str) -> tuple[bool, str]:
    return line.startswith("from"), line


def _model_types(config: Mapping[Any, Any]) -> Iterator[str]:
    """Yield the model types of the config and of the configs inside it."""
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _model_types(value)
