"""Targets of the minis from the logs: ``python scripts/mini_targets.py [--write]``."""

from __future__ import annotations

import json

from absl import flags
from command_line import ROOT, run

from algoperf_shampoo.study import targets

_LOGS = flags.DEFINE_string("logs", "results/measured/mini", "Folder with grid/ and targets/.")
_WRITE = flags.DEFINE_bool("write", False, "Write them into workloads_config/.")


def main() -> int:
    """Print each mini's targets and the point they come from."""
    configs = sorted((ROOT / "workloads_config").glob("*.json"))
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
