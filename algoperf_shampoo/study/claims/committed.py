"""The committed pages of studies of claims, held against the committed runs they follow from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from algoperf_shampoo import json_input
from algoperf_shampoo.harness import disk
from algoperf_shampoo.study.claims import results, tuning

LIST = Path("results") / "measured" / "claims" / "pages.json"


def stale(root: Path, listed: Path, write: bool) -> list[str]:
    """The committed files that are not what their runs give now; they are written anew if asked.

    Args:
        listed: a JSON list of {"study": name or file, "runs": folder, "stem": where, no ending}.
    """
    found: list[str] = []
    for entry in json_input.read(listed, "list of pages"):
        phases = tuning.lay_out(root, entry["study"], str(root / entry["runs"]), quick=False)
        after = results.outcome(phases.declared, phases.study, False, phases.choices)
        found += _compared(root, root / entry["stem"], after, write)
    return found


def files(after: results.Outcome, root: Path, stem: Path) -> dict[Path, str]:
    """The page and the record of an outcome, by their paths."""
    return {
        Path(f"{stem}.md"): results.markdown(after, root, stem.parent),
        Path(f"{stem}.json"): results.to_json(after, root),
    }


def _compared(root: Path, stem: Path, after: results.Outcome, write: bool) -> Sequence[str]:
    contents = files(after, root, stem)
    differing = [
        path.relative_to(root).as_posix()
        for path, content in contents.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != content
    ]
    if write and differing:
        disk.write_together({path: content.encode() for path, content in contents.items()})
    return differing
