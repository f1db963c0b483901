"""What to run: variants x workloads x seeds, each with its hyperparameter point and its folder.

Making a plan checks what was asked for and writes nothing. It needs no torch, so that a typing
mistake is answered at once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from algoperf_shampoo import paths, points, versions
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import hparams, submission_loader
from algoperf_shampoo.harness.spec import MINI, MINIDATA, Plan, RunSpec
from algoperf_shampoo.study import files

WORKLOADS = ("fastmri", "imagenet_vit", "ogbg")
SIZES = ("mini", "full")
HARNESSES = ("embedded", "algoperf")
RULESETS = ("external", "self")


def make_plan(
    root: Path,
    variants: Sequence[str],
    workload: str = "all",
    size: str = "mini",
    harness: str | None = None,
    seeds: str = "1",
    gpus: str | None = None,
    data_dir: str | None = None,
    f: str | None = None,
    tau: str | None = None,
    settings: str | None = None,
    out: str | None = None,
    search_space: str | None = None,
    config_dir: str | None = None,
    trials: str = "1",
    steps: str | None = None,
    processes: str | None = None,
    wandb: bool = False,
    ruleset: str = "external",
    version: str | None = None,
    all_steps: bool = False,
    evals: str | None = None,
    dry_run: bool = False,
) -> Plan:
    """Check the words of a command line and lay out its runs.

    ``harness`` None means embedded for mini and AlgoPerf's for full. ``trials`` is the number of
    points of the search space to run, the first ones. ``settings`` are fields of the point to
    replace, ``learning_rate=0.02 one_dim=adam``. ``processes`` and ``wandb`` are checked here and
    used by AlgoPerf's door. With ``all_steps`` runs do not stop at their targets, and ``evals`` is
    the number of steps between two evaluations.

    Raises:
        UserError: naming the first bad word and what would be right.
    """
    root = root.resolve()
    names = [
        _one_of("VARIANT", v, submission_loader.variants(root), hyphens=True) for v in variants
    ]
    workloads = WORKLOADS if workload == "all" else (_one_of("WORKLOAD", workload, WORKLOADS),)
    _one_of("SIZE", size, SIZES)
    harness = _one_of(
        "HARNESS", harness or ("embedded" if size == "mini" else "algoperf"), HARNESSES
    )
    _one_of("RULESET", ruleset, RULESETS)
    if ruleset == "self" and harness == "embedded":
        raise UserError("RULESET=self: HARNESS=algoperf has rulesets, the embedded harness has not")
    if version is not None:
        _one_of("VERSION", version, versions.NAMES)
        if harness == "embedded":
            raise UserError(
                f"VERSION={version}: minis have targets and budgets of their own; HARNESS=algoperf "
                "takes a version"
            )
    if all_steps and harness != "embedded":
        raise UserError(
            "ALL_STEPS=1: AlgoPerf's harness stops at the targets; HARNESS=embedded SIZE=mini goes "
            "on to the last step"
        )
    if evals is not None and not all_steps:
        raise UserError(
            f"EVALS={evals}: a run to its target is evaluated as its workload says; with "
            "ALL_STEPS=1 every so many steps"
        )
    period = None if evals is None else _count("EVALS", evals)
    if size == "full" and harness == "embedded":
        raise UserError("SIZE=full HARNESS=embedded: full size runs under HARNESS=algoperf alone")
    seed_list = parse_seeds(seeds)
    if harness == "algoperf" and 0 in seed_list:
        raise UserError("SEEDS=0: AlgoPerf takes --rng_seed=0 as unset; use seeds from 1 on")
    gpu_count = None if gpus is None else _count("GPUS", gpus)
    if harness == "embedded" and gpu_count not in (None, 1):
        raise UserError(f"GPUS={gpus}: the embedded harness is one process; GPUS=1 or none")
    number_of_trials = _count("TRIALS", trials, at_most=1000)
    if ruleset == "self" and number_of_trials > 1:
        raise UserError(f"RULESET=self: one point is built in; TRIALS={trials} are more")
    step_limit = None if steps is None else _count("STEPS", steps)
    if processes is not None:
        _count("PROCESSES", processes)
    if harness == "embedded":
        if processes is not None:
            raise UserError(f"PROCESSES={processes}: the embedded harness is one process")
        if wandb and importlib.util.find_spec("wandb") is None:
            raise UserError("WANDB=1: no module wandb here: `pip install wandb` brings it")
    directory = None
    if data_dir is not None:
        directory = paths.given("DATA_DIR", data_dir, root).resolve()
        if not directory.is_dir() and not dry_run:  # it may be another machine's
            raise UserError(f"DATA_DIR={data_dir}: no such folder")
    folder = paths.given("OUT", out or f"results/runs/{size}", root)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"OUT={out}: is a file, not a folder")

    runs: list[RunSpec] = []
    spaces: dict[str, Path] = {}
    for variant in names:
        fields = submission_loader.fields(root, variant)
        changes = hparams.parse_settings(fields, f, tau, settings)
        label = variant + points.label(changes)
        # Under AlgoPerf's harness SIZE=mini is its own models on little data: the paper's points.
        small_models = size == "mini" and harness == "embedded"
        if small_models and step_limit is not None:
            label += f"_steps{step_limit}"
        # The default's numbers are those that the pinned AlgoPerf has itself.
        label += f"_{version}" if version not in (None, versions.DEFAULT) else ""
        label += "_allsteps" if all_steps else ""
        label += "" if period is None else f"_evals{period}"
        label += "_self" if ruleset == "self" else ""
        path = spaces[variant] = _search_space(root, variant, small_models, search_space)
        for base in workloads:
            name = base
            if size == "mini":
                name += MINI if small_models else MINIDATA
            if ruleset == "self":
                own = [hparams.one_point(path, fields, changes)]
            else:
                own = [
                    hparams.override(point, changes, fields, where=f"{_shown(path, root)} ({name})")
                    for point in hparams.read_points(
                        path, number_of_trials, fields, name.removesuffix(MINIDATA)
                    )
                ]
            limit = step_limit
            if limit is None and small_models and config_dir is None:
                limit = budget(root, base)
            runs += [
                RunSpec(
                    variant=variant,
                    label=label,
                    workload=name,
                    seed=seed,
                    trial=trial,
                    hparams=point,
                    run_dir=folder / label / f"study_{seed}" / f"{name}_pytorch" / f"trial_{trial}",
                    ruleset=ruleset,
                    stop_at_target=not all_steps,
                    max_steps=limit,
                    eval_period=period,
                )
                for seed in seed_list
                for trial, point in enumerate(own, start=1)
            ]
    return Plan(
        root=root,
        harness=harness,
        size=size,
        out=folder,
        runs=tuple(runs),
        search_spaces=spaces,
        gpus=gpu_count,
        data_dir=directory,
        config_dir=Path(config_dir).resolve() if config_dir else None,
        steps=step_limit,
        version=version,
        dry_run=dry_run,
    )


def budget(root: Path, mini: str) -> int | None:
    """Steps of a mini's budget, by its name without ``_mini``; None where no file says."""
    try:
        own = files.read_json(root / "workloads_config" / f"{mini}.json").get("mini")
    except files.Unreadable:
        return None
    steps = own.get("max_steps") if isinstance(own, dict) else None
    return steps if isinstance(steps, int) else None


def parse_seeds(text: str) -> list[int]:
    """Seeds of a study: ``3`` is a count (seeds 1, 2, 3), ``3,4,5`` or ``7,`` a list.

    Counting starts at 1 because AlgoPerf takes ``--rng_seed=0`` as unset; a list may name 0.
    """
    shown = text if len(text) <= 60 else text[:57] + "..."
    wrong = UserError(f"SEEDS={shown}: a count such as 3 (seeds 1, 2, 3) or a list such as 3,4,5")
    words = [word.strip() for word in text.split(",")]
    if not words[-1] and len(words) > 1:
        words.pop()
    # isdecimal and isascii: int() would also take "1_0", "+1" and other scripts' digits.
    if not all(word.isascii() and word.isdecimal() for word in words):
        raise wrong
    numbers = [int(word) if len(word) <= 10 else 2**31 for word in words]
    if "," not in text:
        if not 1 <= numbers[0] <= 1000:
            raise wrong
        return list(range(1, numbers[0] + 1))
    if max(numbers) >= 2**31:
        raise UserError(f"SEEDS={shown}: seeds are below 2**31")
    if len(set(numbers)) < len(numbers):
        raise UserError(f"SEEDS={shown}: a seed is there twice")
    return numbers


def describe(plan: Plan) -> list[str]:
    """The plan as lines to print: one a run, and its hyperparameters."""
    lines = []
    for run in plan.runs:
        lines.append(f"{run.name} -> {_shown(run.run_dir, plan.root)}")
        lines.append("  " + " ".join(f"{key}={value}" for key, value in run.hparams.items()))
    return lines


def _search_space(root: Path, variant: str, mini: bool, given: str | None) -> Path:
    if given is not None:
        return paths.given("SEARCH_SPACE", given, root)
    path = root / "search_spaces" / f"{variant}.json"
    if not mini:
        return path
    # The point of the full size does not suit the minis' few steps: it would train, and miss.
    own = path.parent / "mini" / path.name
    if not own.exists():
        raise UserError(
            f"{own.relative_to(root)}: not there, and SIZE=mini needs a point of its own: copy one "
            f"of {own.parent.relative_to(root)}/ and set its fields, or give SEARCH_SPACE="
        )
    return own


def _one_of(word: str, value: str, choices: Sequence[str], hyphens: bool = False) -> str:
    name = value.replace("-", "_") if hyphens else value
    if name not in choices:
        extra = " or all" if word == "WORKLOAD" else ""
        raise UserError(f"{word}={value}: there is {', '.join(choices)}{extra}")
    return name


def _count(word: str, text: str, at_most: int = 2**31 - 1) -> int:
    # Ten digits: int() refuses thousands, in words of its own.
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= 10 else 0
    if not 1 <= number <= at_most:
        wanted = "" if at_most == 2**31 - 1 else f" and at most {at_most}"
        raise UserError(f"{word}={text[:40]}: an integer of at least 1{wanted}")
    return number


def _shown(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else path
