"""Power cuts under AlgoPerf's own runner, simulated. Takes half an hour.

``ALGOPERF_PYTHON=... python -m tests.algoperf.power_cut_acceptance --data DIR --work DIR --out
FILE`` trains NAdamW on ``make data-algoperf-mini``'s OGBG and keeps account of what the disk was
told to keep: of a file its bytes at its last fsync, of a folder its names at its own. The runner
itself syncs nothing; the launcher does. After each fsync two folders are what a cut could leave:
without the names that were not synced, and with them but without data that were not. The same
command goes on from each of ``--cuts`` of them, evenly spread. Its parameters in the end must be
an unbroken run's to the bit, its evaluations one curve that begins with those of the last
checkpoint that was safe, and its row's cell what the unbroken run's is.

With ``--unmended`` the launcher brings checkpoints to disk, and nothing else that the runner wrote:
then a cut must do harm, or this could not see any.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import disk
from algoperf_shampoo.harness.algoperf import door, folder
from algoperf_shampoo.study import logs
from algoperf_shampoo.study.plan import Plan, make_plan
from tests.algoperf import kill_acceptance, provenance

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6


@dataclass
class Image:
    """Files by name below the run's folder, as hashes of the store; what was safe; the fsync."""

    files: dict[str, str]
    saved_step: int
    after: str
    lost: str


class Watch:
    """``os`` for :mod:`.disk`, which looks at the real folder at each fsync.

    The runner, another process, writes there as well, and its bytes are durable only when the
    launcher syncs them.
    """

    def __init__(self, run_dir: Path, store: Path) -> None:
        self.run_dir, self.store = run_dir, store
        self.images: list[Image] = []
        self._data: dict[int, str] = {}  # by inode: the bytes at its last fsync
        self._names: dict[str, int] = {}  # durable names and their inodes
        self._paths: dict[int, Path] = {}
        self._saved = 0
        store.mkdir(parents=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        descriptor = os.open(path, flags, mode)
        self._paths[descriptor] = Path(path)
        return descriptor

    def close(self, descriptor: int) -> None:
        del self._paths[descriptor]
        os.close(descriptor)

    def unlink(self, path: Any) -> None:
        self._forget(path)
        os.unlink(path)

    def replace(self, source: Any, target: Any) -> None:
        self._forget(target)
        os.replace(source, target)

    def fsync(self, descriptor: int) -> None:
        path = self._paths[descriptor]
        if path == self.run_dir:
            self._names = self._present()
            steps = [int(name.split("_")[1]) for name in self._names if is_checkpoint(name)]
            # A name on disk whose bytes are: what the run may rely on from now on.
            safe = [s for s in steps if self._names[f"checkpoint_{s}"] in self._data]
            self._saved = max(safe, default=0)
        elif path.parent == self.run_dir:
            self._data[os.fstat(descriptor).st_ino] = self._keep(path.read_bytes())
        else:
            return
        for lost, names in (("names", self._names), ("data", self._present())):
            files = {name: self._data.get(inode, self._keep(b"")) for name, inode in names.items()}
            self.images.append(Image(files, self._saved, f"fsync of {path.name}", lost))

    def restore(self, image: Image, run_dir: Path) -> None:
        """The folder as the cut leaves it."""
        run_dir.mkdir(parents=True)
        for name, digest in image.files.items():
            shutil.copyfile(self.store / digest, run_dir / name)

    def _forget(self, path: Any) -> None:
        """A file that goes: its inode's number may be another file's next."""
        if os.path.lexists(path):
            self._data.pop(os.lstat(path).st_ino, None)

    def _present(self) -> dict[str, int]:
        entries = os.scandir(self.run_dir) if self.run_dir.is_dir() else ()
        return {entry.name: entry.inode() for entry in entries if entry.is_file()}

    def _keep(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        if not (self.store / digest).exists():
            (self.store / digest).write_bytes(data)
        return digest


def is_checkpoint(name: str) -> bool:
    return name.startswith("checkpoint_") and name.removeprefix("checkpoint_").isdecimal()


def plan(args: argparse.Namespace, out: Path, data: str) -> Plan:
    return make_plan(
        ROOT,
        ["nadamw"],
        workload="ogbg",
        size="mini",
        harness="algoperf",
        data_dir=str(args.work / data),
        out=str(out),
        ruleset=args.ruleset,
    )


def train(made: Plan) -> tuple[int, list[str]]:
    """Runs that failed, and what the launcher said."""
    said: list[str] = []
    return door.launch(made, {"steps": str(STEPS)}, echo=said.append), said


def sync_checkpoints_alone(run_dir: Path) -> None:
    """In the place of :func:`.folder.sync`, what it was before it was mended."""
    for path in folder.checkpoints(run_dir)[:1]:
        disk.sync_file(path)
    disk.sync_folder(run_dir)


def cell(run_dir: Path) -> tuple[str, int | None, list[str]]:
    """What a table says of the run."""
    trial = logs.read_trial(run_dir)
    return trial.outcome, trial.steps_to_target, trial.holes


def evaluations(run_dir: Path) -> dict[int, float]:
    trial = logs.read_trial(run_dir)
    return {evaluation.step: evaluation.value for evaluation in trial.evaluations}


def different(images: list[Image]) -> list[Image]:
    kept: dict[str, Image] = {}
    for image in images:
        kept.setdefault(json.dumps([image.files, image.saved_step], sort_keys=True), image)
    return list(kept.values())


def main() -> int:
    """Record, cut, go on; 1 if a cut did harm."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--ruleset", default="external", choices=("external", "self"))
    parser.add_argument("--unmended", action="store_true", help="wants harm to be seen")
    args = parser.parse_args()
    args.data, args.work, args.out = (p.resolve() for p in (args.data, args.work, args.out))
    run = provenance.of_this_run()
    os.environ |= kill_acceptance.REPLAY
    if args.unmended:
        folder.sync = sync_checkpoints_alone
    # The run that is cut evaluates, and saves, after every step; one that goes on at its end.
    kill_acceptance.make_data(args.data, args.work / "often", 0)
    kill_acceptance.make_data(args.data, args.work / "seldom", 3600)
    made = plan(args, args.work / "unbroken", "often")
    run_dir = made.runs[0].run_dir
    watch = Watch(run_dir, args.work / "store")
    disk.os = watch  # type: ignore[attr-defined]
    failed, _ = train(made)
    disk.os = os  # type: ignore[attr-defined]
    expected = kill_acceptance.parameters(run_dir, STEPS), cell(run_dir)
    whole = evaluations(run_dir)
    images = different(watch.images)
    chosen = [images[i * (len(images) - 1) // (args.cuts - 1)] for i in range(args.cuts)]
    record: dict[str, Any] = {
        "what": "power cuts of a NAdamW run on ogbg_minidata under AlgoPerf's runner, simulated",
        **run,
        "ruleset": args.ruleset,
        "unmended": args.unmended,
        "steps": STEPS,
        "fsyncs": len(watch.images) // 2,
        "different_folders": len(images),
        "unbroken": {"parameters": expected[0], "cell": expected[1], "evaluated_at": [*whole]},
        "cuts": [],
    }

    def go_on(number: int) -> None:
        image = chosen[number]
        again = plan(args, args.work / f"cut_{number}", "seldom")
        place = again.runs[0].run_dir
        watch.restore(image, place)
        try:
            failed, said = train(again)
        except UserError as error:  # refused
            failed, said = 1, [f"error: {error}"]
        good = not failed
        entry: dict[str, Any] = {"after": image.after, "lost": image.lost, "failed": failed}
        entry["safe_step"], entry["said"] = image.saved_step, said
        if good:
            curve = evaluations(place)
            over = any("complete already" in line for line in said)
            launched = folder.read_launches(place)[-1]["from_step"]
            entry["went_on_from"] = STEPS if over else launched
            safe = {step: value for step, value in whole.items() if step <= entry["went_on_from"]}
            entry["evaluated_at"] = [*curve]
            entry["same_parameters"] = kill_acceptance.parameters(place, STEPS) == expected[0]
            entry["same_cell"] = cell(place) == expected[1]
            entry["kept_evaluations"] = {s: curve.get(s) for s in safe} == safe
            # The runner writes its last checkpoint again, in place, when it ends.
            least = image.saved_step - (image.saved_step == STEPS)
            entry["kept_what_was_safe"] = entry["went_on_from"] >= least
            good = all(entry[k] for k in entry if k.startswith(("same_", "kept_")))
        entry |= {"number": number, "good": good}
        fresh = args.work / f"cut_{number}.new"
        fresh.write_text(json.dumps(entry))
        fresh.rename(args.work / f"cut_{number}.json")
        print(number, "good" if good else "HARM", entry, flush=True)
        shutil.rmtree(args.work / f"cut_{number}")

    def go_on_from(numbers: list[int]) -> None:
        for number in numbers:
            go_on(number)

    # The middle ones first, should the time not suffice for all. Processes, because a launcher ends
    # what it finds below itself.
    order = sorted(range(len(chosen)), key=lambda n: int(f"{n:05b}"[::-1], 2))
    fork = multiprocessing.get_context("fork")
    workers = [
        fork.Process(target=go_on_from, args=(order[n :: args.jobs],)) for n in range(args.jobs)
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        time.sleep(5)
        paths = [args.work / f"cut_{number}.json" for number in range(len(chosen))]
        record["cuts"] = [json.loads(p.read_text()) for p in paths if p.is_file()]
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    cuts = record["cuts"]
    whole_record = not failed and len(cuts) == len(chosen)
    good = [cut["good"] for cut in cuts]
    return 0 if whole_record and (not all(good) if args.unmended else all(good)) else 1


if __name__ == "__main__":
    sys.exit(main())
