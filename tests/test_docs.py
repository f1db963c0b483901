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
        if anchor and target.suffix == ".md":  # into code: see below
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


CODE_LINK = re.compile(r"\[`(\w+)`\]\(([\w./-]+\.py)#L(\d+)\)")
NEAR = 20  # lines: what one sees on a screen below a link's line, or above it
# Of a row of README's table, what its code must name.
PRINTED = re.compile(r"Algorithm \d|Eq\. \d+|SOAP|KL-Shampoo|trace")


def code_links() -> list[tuple[Path, str, str, str, int]]:
    """Document, line of it, and the name, file and line that a link is to."""
    return [
        (path, line, *match[:2], int(match[2]))
        for path in DOCS
        for line in path.read_text(encoding="utf-8").splitlines()
        for match in CODE_LINK.findall(line)
    ]


def test_links_into_code_lead_to_what_they_name() -> None:
    """The definition is on the screen that opens; the line itself moves with every edit above."""
    links = code_links()
    assert len(links) > 15
    for path, _, name, file, number in links:
        lines = (path.parent / file).read_text(encoding="utf-8").splitlines()
        found = [n for n, text in enumerate(lines, 1) if re.match(rf"(class|def) {name}\b", text)]
        assert len(found) == 1, f"{path.name}: {file} defines {name} {len(found)} times"
        near = abs(found[0] - number) <= NEAR
        assert near, f"{path.name}: {name} is at {file}#L{found[0]}, not near #L{number}"


def test_the_papers_lines_are_a_link_away_from_the_readme() -> None:
    """README's table: a row's code names what the row does; Algorithm 2's lines are marked."""
    links = [link for link in code_links() if link[0].name == "README.md" and link[1][0] == "|"]
    rows = {line: [file for _, at, _, file, _ in links if at == line] for _, line, *_ in links}
    assert {"Algorithm 2", "Algorithm 3", "Algorithm 4", "Eq. 11"} <= {
        word for row in rows for word in PRINTED.findall(row)
    }
    for row, files in rows.items():
        (named, *_) = PRINTED.findall(row.split("|")[1])
        for file in files:
            assert named.lower() in (ROOT / file).read_text(encoding="utf-8").lower(), (row, file)
    marked = [(ROOT / file).read_text() for row, files in rows.items() for file in files]
    for number in (4, 5, 6, 7, 10, 11, 12, 13):
        told = [text for text in marked if re.search(rf"# lines? .*\b{number}\b", text)]
        assert len({*told}) >= 2, f"line {number} of Algorithm 2 is not marked in both"


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
