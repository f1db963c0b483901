"""The committed pages of studies of claims, held against the committed runs they follow from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from algoperf_shampoo import json_input
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import disk
from algoperf_shampoo.study import progress
from algoperf_shampoo.study.claims import archive, results, tuning

LIST = Path("results") / "measured" / "claims" / "pages.json"
_KEYS = {"study", "runs", "stem"}


@dataclass(frozen=True)
class Page:
    """One page: of which study (name or file), where, without an ending, and the archive of its
    runs; None: it has not been run."""

    study: str
    stem: Path
    runs: Path | None


def pages(root: Path, listed: Path) -> list[Page]:
    """The pages of a JSON list of {"study": name or file, "runs": archive, "stem": where}.

    Raises:
        UserError: a mistake in it.
    """
    found = []
    for number, entry in enumerate(json_input.read(listed, "list of pages"), start=1):
        json_input.check_keys(entry, _KEYS, _KEYS, f"{listed}: entry {number}")
        runs = None if entry["runs"] is None else root / entry["runs"]
        found.append(Page(entry["study"], root / entry["stem"], runs))
    return found


def stale(root: Path, listed: Path, write: bool) -> list[str]:
    """The committed files that are not what their runs give now; they are written anew if asked.

    Raises:
        UserError: an archive is not there, or damaged.
    """
    found: list[str] = []
    for page in pages(root, listed):
        with outcome(root, page) as after:
            found += _compared(root, page.stem, after, write)
    return found


@contextmanager
def outcome(root: Path, page: Page) -> Iterator[results.Outcome]:
    """What the runs of a page give, their folders there for as long as this is entered."""
    with nullcontext() if page.runs is None else archive.unpacked(page.runs) as packed:
        folder = page.stem if packed is None else packed.folder  # the former is no folder
        phases = tuning.lay_out(root, page.study, str(folder), quick=False)
        yield results.outcome(phases.declared, phases.study, False, phases.choices, packed)


def pack(root: Path, page: Page, folder: Path) -> tuple[int, list[str]]:
    """Write the runs of a page's study that are done in ``folder`` into its archive.

    Returns:
        Their number, and the names of those that are not there.

    Raises:
        UserError: the list names no archive, no run is done, or the disk says no.
    """
    if page.runs is None:
        raise UserError(f"{LIST}: {page.study}: runs is null: name the archive to write there")
    phases = tuning.lay_out(root, page.study, str(folder), quick=False)
    jobs = {job.run.run_dir: job for job in (*phases.jobs, *phases.foreseen())}
    done = {d for d, job in jobs.items() if progress.of(d, job.run).state == progress.DONE}
    if not done:
        raise UserError(f"{folder}: none of the {len(jobs)} runs of {page.study} is done there")
    archive.pack(page.runs, folder, sorted(done))
    return len(done), [job.run.name for run_dir, job in jobs.items() if run_dir not in done]


def unpack(runs: Path, folder: Path) -> bool:
    """Write an archive's runs into ``folder``, all or none; whether it was not there before.

    Raises:
        UserError: the archive is not there, or damaged; or the disk says no.
    """
    if folder.exists():
        return False
    half = folder.with_name(f".{folder.name}.half")
    with disk.explained(half):
        if half.exists():  # of an earlier one that was killed
            shutil.rmtree(half)
        half.mkdir(parents=True)
    archive.unpack(runs, half)
    with disk.explained(folder):
        half.rename(folder)
    return True


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
