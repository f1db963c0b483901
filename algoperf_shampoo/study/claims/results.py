"""What the runs of a study of claims gave: read from their folders, weighed, and written down."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from algoperf_shampoo.study import files, logs, plan, progress
from algoperf_shampoo.study.claims import file, rule, table2, tuning
from algoperf_shampoo.study.claims.file import Claim, Declared, Part
from algoperf_shampoo.study.claims.rule import Evidence, Verdict
from algoperf_shampoo.study.claims.statistics import STATISTICS, of_run
from algoperf_shampoo.study.claims.tuning import Choice, Place
from algoperf_shampoo.study.study import Job, Study


@dataclass(frozen=True)
class Run:
    """One run of a study of claims that is done: where, and the numbers that claims are about.

    ``values`` by statistic, ``math.inf`` where not finite. ``wall`` is seconds, evaluations
    included and the start of the process not; None where the log does not say.
    """

    arm: str
    variant: str
    mini: str
    seed: int
    steps: int
    folder: Path
    values: Mapping[str, float]
    wall: float | None
    diverged: bool
    point: Mapping[str, Any]
    session: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """Everything that a study of claims says. ``verdicts`` is empty for a quick one."""

    declared: Declared
    quick: bool
    seeds: tuple[int, ...]
    minis: tuple[str, ...]
    evidence: tuple[Evidence, ...]
    verdicts: tuple[Verdict, ...]
    runs: tuple[Run, ...]
    problems: tuple[str, ...]
    choices: Mapping[Place, Choice]


def outcome(
    declared: Declared, study: Study, quick: bool, choices: Mapping[Place, Choice] | None = None
) -> Outcome:
    """Read every run of a study that is done, and weigh the claims."""
    wanted = statistics_by_arm(declared.claims)
    runs, problems = [], []
    for job in study.jobs:
        now = progress.of(job.run.run_dir, job.run)
        if now.state in (progress.DAMAGED, progress.OTHER):
            problems.append(f"{job.run.name}: not counted: {now.note}")
        if now.state != progress.DONE:
            continue
        trial = logs.read_trial(job.run.run_dir)
        if trial.outcome != logs.ALL_STEPS:
            problems.append(f"{job.run.name}: not counted: {'; '.join(trial.holes)}")
            continue
        for arm, mini in places(job, declared):
            runs.append(_run(arm, mini, job, trial, wanted[arm]))
    seeds = declared.quick_seeds if quick else declared.seeds
    minis = plan.WORKLOADS
    by_place = {(run.arm, run.mini, run.seed): run.values for run in runs}

    def value(arm: str, mini: str, seed: int, name: str) -> float | None:
        return by_place.get((arm, mini, seed), {}).get(name)

    live = [claim for claim in declared.claims if not claim.waits_for]
    evidence = tuple(rule.weigh(claim, minis, seeds, value) for claim in live)
    verdicts = () if quick else tuple(rule.decide(evidence))
    return Outcome(
        declared,
        quick,
        seeds,
        minis,
        evidence,
        verdicts,
        tuple(runs),
        tuple(problems),
        choices or {},
    )


def statistics_by_arm(claims: Sequence[Claim]) -> dict[str, tuple[str, ...]]:
    """Which numbers of an arm's runs some claim is about."""
    found: dict[str, dict[str, None]] = {}
    for claim in claims:
        for part in claim.parts:
            for arm in part.arms:
                found.setdefault(arm, {})[part.statistic] = None
    return {arm: tuple(names) for arm, names in found.items()}


def places(job: Job, declared: Declared) -> list[tuple[str, str]]:
    """The arms whose run a job is, each with its mini: arms of one point share their runs."""
    return [file.place(row, declared.arms) for row in job.rows]


def designs(declared: Declared, seeds: Sequence[int]) -> list[str]:
    """A line a claim: what it says, and the smallest p that its design reaches after Holm."""
    live = [claim for claim in declared.claims if not claim.waits_for]
    pairs = len(plan.WORKLOADS) * len(seeds)
    least = rule.reachable(pairs, len(live))
    lines = [
        f"{len(live)} claims, {pairs} pairs each ({len(plan.WORKLOADS)} minis x {len(seeds)} "
        f"seeds): smallest p {rule.least_p(pairs):.2g}, {least:.2g} after Holm"
        + ("" if least <= rule.ALPHA else f", above {rule.ALPHA:g}: none can be decided")
    ]
    for claim in declared.claims:
        if claim.waits_for:
            lines.append(f"  {claim.name}: waits for {', '.join(claim.waits_for)}")
            continue
        lines.append(f"  {claim.name}: least p {least:.2g}")
        lines += [f"    {part.text()}" for part in claim.parts]
    return lines


def text(found: Outcome) -> list[str]:
    """The outcome as lines for a terminal."""
    lines = []
    for index, evidence in enumerate(found.evidence):
        lines.append(f"{evidence.claim.name}: {_verdict(found, index)}")
        for part, effects in zip(evidence.claim.parts, evidence.effects, strict=True):
            lines.append(f"    {part.text()}: {_effects(part, effects)}")
    return [*lines, *found.problems]


def markdown(found: Outcome, root: Path) -> str:
    """The outcome as a page: a row a claim, hypotheses, the means of every arm, and the paper's
    Table 2; ``root`` is the repository."""
    pairs = len(found.minis) * len(found.seeds)
    steps = sorted({run.steps for run in found.runs})
    lines = [f"# {found.declared.title}", ""]
    if found.quick:
        lines += ["**Quick: no verdicts.** It shows that the machinery runs, and nothing else.", ""]
    lines += [
        f"{len(found.runs)} runs, seeds {', '.join(map(str, found.seeds))}, "
        f"{' and '.join(map(str, steps)) or 'no'} steps. Written by `make claims"
        f"{' QUICK=1' if found.quick else ''}`; the rule is in docs/claims.md.",
        "",
        "| claim | from | part | median difference, by mini | pairs | p | after Holm | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for index, one in enumerate(found.evidence):
        for number, (part, effects) in enumerate(zip(one.claim.parts, one.effects, strict=True)):
            first = number == 0
            spoiled = f", {one.spoiled} not finite" if one.spoiled and first else ""
            cells = [
                one.claim.name if first else "",
                one.claim.source if first else "",
                part.text(),
                _effects(part, effects),
                f"{one.pairs} of {one.wanted}{spoiled}" if first else "",
                "" if found.quick or not first else _number(one.p),
                "" if found.quick or not first else _number(found.verdicts[index].corrected),
                _verdict(found, index) if first else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    for claim in _waiting(found):
        waits = f"waits for {', '.join(claim.waits_for)}"
        lines.append(f"| {claim.name} | {claim.source} | | | | | | {waits} |")
    live = len(found.evidence)
    lines += [
        "",
        f"Smallest p of {pairs} pairs: {rule.least_p(pairs):.2g}; "
        f"{rule.reachable(pairs, live):.2g} after Holm over {live} claims.",
        "",
        "Hypotheses:",
        "",
        *(f"- {claim.name}: {claim.hypothesis}" for claim in found.declared.claims),
        "",
        "Means over seeds:",
        "",
        "| arm | statistic | " + " | ".join(found.minis) + " |",
        "| --- | --- |" + " --- |" * len(found.minis),
    ]
    for arm, names in statistics_by_arm(found.declared.claims).items():
        lines += [
            f"| {arm} | {name} | "
            + " | ".join(_mean(found.runs, arm, mini, name) for mini in found.minis)
            + " |"
            for name in names
        ]
    verdicts = {one.claim.name: _verdict(found, i) for i, one in enumerate(found.evidence)}
    verdicts |= {c.name: f"waits for {', '.join(c.waits_for)}" for c in _waiting(found)}
    if found.choices:
        seeds = ", ".join(map(str, found.declared.tuning_seeds))
        lines += ["", f"Learning rates, chosen on seeds {seeds}:", ""]
        lines += tuning.table(found.choices, _number)
    if table2.speaks_of(verdicts):
        lines += ["", "The paper's Table 2:", "", *table2.markdown(verdicts, root)]
    lines += ["", *(f"- {problem}" for problem in found.problems)]
    return "\n".join(lines).rstrip() + "\n"


def to_json(found: Outcome, root: Path) -> str:
    """The outcome with the numbers of every run; what is not finite is null."""
    first = found.runs[0].session if found.runs else {}
    claims = []
    for index, one in enumerate(found.evidence):
        entry: dict[str, Any] = {
            "name": one.claim.name,
            "parts": [part.text() for part in one.claim.parts],
            "effects": [dict(effects) for effects in one.effects],
            "pairs": one.pairs,
            "wanted": one.wanted,
            "not_finite": one.spoiled,
        }
        if not found.quick:
            verdict = found.verdicts[index]
            entry |= {"p": one.p, "corrected": verdict.corrected, "verdict": verdict.verdict}
        claims.append(entry)
    content = {
        "title": found.declared.title,
        "quick": found.quick,
        "seeds": list(found.seeds),
        "git_commit_hash": first.get("git_commit_hash"),
        "cpu_model_name": first.get("cpu_model_name"),
        "packages": first.get("packages"),
        "least_p": rule.least_p(len(found.minis) * len(found.seeds)),
        "claims": claims,
        "tuning_seeds": list(found.declared.tuning_seeds),
        "rates": [
            {
                "arm": arm,
                "mini": mini,
                "rate": choice.rate,
                "losses": {
                    f"{rate:g}": loss if math.isfinite(loss) else None
                    for rate, loss in choice.losses.items()
                },
            }
            for (arm, mini), choice in found.choices.items()
        ],
        "waiting": {c.name: list(c.waits_for) for c in _waiting(found)},
        "runs": [
            {
                "arm": run.arm,
                "mini": run.mini,
                "seed": run.seed,
                "steps": run.steps,
                "folder": logs_name(run.folder, root),
                "wall": run.wall,
                "diverged": run.diverged,
                **{k: v if math.isfinite(v) else None for k, v in run.values.items()},
            }
            for run in found.runs
        ],
        "problems": list(found.problems),
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def logs_name(path: Path, root: Path) -> str:
    """A folder below ``root`` by its path from there, another one by its last four names."""
    inside = path.is_relative_to(root)
    return path.relative_to(root).as_posix() if inside else "/".join(path.parts[-4:])


def _run(arm: str, mini: str, job: Job, trial: logs.Trial, names: Sequence[str]) -> Run:
    record = files.read_json(trial.path / "run.json")
    steps = int(record["identity"]["workload_properties"]["max_steps"])
    last = trial.evaluations[-1] if trial.evaluations else None
    wall = last.row.get("total_duration", math.nan) if last else math.nan
    return Run(
        arm=arm,
        variant=job.run.variant,
        mini=mini,
        seed=job.run.seed,
        steps=steps,
        folder=trial.path,
        values={name: of_run(trial, name, steps) for name in names},
        wall=wall if math.isfinite(wall) else None,
        diverged=trial.diverged,
        point=job.run.hparams,
        session=record["sessions"][-1],
    )


def _waiting(found: Outcome) -> list[Claim]:
    return [claim for claim in found.declared.claims if claim.waits_for]


def _verdict(found: Outcome, index: int) -> str:
    if not found.quick:
        return found.verdicts[index].verdict
    one = found.evidence[index]
    return "quick, no verdict" + (f": {one.pairs} of {one.wanted} pairs" * (one.pairs < one.wanted))


def _effects(part: Part, effects: Mapping[str, float | None]) -> str:
    """``fastmri -1.2%, imagenet_vit +0.3%``."""
    ratio = STATISTICS[part.statistic].logarithmic
    shown = {
        mini: "-" if e is None else f"{100 * e:+.2f}%" if ratio else f"{e:+.3f}"
        for mini, e in effects.items()
    }
    return ", ".join(f"{mini} {effect}" for mini, effect in shown.items())


def _mean(runs: Sequence[Run], arm: str, mini: str, name: str) -> str:
    values = [r.values[name] for r in runs if (r.arm, r.mini) == (arm, mini)]
    if not values:
        return "-"
    bad = sum(not math.isfinite(v) for v in values)
    if bad:
        return f"{bad} of {len(values)} not finite"
    return f"{statistics.fmean(values):.4f} (n = {len(values)})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
