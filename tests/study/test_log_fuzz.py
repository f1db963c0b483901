"""Mutated files of every kind: no traceback, no cell that changes without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from algoperf_shampoo.harness import seal
from algoperf_shampoo.study import logs
from tests.harness import fakes
from tests.study import log_fuzz

ROOT = Path(__file__).parents[2]
MINI = ROOT / "results" / "measured" / "mini" / "seeds"
PUBLISHED = ROOT / "tests" / "data" / "published_v06" / "shampoo"
LOGS = ["eval_measurements.csv", "measurements.csv", "meta_data_0.json", "flags_0.json"]
OWN = [*LOGS, "step_losses.csv", "hparams.json", "run.json"]


def minis(to: Path) -> list[Path]:
    labels = ("eshampoo_adaptive", "eshampoo_fixed")
    runs = [p for label in labels for p in sorted(MINI.glob(f"{label}/study_1/*/trial_1"))]
    assert len(runs) == 6
    return list(log_fuzz.copies(runs, to))


def unsealed(path: Path) -> Path:
    record = json.loads((path / "run.json").read_text())
    record.pop(seal.FILES, None), record.pop(seal.RECORD, None)
    (path / "run.json").write_text(json.dumps(record))
    return path


def sealed(path: Path) -> Path:
    record = json.loads((unsealed(path) / "run.json").read_text())
    record[seal.FILES] = seal.make(path)
    (path / "run.json").write_text(json.dumps(seal.signed(record)))
    return path


def fresh(to: Path) -> Path:
    """A run of the embedded harness as it writes it today."""
    spec = fakes.spec_in(to)
    fakes.execute(spec)
    return spec.run_dir


def published(to: Path) -> list[Path]:
    return list(log_fuzz.copies(sorted(PUBLISHED.glob("study_0/*/trial_2")), to))


def under_algoperf(path: Path) -> Path:
    """With a seal, of the seed that its folder names."""
    meta = json.loads((path / log_fuzz.META).read_text())
    seed = int(path.parents[1].name.removeprefix("study_"))
    (path / log_fuzz.META).write_text(json.dumps({**meta, "rng_seed": seed}))
    record = {"format": 1, seal.FILES: seal.make(path)}
    (path / seal.NAME).write_text(json.dumps(seal.signed(record)))
    return path


def run(folders: list[Path], names: list[str], count: int, seed: int) -> log_fuzz.Tally:
    """``count`` mutations over some folders."""
    total = log_fuzz.Tally()
    for number, folder in enumerate(folders):
        here = [name for name in names if (folder / name).is_file()]
        share = count // len(folders) + (number < count % len(folders))
        made = log_fuzz.walk(folder, here, share, seed + number)
        total.files, total.same = total.files + made.files, total.same + made.same
        total.noted += made.noted
        total.legal += made.legal
        total.silent += made.silent
    print(f"{total.files} files: {total.same} same cell, {total.noted} noted, ", end="")
    print(f"{total.legal.total()} legal changes {dict(total.legal)}")
    return total


def with_digest(to: Path, count: int, names: list[str]) -> None:
    """Of a run with a digest no cell changes without a word."""
    folders = [fresh(to / "fresh"), *map(sealed, minis(to / "mini"))]
    folders += map(under_algoperf, published(to / "algoperf"))
    made = run(folders, [*names, seal.NAME], count, seed=9)
    assert made.files == count and made.noted > count / 4
    assert made.silent == [] and not made.legal


def without_digest(to: Path, count: int, names: list[str]) -> None:
    """Without one, none where type, order or range is broken."""
    folders = [*map(unsealed, minis(to / "mini")), *published(to / "published")]
    made = run(folders, names, count, seed=90)
    assert made.files == count and made.noted > count / 4
    assert made.silent == []


def test_a_sample_of_mutated_runs_with_a_digest(tmp_path):
    with_digest(tmp_path, 120, OWN)


def test_a_sample_of_mutated_logs_without_a_digest(tmp_path):
    without_digest(tmp_path, 120, OWN)


@pytest.mark.faults
def test_5000_mutated_files_of_runs_with_a_digest(tmp_path):
    with_digest(tmp_path, 5000, OWN)


@pytest.mark.faults
def test_5000_mutated_files_of_logs_without_a_digest(tmp_path):
    without_digest(tmp_path, 5000, LOGS)


@pytest.mark.faults
def test_5000_mutated_records_and_points(tmp_path):
    names = ["run.json", "hparams.json"]
    with_digest(tmp_path / "with", 2500, names)
    without_digest(tmp_path / "without", 2500, names)


def test_an_untouched_log_carries_no_note():
    """But what is true of it: the excerpt's logs without an end, and without evaluations."""
    for root in (MINI, MINI.parent / "seeds", PUBLISHED):
        for trial in logs.find_trials([root]):
            if trial.outcome != "unknown":
                assert trial.holes == [], trial.path
