"""A submission on its own: with copies of just those modules of this package that it imports.

They are found by reading import statements, and refer to each other by relative imports, so that
the files run wherever they can be imported from, under any name, with torch and AlgoPerf alone.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from algoperf_shampoo.errors import UserError

PACKAGE = "algoperf_shampoo"
COPIES = "algorithm"
_ABSOLUTE = re.compile(rf"^(\s*)from {PACKAGE}(\.[\w.]+)? import ", re.MULTILINE)


def entry(root: Path, variant: str, point: dict[str, Any] | None = None) -> dict[str, str]:
    """Files of the submission itself, by name; with ``point``, which is then built in."""
    return dict(_files(root, variant, root / "submissions" / variant / "submission.py", point))


def write(folder: Path, files: dict[str, str]) -> None:
    """Write files into a folder that is made."""
    for inside, text in files.items():
        path = folder / inside
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def modules_needed(package: Path, names: Sequence[str]) -> list[str]:
    """Modules of the package that ``names`` import, themselves included, sorted.

    Args:
        package: folder of the package.
        names: dotted, without the package's own name: ``optim.linalg``.
    """
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found.add(name)
        path = _path(package, name)
        if path is None:
            raise UserError(f"{package}: no module {name}")
        # A package is imported on the way to its modules.
        parents = name.split(".")[:-1]
        pending += [".".join(parents[: i + 1]) for i in range(len(parents))]
        pending += _imports(package, name, path)
    return sorted(found)


def _files(
    root: Path, variant: str, source: Path, point: dict[str, Any] | None
) -> Iterator[tuple[str, str]]:
    text = source.read_text(encoding="utf-8")
    if point is not None:
        text = _with_point(text, point, source)
    package = root / PACKAGE
    yield "__init__.py", ""
    yield "submission.py", _standalone(text)
    yield f"{COPIES}/__init__.py", f'"""The optimizer of {variant}; part of {PACKAGE}."""\n'
    for name in modules_needed(package, sorted(_imports_of_package(ast.parse(text), package))):
        path = _path(package, name)
        assert path is not None
        inside = path.relative_to(package)
        yield f"{COPIES}/{inside.as_posix()}", _relative(path.read_text(encoding="utf-8"), inside)


def _standalone(text: str) -> str:
    """The submission with its imports from the package made from the copies.

    AlgoPerf imports it by its path, ``a.b.submission``, or as ``submission`` when it is started in
    the folder itself; a module of the latter kind has no package to be relative to.
    """
    tree = ast.parse(text)
    lines = text.splitlines()
    own = [node for node in tree.body if _from_package(node)]
    first, last = own[0].lineno - 1, max(node.end_lineno or node.lineno for node in own)
    block = "\n".join(lines[first:last])
    inside = _ABSOLUTE.sub(rf"\1from .{COPIES}\2 import ", block)
    alone = _ABSOLUTE.sub(rf"\1from {COPIES}\2 import ", block)
    indented = ["if __package__:", *_indent(inside), "else:", *_indent(alone)]
    return "\n".join([*lines[:first], *indented, *lines[last:]]) + "\n"


def _with_point(text: str, point: dict[str, Any], source: Path) -> str:
    """The submission with the point as a constant, handed to its ``Submission(...)``."""
    calls = [
        (statement, statement.value)
        for statement in ast.parse(text).body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.value, ast.Call)
        and getattr(statement.value.func, "id", None) == "Submission"
    ]
    if len(calls) != 1:
        raise UserError(f"{source}: wants one `... = Submission(...)` for RULESET=self")
    statement, call = calls[0]
    assert call.end_lineno is not None and call.end_col_offset is not None  # it was just parsed
    lines = text.splitlines()
    last, column = call.end_lineno - 1, call.end_col_offset - 1
    # The offset counts bytes.
    line = lines[last].encode()
    lines[last] = (line[:column] + b", built_in=POINT" + line[column:]).decode()
    constant = [
        "# The hyperparameters of this self-tuning submission.",
        "POINT = {",
        *(f"    {_literal(name)}: {_literal(value)}," for name, value in point.items()),
        "}",
        "",
    ]
    return "\n".join([*lines[: statement.lineno - 1], *constant, *lines[statement.lineno - 1 :]])


def _literal(value: Any) -> str:
    """A field's name or value as Python writes it, with double quotes."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _indent(block: str) -> list[str]:
    return [f"    {line}" if line else line for line in block.splitlines()]


def _relative(text: str, inside: Path) -> str:
    """Absolute imports of the package made relative; ``inside`` is the file's path in it."""
    dots = "." * len(inside.parts)
    return _ABSOLUTE.sub(lambda m: f"{m[1]}from {dots}{(m[2] or '')[1:]} import ", text)


def _imports(package: Path, name: str, path: Path) -> list[str]:
    """Modules of the package that one module imports, at its top or inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set(_imports_of_package(tree, package))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - (node.level - 1)]
            base += node.module.split(".") if node.module else []
            found.update(_targets(package, base, node))
    return sorted(found)


def _imports_of_package(tree: ast.AST, package: Path) -> Iterator[str]:
    for node in ast.walk(tree):
        if _from_package(node):
            assert isinstance(node, ast.ImportFrom) and node.module
            yield from _targets(package, node.module.split(".")[1:], node)
        elif isinstance(node, ast.Import) and any(
            alias.name.split(".")[0] == PACKAGE for alias in node.names
        ):
            raise UserError(f"`import {PACKAGE}...` cannot be exported: use `from ... import`")


def _from_package(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.ImportFrom)
        and not node.level
        and (node.module or "").split(".")[0] == PACKAGE
    )


def _targets(package: Path, base: list[str], node: ast.ImportFrom) -> Iterator[str]:
    """``from base import a, b``: base itself, and each name that is a module of it."""
    if base:
        yield ".".join(base)
    for alias in node.names:
        name = ".".join([*base, alias.name])
        if _path(package, name):
            yield name


def _path(package: Path, name: str) -> Path | None:
    file = package.joinpath(*name.split("."))
    for path in (file.with_suffix(".py"), file / "__init__.py"):
        if path.is_file():
            return path
    return None
