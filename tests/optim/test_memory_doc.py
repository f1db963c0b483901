"""Memory by variant: what is allocated follows the formula, and docs/performance.md says both."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENTRIES = json.loads((ROOT / "results/measured/cpu/family_entries.json").read_text())
STEPS = json.loads((ROOT / "results/measured/h200/family_step.json").read_text())
TEXT = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
SLACK = 600  # entries: pieces of memory are rounded up

MOMENTS = {"Shampoo": 1, "Shampoo2, trace": 1, "Shampoo, adaptive": 1, "KL-Shampoo": 1}
SUMS = ("Shampoo, adaptive", "KL-Shampoo", "KL-SOAP")  # d_1 + ... + d_k
NAMES = (
    "EShampoo", "EShampoo, 11 bits", "EShampoo, QR", "SOAP", "Shampoo, grafting", "KL-SOAP",
    *MOMENTS,
)  # fmt: skip


def by_formula(name: str, sizes: dict[str, int]) -> int:
    """Entries. Vectors go by Adam: M, D, a gradient and scratch."""
    second = sizes["of order 3"] if name.startswith("KL-") else 0
    return (
        2 * sizes["d1^2 + d2^2"]
        + (MOMENTS.get(name, 2) + 2) * sizes["d1 d2"]
        + second
        + 4 * sizes["vectors"]
        + (sizes["d1 + d2"] if name in SUMS else 0)
    )


def test_what_is_allocated_follows_the_formula():
    for entry in ENTRIES["workloads"]:
        for name in NAMES:
            allocated = entry["contenders"][name]["allocated_entries"]
            expected = by_formula(name, entry["entries_by_formula"])
            assert expected <= allocated <= expected + SLACK, (name, entry["workload"])


def test_the_document_has_formula_and_measurement_side_by_side():
    workloads = {entry["workload"]: entry for entry in ENTRIES["workloads"]}
    (steps,) = STEPS["workloads"]
    lines = [line.strip("| \n").split("|") for line in TEXT.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line] for line in lines]
    rows = {c[0]: [*c[3:], ""][:5] for c in cells if len(c) > 6 and c[1].startswith("M")}
    assert set(rows) == set(NAMES)
    for name, (*millions, mib, measured) in rows.items():
        found = [
            workloads[w]["contenders"][name]["allocated_entries"]
            for w in ("imagenet_vit", "fastmri", "ogbg")
        ]
        assert millions == [f"{n / 1e6:.1f}" for n in found], name
        sizes = workloads["imagenet_vit"]["entries_by_formula"]
        assert mib == f"{4 * by_formula(name, sizes) / 2**20:.0f}", name
        held = steps["contenders"].get(name, {}).get("held_mib")
        assert measured == ("" if held is None else f"{held:.0f}"), name
