"""``make test-algoperf``: all that is shown under AlgoPerf's own runner. Three hours on two cores.

``PARTS=cuts,kills`` takes some of :data:`PARTS`. Each is a command of this folder on ``make
data-algoperf-mini``'s data (``DATA_DIR=``); its records come into ``OUT=``, its runs lie in
``OUT/work`` until it has gone well. 1 if a part fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from algoperf_shampoo import paths
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness.algoperf import env

ROOT = Path(__file__).resolve().parents[2]
# The workload of ours that a variant is tried on beside MNIST, two of them with smaller models.
OURS = {
    "fastmri_minidata": "shampoo,shampoo_adaptive,shampoo2_trace,eshampoo_qr,kl_shampoo",
    "imagenet_vit_minidata": "soap",
    "ogbg_minidata": "kl_soap",
}
# The same of the variants that have factors, where two processes share the work: every workload
# with rules of several kinds.
SHARED = {
    "fastmri_minidata": "shampoo_adaptive,shampoo2_trace,eshampoo_qr,kl_shampoo",
    "imagenet_vit_minidata": "soap,eshampoo_fixed",
    "ogbg_minidata": "eshampoo_adaptive,kl_soap,shampoo_grafting,shampoo",
}
SHARING = ("--sharding=on", "--prefix=sharded_", "--runs=two_resumed,exported_resumed")
SMALL = {"VIT_VARIANT": "Ti/16", "FASTMRI_CHANNELS": "8"}
BRIEF = ("--brief", "--steps=8", "--frequency=3", "--exported", "--workloads=ogbg_minidata")
OLD = "--variants=nadamw,shampoo_grafting,eshampoo_fixed,eshampoo_adaptive"
ADAPTIVE = ("--variant=eshampoo_adaptive", "--frequency=3", "--whom=group")


# What is run for a part: a module of this folder, its record (none: it names its own) and options.
PARTS: dict[str, list[tuple[str, ...]]] = {
    "cuts": [
        ("power_cut_acceptance", "--out=power_cuts.json"),
        ("power_cut_acceptance", "--out=power_cuts_unmended.json", "--unmended", "--cuts=10"),
    ],
    "kills": [("kill_acceptance", "--out=kills.json")],
    "kills-self": [("kill_acceptance", "--out=kills_self.json", "--ruleset=self", *ADAPTIVE)],
    "variants": [
        ("acceptance", "--workloads=mnist"),
        *(
            ("acceptance", f"--workloads={name}", f"--variants={of}", "--sharding=off")
            for name, of in OURS.items()
        ),
    ],
    "sharded": [
        ("acceptance", f"--workloads={name}", f"--variants={of}", *SHARING)
        for name, of in [("mnist", ",".join(SHARED.values())), *SHARED.items()]
    ],
    "rulesets": [
        ("acceptance", OLD, *BRIEF, f"--ruleset={ruleset}", f"--prefix=exported_{name}")
        for ruleset, name in (("external", "brief_"), ("self", "self_"))
    ],
    "workflows": [("workflow_acceptance", "--out=workflows.json")],
}


def chosen(words: str) -> list[str]:
    """The parts that are named, in their order here.

    Raises:
        UserError: one of them there is not.
    """
    names = words.split(",") if words else [*PARTS]
    for name in names:
        if name not in PARTS:
            raise UserError(f"PARTS={words}: no part {name!r}: there is {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]


def command(words: Sequence[str], data: Path, work: Path, out: Path) -> list[str]:
    """One command of a part, with its places."""
    module, *options = words
    record = [word for word in options if word.startswith("--out=")]
    rest = [word for word in options if word not in record]
    place = out / record[0].removeprefix("--out=") if record else out
    head = [sys.executable, "-m", f"tests.algoperf.{module}", f"--out={place}"]
    if module != "workflow_acceptance":
        head += [f"--data={data}", f"--work={work}"]
    return [*head, *rest]


def main() -> int:
    """Run the parts one after another; 1 if one fails, 2 if one cannot start."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default="")
    parser.add_argument("--data_dir", default="data/algoperf_mini")
    parser.add_argument("--out", default="results/algoperf_acceptance")
    args = parser.parse_args()
    try:
        parts = chosen(args.parts)
        data = paths.given("DATA_DIR", args.data_dir, ROOT)
        out = paths.given("OUT", args.out, ROOT)
        if not (data / "minidata.json").is_file():
            raise UserError(f"DATA_DIR={data}: no mini data; make some: `make data-algoperf-mini`")
        missing = env.missing_message(found := env.look(ROOT))
        if missing:
            raise UserError(missing)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    environment = {**os.environ, **SMALL, env.PYTHON_VARIABLE: found.executable}
    failed = []
    for part in parts:
        work = out / "work" / part
        shutil.rmtree(work, ignore_errors=True)
        codes = []
        for number, words in enumerate(PARTS[part]):
            whole = command(words, data, work / str(number), out)
            print(f"{part}: {' '.join(whole[1:])}", flush=True)
            codes.append(subprocess.run(whole, cwd=ROOT, env=environment).returncode)
        if any(codes):
            failed.append(part)
        else:
            shutil.rmtree(work, ignore_errors=True)
    print(f"{len(parts) - len(failed)} of {len(parts)} parts went well; records: {out}")
    if failed:
        print(f"failed: {', '.join(failed)}; their runs: {out / 'work'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
