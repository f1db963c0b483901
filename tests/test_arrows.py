"""Imports run one way: scripts, study, harness, workloads; submission, optim; nothing upward.

Every import statement counts, those inside functions and under TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "algoperf_shampoo"
SHARED = set(
    "batch_sizes contract errors factor_log interrupt json_input paths points versions".split()
) | {""}
"""Modules of the package that any other may use but optim; "" is the package itself."""
BELOW = {
    "study": {"harness", "workloads", "optim"} | SHARED,
    "harness": {"workloads"} | SHARED,
    "workloads": SHARED,
    "submission": {"optim", "repeatable"} | SHARED,
    "repeatable": SHARED,
    "optim": set(),
    **dict.fromkeys(SHARED, SHARED),
}
# Third-party packages that are imported with a module, not later by a function that needs them.
AT_ONCE = {
    "study": {"numpy"},
    "harness": {"numpy", "torch"},
    "workloads": {"numpy", "torch"},
    "submission": {"torch"},
    "repeatable": {"torch"},
    "optim": {"torch", "triton"},
}
MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))


def name_of(path: Path, root: Path) -> list[str]:
    parts = list(path.relative_to(root).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path, root: Path = ROOT) -> Iterator[tuple[str, bool]]:
    """Dotted names that a module imports, relative ones resolved, and whether it does so at once.

    ``from a import b`` gives both ``a`` and ``a.b``: b may be a module.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.If | ast.Try)
        for inner in ast.walk(node)
    }
    here = name_of(path, root)
    for node in ast.walk(tree):
        at_once = id(node) not in late
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                package = here if path.name == "__init__.py" else here[:-1]
                base = package[: len(package) - node.level + 1] + base
            yield from ((".".join([*base, alias.name]), at_once) for alias in node.names)


def room(name: str) -> str | None:
    """The part of the package that a dotted name lies in; None of other packages."""
    package, _, inside = name.partition(".")
    if package != PACKAGE:
        return None
    first = inside.split(".")[0]
    return first if first in BELOW else ""


def upward(path: Path, root: Path = ROOT) -> list[str]:
    """The names that a module imports and may not."""
    own = (name_of(path, root) + [""])[1]
    taken = {name: room(name) for name, _ in imports(path, root)}
    return [name for name, r in taken.items() if r not in (None, own) and r not in BELOW[own]]


def test_every_module_has_its_place() -> None:
    assert {(name_of(path, ROOT) + [""])[1] for path in MODULES} == set(BELOW)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT / PACKAGE).as_posix())
def test_no_import_upward(path: Path) -> None:
    assert upward(path) == []


def test_an_import_upward_is_seen_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / PACKAGE / "harness" / "algoperf" / "door.py"
    path.parent.mkdir(parents=True)
    for statement in (
        "from algoperf_shampoo.study import plan",
        "import algoperf_shampoo.study.plan",
        "def f():\n    from ...study.plan import Plan",
        "from ... import study",
        "if TYPE_CHECKING:\n    from algoperf_shampoo.submission import Submission",
    ):
        path.write_text(statement, encoding="utf-8")
        assert len(upward(path, tmp_path)) == 1, statement
    path.write_text("from .. import disk\nfrom . import env\nfrom ...errors import UserError\n")
    assert upward(path, tmp_path) == []


def test_nothing_imports_scripts_tests_or_benchmarks() -> None:
    names = {p.stem for p in (ROOT / "scripts").rglob("*.py")} - {"export", "figures"}
    for path in MODULES:
        roots = {name.split(".")[0] for name, _ in imports(path)}
        assert not roots & {"scripts", "tests", "benchmarks", "submissions"}, path
        assert not roots & (names - set(sys.stdlib_module_names)), path


def test_submissions_use_two_rooms_of_the_package() -> None:
    for path in sorted((ROOT / "submissions").glob("*/submission.py")):
        own = {room(name) for name, _ in imports(path)} - {None}
        assert own <= {"submission", "optim"} and "submission" in own, path


def test_third_party_packages_by_room() -> None:
    for path in MODULES:
        own = (name_of(path, ROOT) + [""])[1]
        roots = {name.split(".")[0] for name, at_once in imports(path) if at_once}
        strange = roots - set(sys.stdlib_module_names) - {PACKAGE}
        assert strange <= AT_ONCE.get(own, set()), path


def test_an_installation_brings_what_is_imported_at_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    brought = {re.split(r"[<>=~ ;\[]", entry)[0] for entry in project["dependencies"]}
    assert set().union(*AT_ONCE.values()) - {"triton"} <= brought  # kernels: where a GPU is


def test_source_files_are_short() -> None:
    long = [
        path
        for folder in (PACKAGE, "scripts", "submissions", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if len(path.read_text(encoding="utf-8").splitlines()) > 500
    ]
    assert long == []
