"""What runs will cost, before they are launched: time, money, memory; each figure with its source.

Seconds a step are those of our own finished runs of the same variant on the same workload, where
there are any, else a published baseline's with our optimizer's measured share added. Steps are
those that our own runs needed to the target, else the paper's; at most, a run spends its budget.
"""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from algoperf_shampoo import versions
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import submission_loader
from algoperf_shampoo.harness.spec import MINI, MINIDATA, RunSpec
from algoperf_shampoo.study import differences, memory
from algoperf_shampoo.study.logs import Trial

ROOT = Path(__file__).resolve().parents[2]
GIB = 2.0**30
WIDTH = 100
# float16 products of tensor cores, TFLOP/s without sparsity, by NVIDIA's data sheets. Our step is
# bound by such products and by memory (3.35 and 1.56 TB/s, a ratio of 2.1): the larger ratio is
# taken.
H100_OVER_A100 = 989.0 / 312.0
_CONTENDERS = {
    "nadamw": "torch AdamW",
    "shampoo_grafting": "our Shampoo + grafting, fp32",
    "eshampoo_fixed": "ours, fp32",
    "eshampoo_adaptive": "ours, fp32",
}


@dataclass(frozen=True)
class Cost:
    """Runs that differ in their seeds alone. Times are of one run, None for unknown.

    ``step_s`` is submission time a step, of which ``share_s`` is our optimizer's where it is known
    apart. ``hours`` are of wall time until the target, ``hours_at_most`` until the budget is spent.
    ``gib`` is the peak memory of one GPU. ``gpus`` is 0 for a CPU.
    """

    name: str
    workload: str
    runs: int
    gpus: int
    step_s: float | None = None
    share_s: float | None = None
    steps: float | None = None
    hours: float | None = None
    hours_at_most: float | None = None
    gib: float | None = None
    sources: tuple[str, ...] = ()

    def money(self, hours: float | None, price: float) -> float | None:
        """Of one run, at a price of an hour of one GPU."""
        return None if hours is None else hours * self.gpus * price


def parse_price(text: str) -> float:
    """PRICE, the money for an hour of one GPU.

    Raises:
        UserError: no number of at least 0.
    """
    try:
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not 0 <= value < 1e9:
        raise UserError(f"PRICE={text[:40]}: the price of an hour of one GPU, at least 0")
    return value


def preview(
    runs: Sequence[RunSpec],
    price: float | None = None,
    gpus: int | Mapping[str, int] | None = None,
    *,
    version: str = versions.DEFAULT,
    ruleset: str = "external",
    records: Iterable[Trial] = (),
    root: Path = ROOT,
) -> list[str]:
    """What the runs will cost, as lines of at most 100 columns.

    Args:
        runs: of a plan; those that differ in their seeds alone are one line.
        price: of an hour of one GPU; None leaves money out.
        gpus: of one run, or by workload; None takes those of the published seconds a step.
        version: of the benchmark, whose budgets hold; ruleset: AlgoPerf's, which may lengthen them.
        records: runs of ours, read; those that ended are gone by.
    """
    costs = estimate(runs, gpus, version=version, ruleset=ruleset, records=records, root=root)
    card = memory.CARD_GIB[version]
    heading = ["of one run", "runs", "s/step", "ours, ms", "steps", "hours", "at most"]
    heading += ["money", "at most"] if price is not None else []
    table = {id(cost): _cells(cost, price) for cost in costs}
    widths = [max(map(len, column)) for column in zip(heading, *table.values(), strict=True)]
    count = sum(cost.runs for cost in costs)
    lines = [f"cost of {count} run{'s' * (count != 1)}:", _aligned(heading, widths)]
    for workload in dict.fromkeys(cost.workload for cost in costs):
        own = [cost for cost in costs if cost.workload == workload]
        lines.append(_place(own))
        lines += [_aligned(table[id(cost)], widths) for cost in own]
    lines += _totals(costs, price)
    for cost in costs:
        if cost.gib is not None and cost.gib > card:
            need = f"{cost.workload} {cost.name} needs {cost.gib:.0f} GiB a GPU"
            lines.append(f"warning: {need}; the cards of {version} have {card}")
    lines += [f"- {source}" for source in dict.fromkeys(s for c in costs for s in c.sources)]
    return [part for line in lines for part in _wrapped(line)]


def estimate(
    runs: Sequence[RunSpec],
    gpus: int | Mapping[str, int] | None = None,
    *,
    version: str = versions.DEFAULT,
    ruleset: str = "external",
    records: Iterable[Trial] = (),
    root: Path = ROOT,
) -> list[Cost]:
    """One :class:`Cost` for each kind of run, in the order of the first of each."""
    kinds: dict[tuple[str, str, str], list[RunSpec]] = {}
    for run in runs:
        point = json.dumps(run.hparams, sort_keys=True, default=str)
        kinds.setdefault((run.workload, run.label, point), []).append(run)
    ended = [t for t in records if t.outcome in ("hit", "miss") and t.evaluations]
    return [_cost(group, gpus, version, ruleset, ended, root) for group in kinds.values()]


def _cost(
    group: Sequence[RunSpec],
    gpus: int | Mapping[str, int] | None,
    version: str,
    ruleset: str,
    ended: Sequence[Trial],
    root: Path,
) -> Cost:
    first = group[0]
    full = not first.workload.endswith((MINI, MINIDATA))
    settings = " ".join(text.replace(" ", "") for text in differences.settings(first.hparams, []))
    cost = Cost(
        name=f"{first.variant} {settings}".strip(),
        workload=first.workload,
        runs=len(group),
        gpus=_gpus(gpus, first.workload, root) if full else 0,
    )
    own = _own(first, ended, root)
    if own:
        cost = _from_records(cost, own)
    elif full:
        cost = _from_published(cost, first, root)
    else:
        source = f"{first.workload}: no run of ours to go by"
        cost = replace(cost, sources=(source,))
    if full:
        cost = _with_memory(_with_budget(cost, version, ruleset, root), first, root)
    return cost


def _own(run: RunSpec, ended: Sequence[Trial], root: Path) -> list[Trial]:
    variants = submission_loader.variants(root)
    return [
        trial
        for trial in ended
        if trial.workload == run.workload
        and differences.variant_of(trial, variants) == run.variant
        and trial.evaluations[-1].step > 1
    ]


def _from_records(cost: Cost, own: Sequence[Trial]) -> Cost:
    last = [trial.evaluations[-1] for trial in own]
    # A run goes on to its test target, or to its budget: what it took in all is what it costs.
    wall = [e.row.get("total_duration", math.nan) for e in last]
    whole = [w for w in wall if math.isfinite(w)]
    hits = [t.steps_to_target for t in own if t.steps_to_target is not None]
    source = f"{cost.workload}: everything is the median of runs of ours of the same variant"
    return replace(
        cost,
        step_s=statistics.median(e.submission_time / e.step for e in last),
        steps=statistics.median(hits) if hits else None,
        hours=statistics.median(whole) / 3600 if whole else None,
        sources=(source,),
    )


def _from_published(cost: Cost, run: RunSpec, root: Path) -> Cost:
    published = _published(root)
    ratio = published["wall_over_submission_time"].get(run.workload)
    paper = _paper_row(run, root)
    sources = ["steps are the paper's to the target, for the same variant, F and tau; - for no row"]
    if paper and cost.gpus == published["paper"]["gpus"].get(run.workload) != published["gpus"]:
        step_s, share = 60 * paper["time_min_mean"] / paper["steps_mean"], None
        sources.append(
            f"{run.workload}: s/step is the paper's time over its steps, its optimizer included, "
            f"on {cost.gpus} x {published['paper']['hardware']}"
        )
    else:
        baseline = published["seconds_a_step"].get(run.workload)
        if baseline is None:
            return replace(cost, sources=(f"{run.workload}: no seconds a step are known",))
        scale = published["gpus"] / cost.gpus
        share, words = optimizer_share(run, root)
        step_s = baseline * scale + (share or 0.0)
        scaled = f", x {scale:g} for {cost.gpus}" if scale != 1 else ""
        sources.append(
            f"{run.workload}: {baseline} s a step, a baseline's on {published['hardware']} "
            f"(AlgoPerf's pull request 892){scaled}, and ours"
        )
        sources.append(words)
    steps = paper["steps_mean"] if paper else None
    hours = None if steps is None else steps * step_s * (ratio or 1.0) / 3600
    sources.append(
        f"{run.workload}: hours are x {ratio} for evaluations, which are off the clock (as in "
        "published v0.6 runs)"
        if ratio
        else f"{run.workload}: evaluations, off the clock, come on top of the hours"
    )
    return replace(
        cost, step_s=step_s, share_s=share, steps=steps, hours=hours, sources=tuple(sources)
    )


def optimizer_share(run: RunSpec, root: Path) -> tuple[float | None, str]:
    """Our optimizer's seconds a step on an A100, from those on an H100; and what was taken."""
    path = root / "results" / "measured" / "h100" / f"optimizer_step_{run.workload}.json"
    try:
        contender = _CONTENDERS[run.variant]
        measured = json.loads(path.read_text(encoding="utf-8"))["contenders"][contender]
        ordinary, refresh = (measured[f"{k}_ms"]["median"] / 1000 for k in ("ordinary", "refresh"))
    except (OSError, KeyError, ValueError):
        return None, f"{run.workload}: our optimizer was not measured there and comes on top"
    words = (
        "ours: an optimizer step and a refresh every F steps (with tau, if every check refreshes), "
        f"measured on an H100 (results/measured/h100), x {H100_OVER_A100:.1f} for an A100"
    )
    every = run.hparams.get(differences.F_KEY)
    if run.variant == "nadamw" or not isinstance(every, int) or every < 1:
        return ordinary * H100_OVER_A100, words
    return (ordinary + (refresh - ordinary) / every) * H100_OVER_A100, words


def _with_budget(cost: Cost, version: str, ruleset: str, root: Path) -> Cost:
    settings = versions.read(version, root / "workloads_config")
    if cost.workload not in settings.workloads:
        return cost
    budget = settings.budget(cost.workload, ruleset)
    ratio = _published(root)["wall_over_submission_time"].get(cost.workload, 1.0)
    most, hours = budget * ratio / 3600, cost.hours
    sources = (*cost.sources, f"{cost.workload}: at most the budget of {version}, {budget:.0f} s")
    if hours is not None and hours > most:
        hours = most
        sources += (f"{cost.workload} {cost.name}: the budget ends before the target",)
    return replace(cost, hours=hours, hours_at_most=most, sources=sources)


def _with_memory(cost: Cost, run: RunSpec, root: Path) -> Cost:
    """Parameters and optimizer by formula; the rest as measured, in proportion to the batch."""
    if run.workload not in memory.workloads():
        return cost
    shapes = memory.shapes(run.workload)
    made = submission_loader.optimizer(root, run.variant)
    own = memory.need(shapes, run.hparams, cost.gpus, made).total
    path = root / "results" / "measured" / "h100" / "workload_step.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["workloads"]
        (measured,) = [entry for entry in entries if entry["workload"] == run.workload]
        batch = submission_loader.batch_size(root, run.variant, run.workload)
    except (OSError, KeyError, ValueError):
        source = f"{run.workload}: GiB without activations, which were not measured"
        return replace(cost, gib=own / GIB, sources=(*cost.sources, source))
    # The measured run was of EShampoo on one GPU.
    theirs = memory.need(shapes, {"max_preconditioner_dim": 1024}, 1).total
    rest = (measured["peak_mib"] * 2**20 - theirs) * batch / cost.gpus / measured["batch"]
    source = (
        "GiB: parameters and optimizer by the formula of docs/performance.md, the rest as measured "
        "on an H100, in proportion to the examples a GPU"
    )
    return replace(cost, gib=(own + rest) / GIB, sources=(*cost.sources, source))


def _paper_row(run: RunSpec, root: Path) -> dict[str, Any] | None:
    """The paper's row of a run's variant, F and tau, with steps in it."""
    point = run.hparams
    for name in ("table1", "table3"):
        path = root / "results" / "paper" / f"{name}.json"
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            if (
                row["workload"] == run.workload
                and row["variant"] == run.variant
                and row["precondition_frequency"] == point.get(differences.F_KEY)
                and row["tau"] == (point.get(differences.TAU_KEY) or None)
                and row["steps_mean"] is not None
            ):
                return dict(row)
    return None


def _gpus(gpus: int | Mapping[str, int] | None, workload: str, root: Path) -> int:
    if isinstance(gpus, Mapping):
        gpus = gpus.get(workload)
    return int(gpus or _published(root)["gpus"])


def _published(root: Path) -> dict[str, Any]:
    path = root / "results" / "published" / "seconds_a_step.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _cells(cost: Cost, price: float | None) -> list[str]:
    cells = [
        f"  {cost.name}",
        str(cost.runs),
        _number(cost.step_s, 3),
        _number(None if cost.share_s is None else 1000 * cost.share_s, 1),
        _number(cost.steps, 0),
        _number(cost.hours, 2 if (cost.hours or 1.0) > 0.1 else 4),
        _number(cost.hours_at_most, 2),
    ]
    if price is not None:
        cells += [_number(cost.money(h, price), 2) for h in (cost.hours, cost.hours_at_most)]
    return cells


def _place(costs: Sequence[Cost]) -> str:
    """``imagenet_vit, 4 GPUs, 18.7 GiB each``: what the runs of a workload run on."""
    counts = sorted({cost.gpus for cost in costs})
    words = "a CPU" if counts == [0] else f"{'/'.join(map(str, counts))} GPU{'s' * (counts != [1])}"
    gib = [cost.gib for cost in costs if cost.gib is not None]
    memory = f", {max(gib):.1f} GiB each at the peak" if gib else ""
    return f"{costs[0].workload}, {words}{memory}"


def _totals(costs: Sequence[Cost], price: float | None) -> list[str]:
    lines = []
    for words, of in (("to the targets", "hours"), ("at most", "hours_at_most")):
        known = [cost for cost in costs if getattr(cost, of) is not None]
        if not known:
            continue
        nodes = sum(getattr(cost, of) * cost.runs for cost in known)
        each = sum(getattr(cost, of) * cost.runs * cost.gpus for cost in known)
        text = f"in all, {words}: {nodes:.1f} node-hours, {each:.1f} GPU-hours"
        if price is not None:
            text += f", {each * price:.2f} in money"
        unknown = sum(cost.runs for cost in costs) - sum(cost.runs for cost in known)
        lines.append(text + (f"; {unknown} runs not in it" if unknown else ""))
    return lines


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [row[0].ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join(cells)


def _wrapped(line: str) -> list[str]:
    if len(line) <= WIDTH or line.startswith("  "):
        return [line]
    return textwrap.wrap(line, WIDTH, subsequent_indent="  ")
