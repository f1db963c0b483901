"""docs/implementations.md shows what the record holds."""

import json
from pathlib import Path

from benchmarks.implementations import AGREES, table

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "results/measured/cpu/implementations.json").read_text())


def test_the_documents_table_is_the_records():
    assert table(RECORD) in (ROOT / "docs/implementations.md").read_text()


def test_the_lists_of_terms_are_complete():
    """With all terms theirs, every implementation is reproduced; the others have none."""
    assert len(RECORD["rows"]) > 20
    for row in RECORD["rows"]:
        assert row["with_all_terms"] < 1e-7, row["name"]
        assert (row["from_reference"] < AGREES) == (not row["terms"]), row["name"]


def test_the_document_names_the_versions_of_the_record():
    text = (ROOT / "docs/implementations.md").read_text()
    for version in RECORD["versions"].values():
        assert version[:8] in text
