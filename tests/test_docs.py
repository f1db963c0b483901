"""Documents: links and paths lead somewhere, the index is whole, targets of examples are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# A path in code that begins with a folder of the repository, and no part of which is a stand-in.
PATH = re.compile(
    r"`((?:algoperf_shampoo|scripts|tests|docs|benchmarks|submissions|search_spaces|workloads_config"
    r"|results/(?:paper|measured|published))/[\w./-]*)`"
)


def anchors(text: str) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def by_path(documents: list[Path]) -> pytest.MarkDecorator:
    names = [path.relative_to(ROOT).as_posix() for path in documents]
    return pytest.mark.parametrize("path", documents, ids=names)


@by_path(DOCS)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@by_path([path for path in DOCS if path.name != "CHANGELOG.md"])
def test_paths_in_the_text_are_there(path: Path) -> None:
    found = PATH.findall(path.read_text(encoding="utf-8"))
    missing = [name for name in found if "mine" not in name and not (ROOT / name).exists()]
    assert missing == []  # "mine" is the variant that README makes


def test_the_index_names_every_document() -> None:
    index = LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8"))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= set(index)


def test_examples_of_make_name_targets_that_there_are() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, flags=re.MULTILINE))
    variants = {p.parent.name.replace("_", "-") for p in ROOT.glob("submissions/*/submission.py")}
    families = ("submit-", "export-", "docker-submit-")
    called = re.compile(r"(?:^ *|`)make +([a-z0-9-]+)", flags=re.MULTILINE)
    for path in DOCS:
        for name in called.findall(path.read_text(encoding="utf-8")):
            family = next((f for f in families if name.startswith(f)), "")
            member = name.removeprefix(family)  # "" of `submit-<variant>` and `submit-...`
            known = variants | {"", "mine"} if family else targets
            assert member in known, (path, name)
