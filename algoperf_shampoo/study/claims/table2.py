"""The paper's Table 2 beside ours: formulas, and the verdicts of a study of claims.

Of one m x n matrix, floating-point operations a step (a product of an a x b with a b x c matrix has
2abc; an eigendecomposition with vectors 9 n^3, Golub and Van Loan, 8.3) and entries of state:

* every rule keeps M, L, R and their roots or bases, mn + 2 (m^2 + n^2) entries, and learns from G
  by 2mn(m + n) operations;
* grafting applies two roots, 2mn(m + n), and keeps Adam's D, mn entries;
* C^Shampoo and S^-1 C^Shampoo2 do without D, but have to be fresh: F = 1;
* EShampoo rotates there and back, 4mn(m + n), and keeps D as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PATH = Path("results") / "paper" / "table2.json"
F = 100
"""Steps between two eigendecompositions of the rules that may be stale."""
BLOCK = (384, 1536)
"""The commonest matrix of ImageNet ViT."""
NEAR = 2.0
"""Within this factor of grafting's operations, and at most its state, a rule matches its cost."""

_FRESH = ("shampoo", "shampoo2_trace")
_JUSTIFIED = {
    "grafting": "the norm is Adam's, by construction",
    "shampoo": "steps off by (mn)^-1/4 (Prop. 1)",
    "shampoo2_trace": "exact on Kronecker products",
    "eshampoo": "D* is the nearest in its basis (Cor. 1)",
}
# Claims that speak on a cell; of several, all.
_STEPS = {
    "shampoo": ("ungrafted_fresh_grafting",),
    "shampoo2_trace": ("trace_scaled_grafting",),
    "eshampoo": ("eshampoo_grafting",),
}
_TRANSFER = {
    "grafting": ("rate_transfers",),
    "shampoo2_trace": ("rate_transfers_trace_scaled",),
    "eshampoo": ("rate_transfers",),
}


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of a mean step, and entries of state, of one matrix."""

    operations: float
    state: int


def cost(rule: str, m: int, n: int) -> Cost:
    """Of a rule on an m x n matrix, at the F that it needs; see the module."""
    product, squares, cubes = m * n * (m + n), m * m + n * n, m**3 + n**3
    turns = 4 if rule == "eshampoo" else 2
    frequency = 1 if rule in _FRESH else F
    moments = 1 if rule in _FRESH else 2
    return Cost(
        operations=(2 + turns) * product + 9 * cubes / frequency,
        state=moments * m * n + 2 * squares,
    )


def speaks_of(verdicts: Mapping[str, str]) -> bool:
    """Whether some claim of a study says something on the table."""
    names = {name for cells in (_STEPS, _TRANSFER) for mine in cells.values() for name in mine}
    return any(name in verdicts for name in names)


def markdown(verdicts: Mapping[str, str], root: Path) -> list[str]:
    """The table as lines: the paper's mark, then what ours say.

    Args:
        verdicts: of the claims there are, by name: also "quick, no verdict", or what is waited for.
    """
    rows = json.loads((root / PATH).read_text(encoding="utf-8"))["rows"]
    reference = cost("grafting", *BLOCK)
    lines = [
        "| rule | justified | matches grafting in steps | in compute and memory | rate transfers |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        rule, own = row["rule"], cost(row["rule"], *BLOCK)
        ratios = own.operations / reference.operations, own.state / reference.state
        near = ratios[0] <= NEAR and ratios[1] <= 1
        cells = [
            row["name"],
            f"{row['justified']}; {_JUSTIFIED[rule]}",
            f"{row['steps']}; {_said(_STEPS.get(rule, ()), verdicts, 'the reference')}",
            f"{row['cost']}; {'yes' if near else 'no'}: {ratios[0]:.1f} x the operations, "
            f"{ratios[1]:.2f} x the state",
            f"{row['transfer']}; {_said(_TRANSFER.get(rule, ()), verdicts, 'no claim')}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    m, n = BLOCK
    lines += [
        "",
        "The paper's mark first, then ours: proved (`tests/optim/test_identities.py`), claimed "
        f"above, or by formula for a {m} x {n} matrix (`algoperf_shampoo/study/claims/table2.py`), "
        f"fresh rules at F = 1 and the others at F = {F}; within {NEAR:g} x the operations and at "
        "most the state of grafting is a match.",
    ]
    return lines


def _said(names: Sequence[str], verdicts: Mapping[str, str], otherwise: str) -> str:
    if not names:
        return otherwise
    return ", ".join(f"{name}: {verdicts.get(name, 'not in this study')}" for name in names)
