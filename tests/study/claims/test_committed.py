"""The committed pages of claims follow from the committed runs, and the check can fail."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import statistics
from collections import Counter

import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import study
from algoperf_shampoo.study.claims import archive, committed, results
from algoperf_shampoo.study.plan import WORKLOADS
from tests.study.claims.test_file import ROOT

LIMIT = 20_000_000  # bytes of all committed records


def test_committed_pages_follow_from_the_committed_runs():
    assert committed.stale(ROOT, ROOT / committed.LIST, write=False) == [], (
        "make tables writes them anew"
    )


def test_the_document_says_what_the_pages_say():
    text = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    row = r"^\| `(\w+)` \|.*\| ([^|]+) \| (\S+) \| (\w+) \|$"
    rows = {name: rest for name, *rest in re.findall(row, text, re.M)}
    pages = committed.pages(ROOT, ROOT / committed.LIST)
    records = [json.loads(p.stem.with_suffix(".json").read_text(encoding="utf-8")) for p in pages]
    claims = {claim["name"]: claim for record in records for claim in record["claims"]}
    assert rows.keys() == claims.keys()
    for name, (effects, corrected, verdict) in rows.items():
        claim = claims[name]
        assert (corrected, verdict) == (f"{claim['corrected']:.2g}", claim["verdict"]), name
        parts = [list(part.values()) for part in claim["effects"]]  # of one of them, in percent
        forms = ("{:+.3f}".format, lambda effect: f"{100 * effect:+.2f}%")
        assert effects in [", ".join(map(form, p)) for p in parts for form in forms], name
    for record in records:
        count = Counter(claim["verdict"] for claim in record["claims"])
        said = ", ".join(
            f"{count[word]} {'is' if count[word] == 1 else 'are'} {word}"
            for word in ("supported", "contradicted", "undecided")
        )
        for path in ("docs/claims.md", "README.md"):
            words = " ".join((ROOT / path).read_text(encoding="utf-8").split())
            assert f"of {len(record['claims'])} " in words and said in words, path


def test_the_document_says_how_many_rates_are_at_an_edge():
    record = json.loads((ROOT / "results/measured/claims/family.json").read_text(encoding="utf-8"))
    grids = [(r["rate"], sorted(map(float, r["losses"]))) for r in record["rates"]]
    largest = sum(rate == grid[-1] for rate, grid in grids)
    assert not any(rate == grid[0] for rate, grid in grids)
    text = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    assert f"Of {len(grids)} rates {largest} are the largest of their grid" in text


def test_every_declared_study_of_claims_has_a_committed_page():
    declared = {
        path.stem
        for path in study.STUDIES.glob("*.json")
        if "claims" in json.loads(path.read_text(encoding="utf-8"))
    }
    listed = json.loads((ROOT / committed.LIST).read_text(encoding="utf-8"))
    assert {entry["study"] for entry in listed} == declared == {"claims", "family"}


def test_every_mean_leads_to_the_logs_that_it_is_of():
    """By the link beside it alone: the archive, the folder in it, the losses of the steps there."""
    cell = re.compile(r"([\d.]+|\d+ not finite) \(\[n = (\d+)\]\(<([^>#]+)#([^>]+)>\)\)")
    rate = re.compile(r"\[[\d.e-]+\]\(<([^>#]+)#([^>]+)>\): ([\d.]+|inf)")
    for page in committed.pages(ROOT, ROOT / committed.LIST):
        if page.runs is None:
            continue
        content = dict(archive.members(page.runs))
        text = page.stem.with_suffix(".md").read_text(encoding="utf-8")
        rows = re.findall(r"^\| \w+ \| loss \|(.*)\|$", text, re.M)
        assert rows and all(len(cell.findall(row)) == 3 for row in rows)
        for row in rows:
            for mini, (said, count, path, label) in zip(WORKLOADS, cell.findall(row), strict=True):
                assert page.stem.parent / path == page.runs
                means = losses(content, label, mini)
                assert len(means) == int(count) and said == shown(means, ".4f"), (label, mini)
        tuned = re.findall(r"^\| \w+ \| (\w+) \| [\d.e-]+ \|(.*)\|.*\|$", text, re.M)
        assert bool(tuned) == (page.study == "family")
        for mini, grid in tuned:
            assert len(rate.findall(grid)) == 5
            for path, label, said in rate.findall(grid):
                assert page.stem.parent / path == page.runs
                assert said == shown(losses(content, label, mini), ".4g"), (label, mini)


def losses(content: dict[str, bytes], label: str, mini: str) -> list[float]:
    """The mean of the last 50 losses of every run of a label on a mini, from the logs' bytes."""
    pattern = rf"{re.escape(label)}/study_\d+/{mini}_mini_pytorch/trial_1/step_losses.csv"
    found = []
    for name in (name for name in content if re.fullmatch(pattern, name)):
        rows = list(csv.DictReader(content[name].decode().splitlines()))
        last = [float(row["loss"]) for row in rows if int(row["global_step"]) > 450]
        found.append(statistics.fmean(last) if len(last) == 50 else math.inf)
    return found


def shown(values: list[float], form: str) -> str:
    bad = sum(not math.isfinite(value) for value in values)
    if bad:
        return f"{bad} not finite" if form == ".4f" else "inf"
    return f"{statistics.fmean(values):{form}}"


def test_every_run_of_a_record_is_in_its_archive():
    for page in committed.pages(ROOT, ROOT / committed.LIST):
        record = json.loads(page.stem.with_suffix(".json").read_text(encoding="utf-8"))
        assert bool(record["runs"]) == (page.runs is not None)
        for run in record["runs"]:
            path, _, folder = run["folder"].partition("#")
            assert ROOT / path == page.runs
        if page.runs is not None:
            there = {name.rpartition("/")[0] for name, _ in archive.members(page.runs)}
            assert {run["folder"].partition("#")[2] for run in record["runs"]} <= there
    archives = set((ROOT / "results" / "measured" / "claims").rglob("*.tar.xz"))
    assert archives == {p.runs for p in committed.pages(ROOT, ROOT / committed.LIST) if p.runs}


@pytest.fixture
def one_claim(tmp_path):
    """A list with a page of one claim of the study, and its archive of the runs of its two arms."""
    content = json.loads((study.STUDIES / "claims.json").read_text(encoding="utf-8"))
    arms = {"eshampoo_F20": "eshampoo_fixed", "nadamw": "nadamw"}
    content |= {
        "claims": [claim for claim in content["claims"] if claim["name"] == "eshampoo_nadamw"],
        "arms": {arm: content["arms"][arm] for arm in arms},
        "curves": {},
    }
    (tmp_path / "mine.json").write_text(json.dumps(content))
    labels = tuple(f"{variant}_allsteps_evals125/" for variant in arms.values())
    runs = committed.pages(ROOT, ROOT / committed.LIST)[0].runs
    for name, data in archive.members(runs):
        if name.startswith(labels):
            (tmp_path / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "runs" / name).write_bytes(data)
    for name in ("submissions", "search_spaces"):
        (tmp_path / name).symlink_to(ROOT / name)
    entry = {"study": str(tmp_path / "mine.json"), "runs": "runs.tar.xz", "stem": "page"}
    (tmp_path / "list.json").write_text(json.dumps([entry]))
    return entry


def test_a_page_that_does_not_follow_is_found_and_written_anew(tmp_path, one_claim):
    listed = tmp_path / "list.json"
    (page,) = committed.pages(tmp_path, listed)
    assert committed.pack(tmp_path, page, tmp_path / "runs") == (48, [])
    both = ["page.md", "page.json"]
    assert committed.stale(tmp_path, listed, write=False) == both
    assert committed.stale(tmp_path, listed, write=True) == both
    assert committed.stale(tmp_path, listed, write=False) == []
    record, text = tmp_path / "page.json", tmp_path / "page.md"
    assert json.loads(record.read_text())["claims"][0]["verdict"] == "supported"
    assert "](<runs.tar.xz#nadamw_allsteps_evals125>)" in text.read_text()
    record.write_text(record.read_text().replace("supported", "contradicted"))
    assert committed.stale(tmp_path, listed, write=False) == ["page.json"]
    assert committed.stale(tmp_path, listed, write=True) == ["page.json"]
    shutil.rmtree(tmp_path / "runs" / "nadamw_allsteps_evals125" / "study_203")
    count, missing = committed.pack(tmp_path, page, tmp_path / "runs")
    assert count == 45 and len(missing) == 3 and all("203" in name for name in missing)
    assert committed.stale(tmp_path, listed, write=True) == both
    assert "incomplete: 21 of 24 pairs" in text.read_text()
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(UserError, match="none of the 48 runs of .*mine.json is done there"):
        committed.pack(tmp_path, page, tmp_path / "runs")
    listed.write_text(json.dumps([{**one_claim, "runs": None}]))
    assert committed.stale(tmp_path, listed, write=True) == both
    assert "**Not run.**" in text.read_text()
    assert json.loads(record.read_text())["claims"][0]["verdict"] == results.NOT_RUN
    with pytest.raises(UserError, match="runs is null: name the archive"):
        committed.pack(tmp_path, committed.pages(tmp_path, listed)[0], tmp_path / "runs")


def test_runs_are_found_when_their_variants_point_and_so_their_label_has_changed(
    tmp_path, one_claim
):
    listed = tmp_path / "list.json"
    (page,) = committed.pages(tmp_path, listed)
    committed.pack(tmp_path, page, tmp_path / "runs")
    committed.stale(tmp_path, listed, write=True)
    (tmp_path / "search_spaces").unlink()
    shutil.copytree(ROOT / "search_spaces", tmp_path / "search_spaces")
    space = tmp_path / "search_spaces" / "mini" / "nadamw.json"
    (point,) = json.loads(space.read_text())
    assert point["learning_rate"] == 0.004
    space.write_text(json.dumps([{**point, "learning_rate": 0.008}]))
    assert committed.stale(tmp_path, listed, write=False) == []
    space.write_text(json.dumps([{**point, "weight_decay": 0.5}]))  # they are others now
    assert committed.stale(tmp_path, listed, write=False) == ["page.md", "page.json"]


def test_a_damaged_archive_is_named_and_changes_no_page(tmp_path, one_claim):
    listed = tmp_path / "list.json"
    (page,) = committed.pages(tmp_path, listed)
    committed.pack(tmp_path, page, tmp_path / "runs")
    committed.stale(tmp_path, listed, write=True)
    before = (tmp_path / "page.md").read_bytes()
    page.runs.write_bytes(page.runs.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{page.runs}: damaged"):
        committed.stale(tmp_path, listed, write=True)
    with pytest.raises(UserError, match=rf"{page.runs}: damaged"):
        committed.unpack(page.runs, tmp_path / "out" / "mine")
    assert not (tmp_path / "out" / "mine").exists()
    assert (tmp_path / "page.md").read_bytes() == before
    committed.pack(tmp_path, page, tmp_path / "runs")
    assert committed.unpack(page.runs, tmp_path / "out" / "mine")  # what is left of it is no matter
    assert not committed.unpack(page.runs, tmp_path / "out" / "mine")
    there = sorted(p.relative_to(tmp_path / "runs") for p in (tmp_path / "runs").rglob("*"))
    out = tmp_path / "out" / "mine"
    assert sorted(path.relative_to(out) for path in out.rglob("*")) == there
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_committed_records_are_small():
    records = [path for path in (ROOT / "results" / "measured").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in records) < LIMIT
    assert not [path for path in records if path.name.startswith("checkpoint_")]
    texts = [path for path in records if not path.name.endswith(archive.SUFFIX)]
    assert all(path.stat().st_size < LIMIT / 20 for path in texts)
