"""The text of a pull request to mlcommons/submissions_algorithms, for an exported submission.

The headings and the YAML block are those of their template; the evidence is made from run records:
full-size runs with exactly the exported hyperparameters, the minis of the same variant, and the
paper's own rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from algoperf_shampoo import json_input, points
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import submission_loader
from algoperf_shampoo.study import differences, export, memory, table_files, tables
from algoperf_shampoo.study.logs import Trial, size_of

PAPER = (
    "Eschenhagen et al., Purifying Shampoo: Investigating Shampoo's Heuristics by Decomposing its "
    "Preconditioner, https://arxiv.org/abs/2506.03595"
)


def compose(
    root: Path, folder: Path, trials: Sequence[Trial], authors: str, affiliations: str
) -> str:
    """The pull request's text, for the export in ``folder``.

    Args:
        root: the repository.
        trials: records the evidence is made from.
        authors, affiliations: those of the export where they are empty.

    Raises:
        UserError: no export, or one that was changed since; no authors; text that their workflows
            would not take as it is.
    """
    record = _record(folder)
    variant, ruleset = record["variant"], record["ruleset"]
    authors = authors or str(record.get("authors", ""))
    affiliations = affiliations or str(record.get("affiliations", ""))
    if not authors.strip():
        raise UserError("AUTHORS= is needed: their check of pull requests wants it")
    block = export.info(root, variant, record["settings"], ruleset, authors, affiliations)
    own = [t for t in trials if _variant(t, root) == variant and t.framework == "pytorch"]
    fields = submission_loader.fields(root, variant)
    full = [t for t in own if size_of(t.workload) == "full" and _same_point(t, record, fields)]
    minis = [t for t in own if size_of(t.workload) == "mini"]
    made = submission_loader.optimizer(root, variant)
    parts = [
        "# New Submission",
        "## Submission Information",
        f"```yaml\n{export.info_text(block)}```",
        "## Evidence for the Submission's Performance",
        f"The algorithm: {PAPER}.",
        "### Full-size runs with exactly the hyperparameters of this submission",
        _tables(full, root) or "None in the records that this text was made from.",
        "### The paper's own runs of this variant",
        _paper(root, variant) or "None.",
        "### Small models",
        "Small models of the same code on little data, with hyperparameters and targets of their "
        "own, to compare variants; not AlgoPerf's workloads.",
        _tables(minis, root) or "None in the records that this text was made from.",
        "## Comments",
        "Memory of one GPU by formula, on the parameter shapes of AlgoPerf's models:",
        "\n".join(f"- {line}" for line in memory.preview(record["points"][0], optimizer=made)),
    ]
    return "\n\n".join(parts) + "\n"


def exports(out: Path) -> list[Path]:
    """Folders of exports below ``out``, sorted."""
    return sorted(path.parent for path in out.glob(f"*/*/{export.RECORD}"))


def _record(folder: Path) -> dict[str, Any]:
    """``export.json`` with the points in ``points``, after a look at the files."""
    path = folder / export.RECORD
    record = json_input.read(path, "record of an export; make export-<variant> writes one")
    wanted = {"variant": str, "ruleset": str, "settings": dict, "sha256": dict}
    for key, kind in wanted.items():
        if not isinstance(record, dict) or not isinstance(record.get(key), kind):
            raise UserError(f"{path}: {key} is missing: an older export? make it again")
    for name, digest in record["sha256"].items():
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise UserError(f"{file}: not as it was exported; make export-<variant> again")
    if record["ruleset"] == "self":
        return {**record, "points": [record["point"]]}
    space = json_input.read(folder / "tuning_search_space.json")
    if not isinstance(space, list):
        raise UserError(f"{folder}: a search space of ranges: write its evidence by hand")
    return {**record, "points": space}


def _variant(trial: Trial, root: Path) -> str | None:
    return differences.variant_of(trial, submission_loader.variants(root))


def _same_point(trial: Trial, record: dict[str, Any], fields: Sequence[str]) -> bool:
    """Whether a run had one of the exported points, defaults filled in."""
    try:
        here = points.check(trial.hparams or {}, fields)
    except points.PointError:
        return False
    return any(here == points.check(point, fields) for point in record["points"])


def _tables(trials: Sequence[Trial], root: Path) -> str:
    return table_files.to_markdown(tables.of_runs(trials, root)).strip() if trials else ""


def _paper(root: Path, variant: str) -> str:
    """Rows of the paper's Table 1 of one variant, as Markdown."""
    lines = []
    for row in tables.read_paper(root / "results" / "paper" / "table1.json"):
        if row["variant"] == variant:
            steps = tables.Estimate(row["steps_mean"], row["steps_se"], row["hits"]).text(0)
            minutes = tables.Estimate(row["time_min_mean"], row["time_min_se"], row["hits"]).text(2)
            hits = f"{row['hits']}/{row['runs']}"
            lines.append(f"| {row['workload']} | {row['name']} | {hits} | {steps} | {minutes} |")
    head = ["| workload | | hits | steps to target | minutes |", "| --- | --- | --- | --- | --- |"]
    return "\n".join(head + lines) if lines else ""
