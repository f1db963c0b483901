"""Whether two commits train the same curves: ``python scripts/same_curves.py --before=main``."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from absl import flags
from command_line import ROOT, run

from algoperf_shampoo.harness import submission_loader
from algoperf_shampoo.study import plan, same_curves
from algoperf_shampoo.study.claims import archive

_RECORDS = "results/measured/mini/again_runs.tar.xz"
_BEFORE = flags.DEFINE_string(
    "before", None, "A commit; that of the latest records of minis if left out."
)
_AFTER = flags.DEFINE_string("after", None, "A commit; the files as they are here if left out.")
_VARIANT = flags.DEFINE_list("variant", None, "Variants, with commas; those of both if left out.")
_WORKLOAD = flags.DEFINE_string("workload", "all", "fastmri, imagenet_vit, ogbg or all.")
_STEPS = flags.DEFINE_string("steps", "60", "Steps of each run.")


def main() -> int:
    """Train the minis in both trees and compare: 0, or 1 if a curve differs."""
    echo = functools.partial(print, flush=True)
    variants = submission_loader.variants(ROOT)
    chosen = [name.replace("-", "_") for name in _VARIANT.value or variants]
    checked = plan.make_plan(ROOT, chosen, workload=_WORKLOAD.value, steps=_STEPS.value)
    assert checked.steps is not None
    with tempfile.TemporaryDirectory(prefix="same_curves_") as name:
        folder = Path(name)
        before = _BEFORE.value or _recorded()
        echo(f"before: {same_curves.checkout(ROOT, before, folder / 'before')}")
        after = ROOT
        if _AFTER.value:
            after = folder / "after"
            echo(f"after: {same_curves.checkout(ROOT, _AFTER.value, after)}")
        else:
            echo(f"after: the files in {ROOT}")
        if not _VARIANT.value:
            chosen, alone = same_curves.in_both(folder / "before", after)
            if alone:
                echo(f"in one of the two alone, not compared: {', '.join(alone)}")
        for tree in (folder / "before", after):
            out = folder / f"runs_{'after' if tree == after else 'before'}"
            same_curves.train(tree, out, after, chosen, _WORKLOAD.value, checked.steps, echo)
        pairs = same_curves.compare(folder / "runs_before", folder / "runs_after")
    print(*same_curves.report(pairs), sep="\n")
    return 0 if all(pair.same for pair in pairs) else 1


def _recorded() -> str:
    with archive.unpacked(ROOT / _RECORDS) as there:
        return same_curves.recorded_commit(there.folder)


if __name__ == "__main__":
    run(main)
