"""Reads what a source text of headfold imports, in whatever form it is written; `test_house.py` holds it against the floor plan."""

import ast
import functools
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import headfold

HOUSE = Path(headfold.__file__).parent
Name = tuple[str, ...]
"""A dotted name, in parts."""
PUBLIC: dict[str, Name] = {
    name: ("headfold", *module.split("."), attribute) for name, (module, attribute) in headfold._HOMES.items()
}
"""Public name of the package → where it lives."""


@functools.cache
def imports(path: Path) -> frozenset[Name]:
    """The absolute names of everything that a module imports, wherever in it: in functions and for types too."""
    return frozenset(imported_by(path.read_text(), module_name(path), is_package=path.stem == "__init__"))


def module_name(path: Path) -> Name:
    parts = ("headfold", *path.relative_to(HOUSE).with_suffix("").parts)
    return parts[:-1] if path.stem == "__init__" else parts


def imported_by(text: str, module: Name, *, is_package: bool = False) -> set[Name]:
    """The same for a text that is the module of this name. A public name of the package counts as the module that it lives in."""
    tree, package = ast.parse(text), module if is_package else module[:-1]
    constants = _constants(tree) | {"__name__": ".".join(module), "__package__": ".".join(package)}
    loaders = {"import_module", "__import__", *_other_names_of_import_module(tree)}
    nodes = list(ast.walk(tree))
    spelled = [name for node in nodes for name in _statements(node, package)]
    spelled += [name for node in nodes for name in _calls(node, loaders, constants, package)]
    return {home for name in spelled for home in _homes(name)}


def _statements(node: ast.AST, package: Name) -> Iterator[Name]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield tuple(alias.name.split("."))
            if alias.asname is None:  # `import a.b` also binds `a`
                yield (alias.name.partition(".")[0],)
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else ()
        base += tuple(node.module.split(".")) if node.module else ()
        yield from ((*base, alias.name) for alias in node.names)


def _calls(node: ast.AST, loaders: Set[str], constants: Mapping[str, str], package: Name) -> Iterator[Name]:
    """What `import_module` and `__import__` are called with, as far as it stands in the text."""
    if not isinstance(node, ast.Call) or not node.args:
        return
    function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
    if function not in loaders:
        return
    text = _known_text(node.args[0], constants)
    level = len(text) - len(text.lstrip("."))
    base = package[: len(package) - level + 1] if level else ()
    name = (*base, *(part for part in text.split(".") if part))
    if name:
        yield name


def _other_names_of_import_module(tree: ast.Module) -> set[str]:
    aliases = (alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names)
    return {alias.asname for alias in aliases if alias.name == "import_module" and alias.asname}


def _constants(tree: ast.Module) -> dict[str, str]:
    """Strings that the module gives a name."""
    assigned = (node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant))
    return {
        target.id: node.value.value
        for node in assigned
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value.value, str)
    }


def _known_text(node: ast.expr, constants: Mapping[str, str]) -> str:
    """The text of a string, a named one, or an f-string up to the first part of the dotted name that is not known."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    known = ""
    for part in parts:
        value = part.value if isinstance(part, ast.FormattedValue) else part
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            known += value.value
        elif isinstance(value, ast.Name) and value.id in constants:
            known += constants[value.id]
        else:
            return known.rpartition(".")[0]
    return known


def _homes(name: Name) -> Iterator[Name]:
    """Where a name lives. The package as a whole is all its public names."""
    if name in {("headfold",), ("headfold", "*")}:
        yield from PUBLIC.values()
    elif name[0] == "headfold" and name[1] in PUBLIC:
        yield PUBLIC[name[1]]
    else:
        yield name
