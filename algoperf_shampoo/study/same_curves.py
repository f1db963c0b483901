"""Whether two commits train the same curves, to the bit: ``make same-curves BEFORE=commit``.

Both trees run the same short minis on this machine, with the points and workload files of the later
one and with targets that no run reaches, and the parameters' hashes and the losses of every step
are compared. A hash of parameters says nothing on another kind of CPU, so none is kept in the repo.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import submission_loader
from algoperf_shampoo.study import repeat, targets


@dataclass(frozen=True)
class Pair:
    """One run in both trees: whether it ended the same, and where it parted if not."""

    name: str
    same: bool
    lines: tuple[str, ...]


def recorded_commit(runs: Path) -> str:
    """The one commit that all records below a folder come from.

    Raises:
        UserError: there are no records, or they are of several commits or of changed files.
    """
    found: dict[tuple[str, bool], Path] = {}
    for path in sorted(runs.rglob("run.json")):
        for session in repeat.read(path.parent).record.get("sessions") or [{}]:
            key = (str(session.get("git_commit_hash")), bool(session.get("git_dirty")))
            found.setdefault(key, path.parent)
    commits = sorted(found)
    if len(commits) != 1 or commits[0][1]:
        have = "; ".join(
            f"{commit}{' with changes' if dirty else ''} ({found[commit, dirty]})"
            for commit, dirty in commits
        )
        raise UserError(f"{runs}: records of one commit without changes are wanted: {have or 0}")
    return commits[0][0]


def checkout(root: Path, commit: str, folder: Path) -> str:
    """The files of a commit in ``folder``, a new one; returns the commit's full name.

    Raises:
        UserError: ``root`` is no clone, or has no such commit.
    """
    spec = f"{commit}^{{commit}}"
    named = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", spec)
    if named.returncode:
        why = _git(root, "rev-parse", "--git-dir").returncode
        wrong = "not a git clone" if why else "no such commit here"
        raise UserError(f"{commit}: {wrong}; a name that git rev-parse knows is right")
    name = named.stdout.decode().strip()
    archive = _git(root, "archive", "--format=tar", name)
    if archive.returncode:
        raise UserError(f"{commit}: git archive: {archive.stderr.decode(errors='replace').strip()}")
    folder.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return name


def in_both(before: Path, after: Path) -> tuple[list[str], list[str]]:
    """Variants that both trees have, and those that one of them has alone."""
    old, new = (set(submission_loader.variants(tree)) for tree in (before, after))
    return sorted(old & new), sorted(old ^ new)


def train(
    tree: Path,
    out: Path,
    points: Path,
    variants: Sequence[str],
    workload: str,
    steps: int,
    echo: Callable[[str], None],
) -> None:
    """Run each variant's mini in a tree, at the points and workload files of ``points``.

    ``points``: a tree with ``search_spaces/mini`` and ``workloads_config``.

    Raises:
        UserError: a run failed; its last line is told.
    """
    configs = out / "configs"
    targets.write_unreachable(sorted((points / "workloads_config").glob("*.json")), configs)
    for variant in variants:
        echo(f"{variant} in {tree}")
        command = [
            *(sys.executable, str(tree / "scripts" / "submit.py"), f"--variant={variant}"),
            *(f"--workload={workload}", "--seeds=1,", f"--steps={steps}", f"--out={out}"),
            f"--search_space={points / 'search_spaces' / 'mini' / f'{variant}.json'}",
            f"--workloads_config={configs}",
        ]
        done = subprocess.run(
            command,
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if done.returncode:
            last = next(iter(reversed(done.stdout.strip().splitlines())), "no output")
            raise UserError(f"{tree}: {variant}: exit code {done.returncode}: {last}")


def compare(before: Path, after: Path) -> list[Pair]:
    """The runs below two folders, pair by pair.

    Raises:
        UserError: there are none, or a run is below one of the two alone or not finished.
    """
    sides = [{p.parent.relative_to(top): p.parent for p in top.rglob("run.json")}
             for top in (before, after)]  # fmt: skip
    if not sides[0] or sides[0].keys() != sides[1].keys():
        odd = sorted(map(str, sides[0].keys() ^ sides[1].keys()))
        raise UserError(f"{before}, {after}: not the same runs: {', '.join(odd) or 'none at all'}")
    pairs = []
    for name in sorted(sides[0]):
        old, new = (repeat.read(side[name]) for side in sides)
        for run in (old, new):
            if not (run.record.get("result") or {}).get("params_sha256"):
                raise UserError(f"{run.folder}: not finished")
        same, lines = repeat.compare(old, new)
        # Equal parameters at the end with other losses on the way are not the same curve.
        same = same and not any(line.startswith("losses: apart") for line in lines)
        pairs.append(Pair(_name(new), same, tuple(lines)))
    return pairs


def report(pairs: Sequence[Pair]) -> list[str]:
    """Lines to print: one a run, and where those that differ part."""
    lines = []
    for pair in pairs:
        lines.append(f"{'same     ' if pair.same else 'different'}  {pair.name}")
        if not pair.same:
            lines += [f"           {line}" for line in pair.lines]
    same = sum(pair.same for pair in pairs)
    return [*lines, f"{same} of {len(pairs)} curves are the same to the bit"]


def _name(run: repeat.Recorded) -> str:
    identity = run.identity
    return f"{identity['variant']} {identity['workload']} seed {identity['seed']}"


def _git(root: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True)
    except FileNotFoundError:
        raise UserError("git: no such program") from None
