"""Targets of the minis from the logs: ``python scripts/mini_targets.py [--write]``.

The logs, ``configs`` being any folder that is not there yet::

    python scripts/mini_targets.py --unreachable=configs
    python scripts/submit.py --variant=nadamw --workloads_config=configs --seeds=101, \
        --search_space=search_spaces/mini_grid/nadamw.json --trials=3 \
        --out=results/measured/mini/grid
    python scripts/submit.py --variant=nadamw --workloads_config=configs --seeds=201,202,203 \
        --workload=ogbg --set=learning_rate=... --out=results/measured/mini/targets

the last one for each workload, with its best learning rate of the grid.
"""

from __future__ import annotations

import json

from absl import flags
from command_line import ROOT, run

from algoperf_shampoo import paths
from algoperf_shampoo.study import targets

_LOGS = flags.DEFINE_string("logs", "results/measured/mini", "Folder with grid/ and targets/.")
_WRITE = flags.DEFINE_bool("write", False, "Write them into workloads_config/.")
_UNREACHABLE = flags.DEFINE_string(
    "unreachable", None, "Write workload files with targets of 1.0 into this folder, and no more."
)


def main() -> int:
    """Print each mini's targets and the point they come from."""
    configs = sorted((ROOT / "workloads_config").glob("*.json"))
    if _UNREACHABLE.value:
        targets.write_unreachable(configs, paths.given("unreachable", _UNREACHABLE.value, ROOT))
        return 0
    budgets = {
        f"{path.stem}_mini": json.loads(path.read_text(encoding="utf-8"))["mini"]["max_steps"]
        for path in configs
    }
    logs = ROOT / _LOGS.value
    found = targets.measured_targets(logs / "grid" / "nadamw", logs / "targets", budgets)
    for path, target in zip(configs, found, strict=True):
        print(
            f"{target.workload}: validation {target.validation}, test {target.test} "
            f"(NAdamW, learning rate {target.learning_rate:.4g}, {len(target.runs)} seeds)"
        )
        if _WRITE.value:
            targets.write_target(path, target)
    return 0


if __name__ == "__main__":
    run(main)
