"""A submission as a folder of its own, in the layout of mlcommons/submissions_algorithms.

``<out>/external_tuning/<variant>/`` gets submission.py, tuning_search_space.json,
submission_info.yml, LICENSE and ``algorithm/``: just those modules of this package that the
submission imports, directly or through others, found by reading their import statements. In
``<out>/self_tuning/<variant>/`` the point is built into submission.py in place of the search space.
The copies refer to each other by relative imports, so the folder runs wherever it can be imported
from, under any name, with torch and AlgoPerf alone.
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
RECORD, INFO = "export.json", "submission_info.yml"
RULESETS = {"external": "external_tuning", "self": "self_tuning"}
"""AlgoPerf's rulesets as its runner calls them, and the folders of submissions_algorithms."""
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
    ruleset: str = "external",
) -> Path:
    """Write the folder of one variant and return it; an earlier export there is replaced.

    Args:
        f, tau, settings: what ``F=``, ``TAU=`` and ``SET=`` say: fields of the points to replace.
            The folder is then called after them as well.
        search_space: another file than the variant's own.
        ruleset: "external", or "self": the variant's one point is built in.

    Raises:
        UserError: unknown variant or ruleset, bad search space or setting, text that AlgoPerf's
            workflows would not take as it is, or another folder in the way.
    """
    variant = variant.replace("-", "_")
    fields = submission_loader.fields(root, variant)
    if ruleset not in RULESETS:
        raise UserError(f"RULESET={ruleset}: there is {', '.join(RULESETS)}")
    space = search_space or root / "search_spaces" / f"{variant}.json"
    changes = hparams.parse_settings(fields, f, tau, settings)
    name = folder_name(variant, changes)
    target = out / RULESETS[ruleset] / name
    if target.exists() and not (target / RECORD).is_file():
        raise UserError(f"{target}: exists and is not an export; set OUT= to another folder")
    record: dict[str, Any] = {"package": PACKAGE, "version": __version__, "variant": variant}
    record |= {"ruleset": ruleset, "settings": changes}
    record |= {"authors": authors, "affiliations": affiliations}
    if ruleset == "self":
        record["point"] = hparams.one_point(space, fields, changes)
        files = entry(root, variant, record["point"])
    else:
        files = entry(root, variant)
        files["tuning_search_space.json"] = _tuning(space, fields, changes)
    files["LICENSE"] = (root / "LICENSE").read_text(encoding="utf-8")
    files[INFO] = info_text(info(root, variant, changes, ruleset, authors, affiliations))
    record["sha256"] = {
        file: hashlib.sha256(text.encode()).hexdigest() for file, text in files.items()
    }
    files[RECORD] = json.dumps(record, indent=1) + "\n"

    fresh = target.with_name(f".{name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    write(fresh, files)
    if target.exists():
        shutil.rmtree(target)
    fresh.rename(target)
    return target


def entry(root: Path, variant: str, point: dict[str, Any] | None = None) -> dict[str, str]:
    """Files of the submission itself, by name; with ``point``, which is then built in."""
    return dict(_files(root, variant, root / "submissions" / variant / "submission.py", point))


def write(folder: Path, files: dict[str, str]) -> None:
    """Write files into a folder that is made."""
    for inside, text in files.items():
        path = folder / inside
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


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


def folder_name(variant: str, changes: dict[str, Any]) -> str:
    """Of an export: the variant and what was set, in small letters, importable."""
    return re.sub(r"\W", "_", variant + points.label(changes), flags=re.ASCII).lower()


def info(
    root: Path,
    variant: str,
    changes: dict[str, Any],
    ruleset: str,
    authors: str,
    affiliations: str,
) -> dict[str, str]:
    """The fields of ``submission_info.yml`` and of the YAML block of a pull request.

    Raises:
        UserError: a text with a character that submissions_algorithms' workflows cut off or expand.
    """
    source = root / "submissions" / variant / "submission.py"
    about = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or variant
    fields = {
        "submission_name": (variant + points.label(changes)).replace("_", " "),
        "submission_folder": folder_name(variant, changes),
        "authors": authors,
        "affiliations": affiliations,
        "version": __version__,
        "ruleset": {"external": "external", "self": "self-tuning"}[ruleset],
        "framework": "PyTorch",
        "description": about,
    }
    plain = {key: " ".join(value.split()) for key, value in fields.items()}
    for key, value in plain.items():
        # They cut a line at #, and write it by a shell that expands the others.
        odd = next((c for c in value if c in "#$`\\" or not c.isprintable()), None)
        if odd is not None:
            raise UserError(f"{key.upper()}={value[:60]}: {odd!r} would not survive a workflow")
    return plain


def info_text(fields: dict[str, str]) -> str:
    """The fields as YAML; values are JSON strings, which YAML reads as they are."""
    return "".join(f"{k}: {json.dumps(v, ensure_ascii=False)}\n" for k, v in fields.items())
