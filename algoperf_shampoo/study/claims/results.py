"""What the runs of a study of claims gave: read from their folders, weighed, and written down."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from algoperf_shampoo.study import files, logs, plan, progress
from algoperf_shampoo.study.claims import file, rule, table2, tuning
from algoperf_shampoo.study.claims.archive import Unpacked
from algoperf_shampoo.study.claims.file import Claim, Declared, Part
from algoperf_shampoo.study.claims.rule import Evidence, Verdict
from algoperf_shampoo.study.claims.statistics import STATISTICS, of_run
from algoperf_shampoo.study.claims.tuning import Choice, Place
from algoperf_shampoo.study.study import Job, Study

NOT_RUN = "not run"
"""Instead of a verdict, where no run of a claim's arms is done."""


@dataclass(frozen=True)
class Run:
    """One run of a study of claims that is done: where, and the numbers that claims are about.

    ``values`` by statistic, ``math.inf`` where not finite. ``wall`` is seconds, evaluations
    included and the start of the process not; None where the log does not say. ``sources``: sha256
    of what makes its curve, by name.
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
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Outcome:
    """Everything that a study of claims says. ``verdicts`` is empty for a quick one.

    ``packed``: the archive that the runs come from; None where they lie in folders of their own.
    """

    declared: Declared
    quick: bool
    seeds: tuple[int, ...]
    minis: tuple[str, ...]
    evidence: tuple[Evidence, ...]
    verdicts: tuple[Verdict, ...]
    runs: tuple[Run, ...]
    problems: tuple[str, ...]
    choices: Mapping[Place, Choice]
    packed: Unpacked | None = None


def outcome(
    declared: Declared,
    study: Study,
    quick: bool,
    choices: Mapping[Place, Choice] | None = None,
    packed: Unpacked | None = None,
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
        try:
            runs += [_run(*place, job, trial, wanted[place[0]]) for place in places(job, declared)]
        except files.Unreadable as reason:
            problems.append(f"{job.run.name}: not counted: {reason}")
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
        packed,
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


def markdown(found: Outcome, root: Path, folder: Path) -> str:
    """The outcome as a page: a row a claim, hypotheses, the means of every arm, each with a link to
    its runs, where they ran, and the paper's Table 2.

    Args:
        root: the repository.
        folder: that the page will lie in; links begin there.
    """
    pairs = len(found.minis) * len(found.seeds)
    steps = sorted({run.steps for run in found.runs})
    lines = [f"# {found.declared.title}", ""]
    if found.quick:
        lines += ["**Quick: no verdicts.** It shows that the machinery runs, and nothing else.", ""]
    if not found.runs:
        lines += ["**Not run.** These claims are declared, and no run of them is done.", ""]
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
    ]
    if found.runs:
        lines += ["", *_whereabouts(found, folder), "Means over seeds:", ""]
        lines += _means_table(found, folder)
    verdicts = {one.claim.name: _verdict(found, i) for i, one in enumerate(found.evidence)}
    verdicts |= {c.name: f"waits for {', '.join(c.waits_for)}" for c in _waiting(found)}
    if found.choices:
        seeds = ", ".join(map(str, found.declared.tuning_seeds))
        lines += ["", f"Learning rates, chosen on seeds {seeds}:", ""]
        lines += tuning.table(found.choices, lambda runs: _link(found, runs, folder))
    if found.runs:
        lines += ["", *_machines_table(found.runs)]
    if table2.speaks_of(verdicts):
        lines += ["", "The paper's Table 2:", "", *table2.markdown(verdicts, root)]
    lines += ["", *(f"- {problem}" for problem in found.problems)]
    return "\n".join(lines).rstrip() + "\n"


def to_json(found: Outcome, root: Path) -> str:
    """The outcome with the numbers of every run; what is not finite is null."""
    claims = []
    for index, one in enumerate(found.evidence):
        entry: dict[str, Any] = {
            "name": one.claim.name,
            "parts": [part.text() for part in one.claim.parts],
            "effects": [
                {mini: None if e is None else _rounded(e) for mini, e in effects.items()}
                for effects in one.effects
            ],
            "pairs": one.pairs,
            "wanted": one.wanted,
            "not_finite": one.spoiled,
        }
        if not found.quick:
            corrected = found.verdicts[index].corrected
            entry |= {"p": one.p, "corrected": corrected, "verdict": _verdict(found, index)}
        claims.append(entry)
    content = {
        "title": found.declared.title,
        "quick": found.quick,
        "seeds": list(found.seeds),
        "machines": [
            {"runs": count, **dict(zip(_MACHINE, machine, strict=True))}
            for machine, count in machines(found.runs)
        ],
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
                "folders": {
                    f"{rate:g}": _name(found, runs, root) for rate, runs in choice.folders.items()
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
                "folder": _name(found, run.folder, root),
                "wall": run.wall,
                "diverged": run.diverged,
                **{k: v if math.isfinite(v) else None for k, v in run.values.items()},
            }
            for run in found.runs
        ],
        "problems": list(found.problems),
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


_MACHINE = ("cpu", "cores", "torch", "python", "commit", "dirty", "optimizer", "workloads")


def machines(runs: Sequence[Run]) -> list[tuple[tuple[Any, ...], int]]:
    """Where runs were made and from which sources, :data:`_MACHINE`, each with the number of runs.

    ``dirty``: whether the commit that was found there is not what ran; the sha256 of the sources
    say what did.
    """
    counts: Counter[tuple[Any, ...]] = Counter()
    for run in {run.folder: run for run in runs}.values():
        packages = _table(run.session.get("packages"))
        known = [run.session.get(f"cpu_{name}") for name in ("model_name", "count")]
        known += [packages.get("torch"), run.session.get("python_version")]
        known += [run.session.get(f"git_{name}") for name in ("commit_hash", "dirty")]
        known += [run.sources.get(name) for name in _MACHINE[-2:]]
        counts[tuple(str(v) if isinstance(v, dict | list) else v for v in known)] += 1
    return counts.most_common()


def _machines_table(runs: Sequence[Run]) -> list[str]:
    lines = [
        "Where the runs were made, with the commit found there (dirty: not what ran) and the "
        "beginning of the sha256 of the sources:",
        "",
        "| runs | " + " | ".join(name for name in _MACHINE if name != "dirty") + " |",
        "| --- |" + " --- |" * (len(_MACHINE) - 1),
    ]
    for (cpu, cores, torch, python, commit, dirty, *sources), count in machines(runs):
        state = f"{str(commit)[:7]}{', dirty' * bool(dirty)}"
        cells = [count, cpu, cores, torch, python, state, *(str(s)[:12] for s in sources)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _rounded(value: float) -> float:
    """To nine digits: logarithms differ in their last bit from one C library to another."""
    return float(f"{value:.9g}")


def _name(found: Outcome, path: Path, root: Path) -> str:
    """A folder of runs by its path from ``root``, or, in an archive, by the archive's and its own
    there with a # between them; of one that lies elsewhere, what LABEL begins."""
    if found.packed is not None and (inside := found.packed.name(path)) is not None:
        return f"{found.packed.archive.relative_to(root).as_posix()}#{inside}"
    if path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return "/".join(path.parts[-4:] if logs.is_trial(path) else path.parts[-1:])


def _link(found: Outcome, path: Path, folder: Path) -> str:
    """The same from the ``folder`` of a page, as the target of a link."""
    if found.packed is not None and (inside := found.packed.name(path)) is not None:
        return f"{Path(os.path.relpath(found.packed.archive, folder)).as_posix()}#{inside}"
    return os.path.relpath(path, folder)


def _whereabouts(found: Outcome, folder: Path) -> list[str]:
    if found.packed is None:
        return []
    archive = os.path.relpath(found.packed.archive, folder)
    return [
        f"The runs are in [{found.packed.archive.name}]({archive}); in a link to them, the folder "
        "in it comes after the #. `make claims-runs` unpacks it.",
        "",
    ]


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
        session=_last_session(record),
        sources=_table(record["identity"].get("source_sha256")),
    )


def _last_session(record: Mapping[str, Any]) -> dict[str, Any]:
    """{} of a record that does not say."""
    sessions = record.get("sessions")
    return _table(sessions[-1] if isinstance(sessions, list) and sessions else None)


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _waiting(found: Outcome) -> list[Claim]:
    return [claim for claim in found.declared.claims if claim.waits_for]


def _verdict(found: Outcome, index: int) -> str:
    one = found.evidence[index]
    if not found.quick:
        arms = {arm for part in one.claim.parts for arm in part.arms}
        begun = any(run.arm in arms for run in found.runs)
        return found.verdicts[index].verdict if begun else NOT_RUN
    return "quick, no verdict" + (f": {one.pairs} of {one.wanted} pairs" * (one.pairs < one.wanted))


def _effects(part: Part, effects: Mapping[str, float | None]) -> str:
    """``fastmri -1.2%, imagenet_vit +0.3%``."""
    ratio = STATISTICS[part.statistic].logarithmic
    shown = {
        mini: "-" if e is None else f"{100 * e:+.2f}%" if ratio else f"{e:+.3f}"
        for mini, e in effects.items()
    }
    return ", ".join(f"{mini} {effect}" for mini, effect in shown.items())


def _means_table(found: Outcome, folder: Path) -> list[str]:
    lines = [
        "| arm | statistic | " + " | ".join(found.minis) + " |",
        "| --- | --- |" + " --- |" * len(found.minis),
    ]
    for arm, names in statistics_by_arm(found.declared.claims).items():
        for name in names:
            means = (_mean(found, arm, mini, name, folder) for mini in found.minis)
            lines.append(f"| {arm} | {name} | {' | '.join(means)} |")
    return lines


def _mean(found: Outcome, arm: str, mini: str, name: str, folder: Path) -> str:
    """``0.4983 (n = 8)``, the number of runs as a link to their folder; of a quick study, whose
    runs are not for keeping, without one."""
    own = [r for r in found.runs if (r.arm, r.mini) == (arm, mini)]
    if not own:
        return "-"
    values = [r.values[name] for r in own]
    there = _link(found, own[0].folder.parents[2], folder)  # label / seed / workload / trial
    count = f"n = {len(values)}" if found.quick else f"[n = {len(values)}](<{there}>)"
    bad = sum(not math.isfinite(v) for v in values)
    return f"{f'{bad} not finite' if bad else f'{statistics.fmean(values):.4f}'} ({count})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
