"""Two commits train the same curves, or it is said which run parts where."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
from pathlib import Path

import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import same_curves
from algoperf_shampoo.study.claims import archive

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "results" / "measured" / "mini" / "seeds"
AGAIN = ROOT / "results" / "measured" / "mini" / "again_runs.tar.xz"


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_a_checkout_is_the_commits_files_alone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    git(clone, "init", "-q")
    names = []
    for text in ("one", "two"):
        (clone / "file").write_text(text)
        git(clone, "add", "file")
        git(clone, "commit", "-q", "-m", text)
        names.append(git(clone, "rev-parse", "HEAD"))
    (clone / "file").write_text("three")
    (clone / "other").write_text("not committed")
    assert same_curves.checkout(clone, "HEAD~1", tmp_path / "one") == names[0]
    assert same_curves.checkout(clone, names[1], tmp_path / "two") == names[1]
    assert [p.name for p in (tmp_path / "two").iterdir()] == ["file"]
    assert [(tmp_path / n / "file").read_text() for n in ("one", "two")] == ["one", "two"]
    for wrong in ("nothing", "--help", ""):
        with pytest.raises(UserError, match="no such commit here"):
            same_curves.checkout(clone, wrong, tmp_path / "three")
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match="not a git clone"):
        same_curves.checkout(tmp_path / "plain", "HEAD", tmp_path / "three")


def run(folder: Path, digest: str | None, losses: list[float], **session: object) -> None:
    path = folder / "nadamw" / "study_1" / "ogbg_mini_pytorch" / "trial_1"
    path.mkdir(parents=True)
    identity = {"variant": "nadamw", "label": "nadamw", "workload": "ogbg_mini", "seed": 1}
    identity |= {"trial": 1, "hparams": {}, "workload_properties": {}}
    record = {"format": 1, "status": "finished", "identity": identity, "sessions": [session]}
    (path / "run.json").write_text(json.dumps(record | {"result": {"params_sha256": digest}}))
    rows = [f"{step},{loss}\n" for step, loss in enumerate(losses, start=1)]
    (path / "step_losses.csv").write_text("global_step,loss\n" + "".join(rows))


@pytest.mark.parametrize(
    ("digest", "losses", "said"),
    [
        ("aa", [0.5, 0.4], ""),
        ("bb", [0.5, 0.3], "losses: apart from step 2 on, 0.4 and 0.3"),
        ("bb", [0.5, 0.4], "bb here"),
        ("aa", [0.6, 0.4], "losses: apart from step 1 on"),
    ],
)
def test_curves_are_compared_by_hash_and_losses(
    tmp_path: Path, digest: str, losses: list[float], said: str
) -> None:
    run(tmp_path / "before", "aa", [0.5, 0.4])
    run(tmp_path / "after", digest, losses)
    (pair,) = same_curves.compare(tmp_path / "before", tmp_path / "after")
    assert pair.same == (said == "") and pair.name == "nadamw ogbg_mini seed 1"
    text = "\n".join(same_curves.report([pair]))
    assert said in text and f"{int(pair.same)} of 1 curves are the same to the bit" in text


def test_variants_of_one_tree_alone_are_left_out(tmp_path: Path) -> None:
    for tree, names in (("before", ("nadamw", "old")), ("after", ("nadamw", "soap"))):
        for name in names:
            folder = tmp_path / tree / "submissions" / name
            folder.mkdir(parents=True)
            (folder / "submission.py").touch()
    found = same_curves.in_both(tmp_path / "before", tmp_path / "after")
    assert found == (["nadamw"], ["old", "soap"])


def test_nothing_is_compared_with_nothing(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    after.mkdir()
    with pytest.raises(UserError, match="not the same runs: none at all"):
        same_curves.compare(before, after)
    run(before, "aa", [0.5])
    with pytest.raises(UserError, match="not the same runs: nadamw/study_1"):
        same_curves.compare(before, after)
    run(after, None, [0.5])
    with pytest.raises(UserError, match="after.*: not finished"):
        same_curves.compare(before, after)


def test_the_commit_of_records(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="records of one commit .*: 0"):
        same_curves.recorded_commit(tmp_path)
    run(tmp_path / "one", "aa", [], git_commit_hash="c1", git_dirty=False)
    assert same_curves.recorded_commit(tmp_path) == "c1"
    run(tmp_path / "two", "aa", [], git_commit_hash="c1", git_dirty=True)
    with pytest.raises(UserError, match=r"c1 with changes \(.*two"):
        same_curves.recorded_commit(tmp_path)
    run(tmp_path / "three", "aa", [], git_commit_hash="c2", git_dirty=False)
    with pytest.raises(UserError, match=r"c2 \(.*three"):
        same_curves.recorded_commit(tmp_path)


def test_the_document_says_what_the_runs_made_again_gave() -> None:
    """Table 1's runs after weight decay's rounding had changed: the same points, data and seeds."""
    text = (ROOT / "docs" / "minis.md").read_text(encoding="utf-8")
    steps: dict[tuple[str, str], list[tuple[int | None, int | None]]] = {}
    with archive.unpacked(AGAIN) as there:
        for path in sorted(there.folder.rglob("run.json")):
            inside = path.relative_to(there.folder)
            before, after = (json.loads((r / inside).read_text()) for r in (RECORDS, there.folder))
            assert before["identity"]["hparams"] == after["identity"]["hparams"]
            both = tuple(record["result"]["steps_to_target"] for record in (before, after))
            steps.setdefault((inside.parts[2].split("_mini")[0], inside.parts[0]), []).append(both)
    pairs = [pair for found in steps.values() for pair in found]
    assert len(pairs) == 60
    assert f"{sum(a == b for a, b in pairs)} of 60 hit at the same evaluation" in text
    for (mini, label), found in steps.items():
        cells = []
        for values in zip(*found, strict=True):
            hits = [v for v in values if v is not None]
            error = statistics.stdev(hits) / math.sqrt(len(hits))
            cells.append(f"{len(hits)}/5, {statistics.fmean(hits):.0f} ± {error:.0f}")
        assert f"| {mini} | `{label}` | {' | '.join(cells)} |" in text


@pytest.mark.slow
def test_the_committed_minis_are_what_the_code_trains(tmp_path: Path) -> None:
    """Between the commit of the records and the files here no curve of these has moved."""
    with archive.unpacked(AGAIN) as there:
        commit = same_curves.recorded_commit(there.folder)
    try:
        same_curves.checkout(ROOT, commit, tmp_path / "before")
    except UserError as error:
        pytest.skip(str(error))  # a copy without history
    variants = ["shampoo_grafting", "eshampoo_fixed", "eshampoo_adaptive"]
    for name, tree in (("b", tmp_path / "before"), ("a", ROOT)):
        same_curves.train(tree, tmp_path / name, ROOT, variants, "all", 45, print)
    pairs = same_curves.compare(tmp_path / "b", tmp_path / "a")
    assert len(pairs) == 9
    assert all(pair.same for pair in pairs), "\n".join(same_curves.report(pairs))
