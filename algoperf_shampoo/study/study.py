"""Studies: the runs behind a table, listed in a file, and what each of them needs.

``studies/<name>.json`` of this package, or a file of your own::

    {"title": "...",
     "full": {"seeds": {"fastmri": 5, "imagenet_vit": 1}, "gpus": {"fastmri": 1, ...}},
     "mini": {"seeds": 5, "F": {"100": 10, "50": 5, "1": null}, "set": {"weight_decay": 0}},
     "rows": [{"workload": "fastmri", "variant": "eshampoo_adaptive", "F": 50, "tau": 0.1}, ...]}

``rows`` are the table's, as the paper has them: ``F``, ``tau`` and ``set`` (further fields of the
point) replace what the variant's search space says. ``full`` and ``mini`` hold what a size decides:
``seeds`` (a count, or a list such as "3,4"), ``gpus``, both for all workloads or by workload,
``set``, ``all_steps`` (true: runs do not stop at their targets), ``evals`` (of such runs: steps
between two evaluations), and ``F``, which translates the
paper's F to a mini's; null there means that the row has no counterpart at that size. A size that is
not there cannot be run.

A study of claims has ``arms`` in place of ``rows``: see :mod:`.claims.file`.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from algoperf_shampoo import json_input, paths
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness.spec import RunSpec
from algoperf_shampoo.study import plan
from algoperf_shampoo.study.claims import file as claims_file

STUDIES = Path(__file__).with_name("studies")
_KEYS = {"title", "full", "mini", "rows"}
_SIZE_KEYS = {"seeds", "gpus", "F", "set", "all_steps", "evals"}
_ROW_KEYS = {"workload", "variant", "F", "tau", "set"}


@dataclass(frozen=True)
class Job:
    """One run of a study, and how it is started.

    ``words`` are those of ``make submit-<variant>``, in its order; ``gpus`` the number it is to
    have, None for what the harness takes by itself; ``rows`` the lines of the study's list, from 1,
    that it belongs to (two rows that are the same at a size share their runs).
    """

    run: RunSpec
    words: tuple[tuple[str, str], ...]
    gpus: int | None
    rows: tuple[int, ...]

    @property
    def flags(self) -> list[str]:
        """The words as flags of ``scripts/submit.py``."""
        return [f"--variant={self.run.variant}"] + [
            f"--{name.lower()}={value}" for name, value in self.words
        ]

    @property
    def command(self) -> str:
        """The run as a line to type."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.words]
        return " ".join(["make", f"submit-{self.run.variant.replace('_', '-')}", *words])


@dataclass(frozen=True)
class Study:
    """A study laid out at one size. ``absent`` names the rows without a counterpart at it."""

    name: str
    title: str
    size: str
    harness: str
    root: Path
    out: Path
    jobs: tuple[Job, ...]
    rows: int
    absent: tuple[str, ...]


@dataclass(frozen=True)
class Options:
    """Words of ``make study`` that reach every run, or choose among the runs; None: not given."""

    size: str = "mini"
    harness: str | None = None
    workload: str = "all"
    seeds: str | None = None
    gpus: str | None = None
    data_dir: str | None = None
    out: str | None = None
    steps: str | None = None
    evals: str | None = None
    processes: str | None = None
    wandb: bool = False
    version: str | None = None
    ruleset: str = "external"


def names() -> list[str]:
    """The studies that come with the suite."""
    return sorted(path.stem for path in STUDIES.glob("*.json"))


def lay_out(
    root: Path, name: str, options: Options, content: dict[str, Any] | None = None
) -> Study:
    """Every run of a study. Needs neither data, GPUs nor torch, and writes nothing.

    Args:
        content: in place of the file's; a row that is None is not known yet, and has no runs.

    Raises:
        UserError: no such study, a mistake in its file, or a word that does not fit.
    """
    path = find(name)
    content = _read(path) if content is None else _checked(path, content)
    size = options.size
    if size not in plan.SIZES:
        raise UserError(f"SIZE={size}: there is {', '.join(plan.SIZES)}")
    if content.get(size) is None:
        raise UserError(f"STUDY={name}: it has no size {size}")
    harness = options.harness or ("embedded" if size == "mini" else "algoperf")
    # AlgoPerf's own models on little data run at the paper's points.
    small = size == "mini" and harness == "embedded"
    settings = content[size] if small or size == "full" else {**content[size], "F": {}, "set": {}}
    jobs: dict[Path, Job] = {}
    absent = []
    for number, row in enumerate(content["rows"], start=1):
        if row is None or options.workload not in ("all", row["workload"]):
            continue
        made = _row(root, path, number, row, settings, replace(options, harness=harness))
        if made is None:
            absent.append(f"row {number}: {_title(row)}: no counterpart at SIZE={size}")
            continue
        for job in made:
            known = jobs.get(job.run.run_dir)
            jobs[job.run.run_dir] = (
                replace(known, rows=(*known.rows, number)) if known is not None else job
            )
    if not jobs and all(content["rows"]):
        has = ", ".join(dict.fromkeys(row["workload"] for row in content["rows"]))
        why = "; ".join(absent) or f"its rows are of {has}"
        raise UserError(f"STUDY={name} WORKLOAD={options.workload}: no run; {why}")
    out = paths.given("OUT", options.out or f"results/runs/{size}", root.resolve())
    return Study(
        name=path.stem,
        title=content["title"],
        size=size,
        harness=harness,
        root=root.resolve(),
        out=out,
        jobs=tuple(jobs.values()),
        rows=len(content["rows"]),
        absent=tuple(absent),
    )


def _row(
    root: Path, path: Path, number: int, row: dict[str, Any], settings: dict[str, Any], o: Options
) -> list[Job] | None:
    where = f"{path}: row {number}"
    workload = row["workload"]
    frequency = row.get("F")
    if frequency is not None and settings.get("F"):
        key = str(frequency)
        if key not in settings["F"]:
            raise UserError(f"{where}: F = {key} has no entry under {o.size}.F; a number, or null")
        frequency = settings["F"][key]
        if frequency is None:
            return None
    seeds = o.seeds or str(_by_workload(settings.get("seeds", 1), workload))
    gpus = o.gpus or _by_workload(settings.get("gpus"), workload)
    if o.harness == "embedded":
        gpus = None
    changes = {**settings.get("set", {}), **row.get("set", {})}
    words = _own_words(root, row, frequency, changes, o, where)
    evals = o.evals or (str(settings["evals"]) if "evals" in settings else None)
    made = plan.make_plan(
        root,
        [row["variant"]],
        workload=workload,
        size=o.size,
        harness=o.harness,
        seeds=seeds,
        gpus=None if gpus is None else str(gpus),
        f=words.get("F"),
        tau=words.get("TAU"),
        settings=words.get("SET"),
        out=o.out,
        steps=o.steps,
        processes=o.processes,
        wandb=o.wandb,
        version=o.version,
        ruleset=o.ruleset,
        all_steps=settings.get("all_steps", False),
        evals=evals,
    )
    shared = {
        "WORKLOAD": workload,
        "SIZE": o.size,
        "HARNESS": made.harness,
        "VERSION": o.version,
        "RULESET": o.ruleset if o.ruleset != "external" else None,
        **words,
        "GPUS": None if gpus is None else str(gpus),
        "PROCESSES": o.processes,
        # Absolute: a job may start in another folder. It need not exist on this machine.
        "DATA_DIR": str(paths.given("DATA_DIR", o.data_dir, root)) if o.data_dir else None,
        "OUT": str(made.out) if o.out else None,
        "STEPS": o.steps,
        "ALL_STEPS": "1" if settings.get("all_steps") else None,
        "EVALS": evals,
        "WANDB": "1" if o.wandb else None,
    }
    return [
        Job(
            run=run,
            words=tuple(
                (name, value)
                for name, value in {**shared, "SEEDS": f"{run.seed},"}.items()
                if value is not None
            ),
            gpus=None if gpus is None else int(gpus),
            rows=(number,),
        )
        for run in made.runs
    ]


def _own_words(
    root: Path,
    row: dict[str, Any],
    frequency: int | None,
    changes: dict[str, Any],
    options: Options,
    where: str,
) -> dict[str, str]:
    """F, TAU and SET of a row, without what the variant's point says itself.

    So a row at a variant's own point has the folders of plain ``make submit-<variant>``.
    """
    point = plan.make_plan(
        root, [row["variant"]], row["workload"], options.size, options.harness
    ).runs[0]
    own = point.hparams
    wanted = {"precondition_frequency": frequency, "tau": row.get("tau"), **changes}
    words = {}
    for word, name in (("F", "precondition_frequency"), ("TAU", "tau")):
        value = wanted.pop(name)
        if value is None or own.get(name) == value:
            continue
        if name not in own:
            raise UserError(f"{where}: {row['variant']} has no {name}")
        words[word] = f"{value:.12g}" if isinstance(value, float) else str(value)
    rest = {name: value for name, value in wanted.items() if own.get(name) != value}
    if rest:
        words["SET"] = " ".join(
            f"{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in rest.items()
        )
    return words


def find(name: str) -> Path:
    """The file of a study that comes with the suite, or ``NAME.json`` as it is given.

    Raises:
        UserError: no such study.
    """
    path = Path(name).expanduser()
    if path.suffix == ".json":
        return path
    if name not in names():
        raise UserError(f"STUDY={name}: there is {', '.join(names())}, or a file, NAME.json")
    return STUDIES / f"{name}.json"


def _read(path: Path) -> dict[str, Any]:
    content = json_input.read(path, "study")
    if isinstance(content, dict) and "arms" in content:
        content = claims_file.as_study(path, content)
    return _checked(path, content)


def _checked(path: Path, content: Any) -> dict[str, Any]:
    json_input.check_keys(content, _KEYS, {"title", "rows"}, str(path))
    if not isinstance(content["rows"], list) or not content["rows"]:
        raise UserError(f"{path}: rows: a list of at least one row")
    for size in plan.SIZES:
        if content.get(size) is not None:
            json_input.check_keys(content[size], _SIZE_KEYS, set(), f"{path}: {size}")
            for name in ("F", "set"):
                if not isinstance(content[size].get(name, {}), dict):
                    raise UserError(f"{path}: {size}.{name}: an object")
            if not isinstance(content[size].get("all_steps", False), bool):
                raise UserError(f"{path}: {size}.all_steps: true or false")
    for number, row in enumerate(content["rows"], start=1):
        if row is None:
            continue
        json_input.check_keys(row, _ROW_KEYS, {"workload", "variant"}, f"{path}: row {number}")
        if row["workload"] not in plan.WORKLOADS:
            raise UserError(
                f"{path}: row {number}: workload {row['workload']!r}: there is "
                f"{', '.join(plan.WORKLOADS)}"
            )
    return dict(content)


def _by_workload(value: Any, workload: str) -> Any:
    return value.get(workload) if isinstance(value, dict) else value


def _title(row: dict[str, Any]) -> str:
    words = [f"{name} = {row[name]}" for name in ("F", "tau") if row.get(name) is not None]
    return f"{row['workload']} {row['variant']}" + (f" ({', '.join(words)})" if words else "")
