"""Run submissions: ``python scripts/submit.py --variant=eshampoo_adaptive --workload=ogbg``."""

from __future__ import annotations

import functools
import shlex

import command_line  # noqa: F401  first: it handles signals from here on
from absl import flags
from command_line import ROOT, run

from algoperf_shampoo import paths, versions
from algoperf_shampoo.study import cost, launch, logs, plan, table_text, tables

_VARIANT = flags.DEFINE_list("variant", None, "Folders of submissions/, comma-separated.")
_WORKLOAD = flags.DEFINE_string("workload", "all", "fastmri, imagenet_vit, ogbg or all.")
_SIZE = flags.DEFINE_string("size", "mini", "mini (small models, data shipped) or full.")
_HARNESS = flags.DEFINE_string("harness", None, "embedded (default for mini) or algoperf.")
_SEEDS = flags.DEFINE_string("seeds", "1", "A count (3: seeds 1, 2, 3) or a list (3,4,5).")
_GPUS = flags.DEFINE_string("gpus", None, "Number of GPUs; what there is if left out.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Data folder; minis have theirs with them.")
_F = flags.DEFINE_string("f", None, "Steps between checks of the basis, instead of the point's.")
_TAU = flags.DEFINE_string("tau", None, "Threshold of Eq. 11, instead of the point's.")
_SET = flags.DEFINE_string("set", None, "Fields of the point: 'learning_rate=0.02 one_dim=adam'.")
_OUT = flags.DEFINE_string("out", None, "Folder for the runs; results/runs/SIZE if left out.")
_TRIALS = flags.DEFINE_string("trials", "1", "Number of points of the search space to run.")
_SEARCH_SPACE = flags.DEFINE_string("search_space", None, "Another search-space file.")
_CONFIG = flags.DEFINE_string("workloads_config", None, "Another folder of workload files.")
_STEPS = flags.DEFINE_string("steps", None, "End after so many steps.")
_PROCESSES = flags.DEFINE_string("processes", None, "HARNESS=algoperf without a GPU: processes.")
_WANDB = flags.DEFINE_bool("wandb", False, "Log to Weights & Biases as well.")
_KEEP_DIVERGED = flags.DEFINE_bool(
    "keep_diverged", False, "Embedded harness: a run whose loss is not finite goes on."
)
_ALL_STEPS = flags.DEFINE_bool(
    "all_steps", False, "Embedded harness: every step of the budget, past the targets."
)
_EVALS = flags.DEFINE_string("evals", None, "With all steps: steps between two evaluations.")
_PRICE = flags.DEFINE_string("price", None, "Of an hour of one GPU, for the preview of costs.")
_RULESET = flags.DEFINE_string("ruleset", "external", "external, or self: the point built in.")
_VERSION = flags.DEFINE_string("version", None, "AlgoPerf's: v0.5, v0.6 or 2026.")
_AGAINST = flags.DEFINE_string(
    "against", None, "A run, or a folder of runs: at each evaluation, where this one stands."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check and print what would run.")


def main() -> int:
    """Plan, launch, and print the table of this set of runs."""
    wanted = plan.make_plan(
        ROOT,
        _VARIANT.value or [""],
        workload=_WORKLOAD.value,
        size=_SIZE.value,
        harness=_HARNESS.value,
        seeds=_SEEDS.value,
        gpus=_GPUS.value,
        data_dir=_DATA_DIR.value,
        f=_F.value,
        tau=_TAU.value,
        settings=_SET.value,
        out=_OUT.value,
        search_space=_SEARCH_SPACE.value,
        config_dir=_CONFIG.value,
        trials=_TRIALS.value,
        steps=_STEPS.value,
        processes=_PROCESSES.value,
        wandb=_WANDB.value,
        ruleset=_RULESET.value,
        version=_VERSION.value,
        all_steps=_ALL_STEPS.value,
        evals=_EVALS.value,
        dry_run=_DRY_RUN.value,
    )
    if wanted.dry_run and wanted.harness == "embedded":
        print(*plan.describe(wanted), sep="\n")
    price = None if _PRICE.value is None else cost.parse_price(_PRICE.value)
    if wanted.size == "full" or price is not None:
        own = logs.find_trials([wanted.out]) if wanted.out.is_dir() else []
        lines = cost.preview(
            wanted.runs,
            price,
            wanted.gpus,
            version=wanted.version or versions.DEFAULT,
            ruleset=_RULESET.value,
            records=own,
        )
        print(*lines, sep="\n", end="\n\n")
    own_flags = {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module("__main__")}
    echo = functools.partial(print, flush=True)
    failed = launch.launch(wanted, own_flags, echo=echo)
    if not wanted.dry_run:
        trials = [logs.read_trial(r.run_dir) for r in wanted.runs if logs.is_trial(r.run_dir)]
        width = table_text.terminal_width()
        for table in tables.of_runs(trials, ROOT):
            print("\n" + table_text.render(table, width))
        if trials:
            print("\n" + _next_step(wanted))
    return 1 if failed else 0


def _next_step(done: plan.Plan) -> str:
    """What to type after this, and where to read on."""
    table = "make table1"
    if done.out != ROOT / "results" / "runs" / done.size:
        table += f" RUNS={shlex.quote(paths.shown(done.out, ROOT))}"
    return f"next: {table}\n      (README.md, Reading the results, has the files and the columns)"


if __name__ == "__main__":
    run(main)
