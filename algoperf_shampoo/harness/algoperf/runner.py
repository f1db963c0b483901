"""AlgoPerf's ``submission_runner.py``, on a machine without a GPU, on a mini data set, or with the
numbers of another version of the benchmark.

``python -m algoperf_shampoo.harness.algoperf.runner FLAGS`` takes the runner's own flags. Any other
run of the full data on GPUs does not come here: it starts ``submission_runner`` itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

REQUIRED = ("workload", "framework", "submission_path", "experiment_dir", "experiment_name")


def main() -> None:
    """Patch what :mod:`.cpu_compat` lists, then hand over to the runner's own main."""
    import torch

    from algoperf_shampoo.harness.algoperf import cpu_compat

    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        cpu_compat.apply()
    cpu_compat.tolerate_unknown_machine()
    submission_runner = importlib.import_module("submission_runner")
    if on_cpu:
        cpu_compat.apply_after_import()

    from absl import app, flags

    def run(arguments: Sequence[str]) -> None:
        if on_cpu and flags.FLAGS.workload.startswith("ogbg"):
            cpu_compat.evaluate_ogbg_in_numpy()
        _register_minidata(flags.FLAGS)
        _apply_version(flags.FLAGS, submission_runner)
        submission_runner.main(arguments)

    for name in REQUIRED:
        flags.mark_flag_as_required(name)
    app.run(run)


def _register_minidata(values: object) -> None:
    from algoperf_shampoo.harness.algoperf import minidata

    workload, path = values.workload, values.submission_path  # type: ignore[attr-defined]
    if not workload.endswith(minidata.SUFFIX):
        return
    registry = importlib.import_module("algoperf.workloads.workloads")
    submission = importlib.import_module(registry.convert_filepath_to_module(path))
    minidata.register(Path(values.data_dir), workload, submission)  # type: ignore[attr-defined]


def _apply_version(values: object, runner: ModuleType) -> None:
    from algoperf_shampoo.harness.algoperf import benchmark

    version = benchmark.asked()
    if version is not None:
        benchmark.apply(version, values.workload, values.tuning_ruleset, runner)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
