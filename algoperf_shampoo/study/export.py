"""A submission as a folder of its own, in the layout of mlcommons/submissions_algorithms.

``<out>/external_tuning/<variant>/`` gets submission.py, tuning_search_space.json,
submission_info.yml, LICENSE and ``algorithm/``: just those modules of this package that the
submission imports, directly or through others, found by reading their import statements. The copies
refer to each other by relative imports, so the folder runs wherever it can be imported from, under
any name, with torch and AlgoPerf alone.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from algoperf_shampoo import __version__, json_input, points
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import hparams, submission_loader

PACKAGE = "algoperf_shampoo"
COPIES = "algorithm"
RECORD = "export.json"
_ABSOLUTE = re.compile(rf"^(\s*)from {PACKAGE}(\.[\w.]+)? import ", re.MULTILINE)


def export(
    root: Path,
    variant: str,
    out: Path,
    authors: str = "",
    affiliations: str = "",
    *,
    f: str | None = None,
    tau: str | None = None,
    settings: str | None = None,
    search_space: Path | None = None,
) -> Path:
    """Write the folder of one variant and return it; an earlier export there is replaced.

    Args:
        f, tau, settings: what ``F=``, ``TAU=`` and ``SET=`` say: fields of the points to replace.
            The folder is then called after them as well.
        search_space: another file than the variant's own.

    Raises:
        UserError: unknown variant, bad search space or setting, or another folder in the way.
    """
    variant = variant.replace("-", "_")
    source = root / "submissions" / variant / "submission.py"
    fields = submission_loader.fields(root, variant)
    space = search_space or root / "search_spaces" / f"{variant}.json"
    changes = hparams.parse_settings(fields, f, tau, settings)
    tuning = _tuning(space, fields, changes)
    # A dot would keep the folder from being imported.
    name = re.sub(r"\W", "_", variant + points.label(changes), flags=re.ASCII)
    target = out / "external_tuning" / name
    if target.exists() and not (target / RECORD).is_file():
        raise UserError(f"{target}: exists and is not an export; set OUT= to another folder")
    files = dict(_files(root, variant, source))
    files["tuning_search_space.json"] = tuning
    files["LICENSE"] = (root / "LICENSE").read_text(encoding="utf-8")
    files["submission_info.yml"] = _info(source, name, authors, affiliations)
    sums = {file: hashlib.sha256(text.encode()).hexdigest() for file, text in files.items()}
    record = {"package": PACKAGE, "version": __version__, "settings": changes, "sha256": sums}
    files[RECORD] = json.dumps(record, indent=1) + "\n"

    fresh = target.with_name(f".{name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    for inside, text in files.items():
        path = fresh / inside
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if target.exists():
        shutil.rmtree(target)
    fresh.rename(target)
    return target


def _tuning(space: Path, fields: Sequence[str], changes: dict[str, Any]) -> str:
    """The search space as it goes into the export: the file itself, unless fields are replaced."""
    own = hparams.read_points(space, 1, fields)
    if not changes:
        return space.read_text(encoding="utf-8")
    found = json_input.read(space)
    if not isinstance(found, list):
        raise UserError(f"{space}: ranges; F=, TAU= and SET= replace fields of a list of points")
    own = hparams.read_points(space, len(found), fields)
    changed = [hparams.override(point, changes, fields, where=str(space)) for point in own]
    return json.dumps(changed, indent=2) + "\n"


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


def _files(root: Path, variant: str, source: Path) -> Iterator[tuple[str, str]]:
    text = source.read_text(encoding="utf-8")
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


def _info(source: Path, name: str, authors: str, affiliations: str) -> str:
    """``submission_info.yml``; values are JSON strings, which YAML reads as they are."""
    about = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or name
    fields = {
        "submission_name": name.replace("_", " "),
        "submission_folder": name,
        "authors": authors,
        "affiliations": affiliations,
        "version": __version__,
        "ruleset": "external",
        "framework": "PyTorch",
        "description": " ".join(about.split()),
    }
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items())
