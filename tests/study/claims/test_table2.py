"""The paper's Table 2 from formulas and verdicts: operations and state counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from algoperf_shampoo.study import study
from algoperf_shampoo.study.claims import file, table2

ROOT = Path(__file__).parents[3]


def test_by_hand():
    # m = 2, n = 3: GG' has 2*2*3*2 = 24, G'G 2*3*2*3 = 36 operations, 60 in all = 2mn(m + n); as
    # many for Q'G and GQ together. 9 (8 + 27) = 315. L, R and their roots: 2 (4 + 9) = 26 entries.
    assert table2.cost("grafting", 2, 3) == table2.Cost(60 + 60 + 3.15, 12 + 26)
    assert table2.cost("eshampoo", 2, 3) == table2.Cost(60 + 120 + 3.15, 12 + 26)
    assert table2.cost("shampoo", 2, 3) == table2.Cost(60 + 60 + 315, 6 + 26)
    assert table2.cost("shampoo2_trace", 2, 3) == table2.cost("shampoo", 2, 3)


def test_our_column_of_cost_is_the_papers():
    rows = json.loads((ROOT / table2.PATH).read_text())["rows"]
    assert [row["rule"] for row in rows] == ["grafting", "shampoo", "shampoo2_trace", "eshampoo"]
    lines = [line for line in table2.markdown({}, ROOT) if line.startswith("| ")][1:]
    for row, line in zip(rows, lines[-4:], strict=True):
        cell = line.split(" | ")[3]
        assert cell.startswith(f"{row['cost']}; {row['cost']}: "), cell


def test_verdicts_and_what_is_waited_for_stand_in_their_cells():
    text = "\n".join(table2.markdown({"eshampoo_grafting": "supported"}, ROOT))
    assert "yes; eshampoo_grafting: supported" in text
    assert "?; rate_transfers_trace_scaled: not in this study" in text


@pytest.mark.parametrize("cells", [table2._STEPS, table2._TRANSFER])
def test_the_claims_it_names_are_declared(cells: dict[str, tuple[str, ...]]):
    declared = {claim.name for claim in file.read(study.find("claims")).claims}
    assert {name for names in cells.values() for name in names} <= declared
