"""The committed pages of claims follow from the committed runs, and the check can fail."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter

from algoperf_shampoo.study import study
from algoperf_shampoo.study.claims import committed, results
from tests.study.claims.test_file import ROOT

LIMIT = 20_000_000  # bytes of all committed records


def test_committed_pages_follow_from_the_committed_runs():
    assert committed.stale(ROOT, ROOT / committed.LIST, write=False) == [], (
        "make tables writes them anew"
    )


def test_the_document_says_what_the_page_says():
    text = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    rows = {row[0]: row for row in re.findall(r"^\| `(\w+)` \|.*\| (\S+) \| (\w+) \|$", text, re.M)}
    record = json.loads((ROOT / "results/measured/claims/claims.json").read_text(encoding="utf-8"))
    said = {c["name"]: (c["name"], f"{c['corrected']:.2g}", c["verdict"]) for c in record["claims"]}
    assert rows == said
    count = Counter(claim["verdict"] for claim in record["claims"])
    for path in ("docs/claims.md", "README.md"):
        words = " ".join((ROOT / path).read_text(encoding="utf-8").split())
        assert (
            f"{count['supported']} are supported, {count['contradicted']} is contradicted, "
            f"{count['undecided']} are undecided"
        ) in words, path


def test_every_declared_study_of_claims_has_a_committed_page():
    declared = {
        path.stem
        for path in study.STUDIES.glob("*.json")
        if "claims" in json.loads(path.read_text(encoding="utf-8"))
    }
    listed = json.loads((ROOT / committed.LIST).read_text(encoding="utf-8"))
    assert {entry["study"] for entry in listed} == declared == {"claims", "family"}


def test_a_page_that_does_not_follow_is_found_and_written_anew(tmp_path):
    # One claim of the study, with copies of the runs of its two arms.
    content = json.loads((study.STUDIES / "claims.json").read_text(encoding="utf-8"))
    arms = {"eshampoo_F20": "eshampoo_fixed", "nadamw": "nadamw"}
    content |= {
        "claims": [claim for claim in content["claims"] if claim["name"] == "eshampoo_nadamw"],
        "arms": {arm: content["arms"][arm] for arm in arms},
        "curves": {},
    }
    (tmp_path / "mine.json").write_text(json.dumps(content))
    runs = json.loads((ROOT / committed.LIST).read_text(encoding="utf-8"))[0]["runs"]
    for label in (f"{variant}_allsteps_evals125" for variant in arms.values()):
        shutil.copytree(ROOT / runs / label, tmp_path / "runs" / label)
    for name in ("submissions", "search_spaces"):
        (tmp_path / name).symlink_to(ROOT / name)
    entry = {"study": str(tmp_path / "mine.json"), "runs": "runs", "stem": "page"}
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([entry]))
    both = ["page.md", "page.json"]
    assert committed.stale(tmp_path, listed, write=False) == both
    assert committed.stale(tmp_path, listed, write=True) == both
    assert committed.stale(tmp_path, listed, write=False) == []
    record, page = tmp_path / "page.json", tmp_path / "page.md"
    assert json.loads(record.read_text())["claims"][0]["verdict"] == "supported"
    assert "](<runs/nadamw_allsteps_evals125>)" in page.read_text()
    record.write_text(record.read_text().replace("supported", "contradicted"))
    assert committed.stale(tmp_path, listed, write=False) == ["page.json"]
    assert committed.stale(tmp_path, listed, write=True) == ["page.json"]
    shutil.rmtree(tmp_path / "runs" / "nadamw_allsteps_evals125" / "study_203")
    assert committed.stale(tmp_path, listed, write=True) == both
    assert "incomplete: 21 of 24 pairs" in page.read_text()
    shutil.rmtree(tmp_path / "runs")
    assert committed.stale(tmp_path, listed, write=True) == both
    assert "**Not run.**" in page.read_text()
    assert json.loads(record.read_text())["claims"][0]["verdict"] == results.NOT_RUN


def test_committed_records_are_small():
    records = [path for path in (ROOT / "results" / "measured").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in records) < LIMIT
    assert not [path for path in records if path.name.startswith("checkpoint_")]
    assert all(path.stat().st_size < LIMIT / 20 for path in records)
