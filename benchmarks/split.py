"""Where a training step's time goes, and where a speed-up comes from, in the real training step.

    python -m benchmarks.split --json results/measured/h100/split.json         # GPU, full size
    python -m benchmarks.split --workloads ogbg_mini                           # CPU, minis

Trains with the submissions themselves. Full size takes synthetic batches at AlgoPerf's default
precision (TF32), copied from pinned memory, which stands for the data. Parts are measured by marks
(``benchmarks/parts.py``) in periods of F steps among periods without marks, from which the step
comes that the parts are held against: what they leave is the residual. Nothing of it is on a
benchmark's clock.

A step that waits for the host (OGBG's thousand launches) takes as long as the host does, which
varies from period to period by more than the parts that are looked for. So marked and unmarked
periods come in the order off, on, on, off, and each marked one is weighed against the unmarked one
beside it, such that a drift meets both alike; garbage is collected between periods and never in
one; and medians over pairs count, which a period that was disturbed does not move; a workload whose
steps are short gets more periods, until ``--seconds`` have gone. The step with marks less the one
without is a row of its own, ``marks``: what marking costs, or how far two halves of the same
measurement are apart.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from algoperf_shampoo import batch_sizes
from algoperf_shampoo.contract import ForwardPassMode
from algoperf_shampoo.harness import hparams, prng, submission_loader
from algoperf_shampoo.harness.spec import MINI
from algoperf_shampoo.workloads import load
from benchmarks.parts import (
    PARTS,
    Clock,
    DeviceClock,
    HostClock,
    Pairs,
    Timeline,
    amortised,
    hook,
    hook_rotations,
    speed_up,
)

ROOT = Path(__file__).resolve().parent.parent
# The paper's batch per GPU: its runs used 1 GPU, and 4 for ImageNet ViT.
BATCHES = {"fastmri": 32, "imagenet_vit": 256, "ogbg": 512}
VARIANTS = ("shampoo_grafting", "eshampoo_fixed", "nadamw")
RESIDUAL = "residual"
PERIODS, SECONDS = 10, 15.0
"""Periods with marks, and as many without; and seconds of a variant's periods: at least."""


class Training:
    """A run's training step outside any harness: ``step()`` trains one, marked or not.

    Args:
        clock: of the marks.
        changes: fields of the variant's point that are replaced.
    """

    def __init__(
        self,
        workload: Any,
        variant: str,
        clock: Clock,
        changes: Mapping[str, Any] | None = None,
        seed: int = 1,
    ) -> None:
        self.workload, self.timeline = workload, Timeline(clock)
        self.submission = submission_loader.load(ROOT, variant)
        folder = ROOT / "search_spaces" / ("mini" if workload.is_mini else "")
        fields = submission_loader.fields(ROOT, variant)
        (point,) = hparams.read_points(folder / f"{variant}.json", 1, fields, workload.name)
        self.frequency = int(point.get(hparams.F_KEY, 1))
        known = {name: value for name, value in (changes or {}).items() if name in point}
        self.point = hparams.as_namedtuple({**point, **known})
        self._rng = prng.PRNGKey(seed)
        self._params, _ = workload.init_model_fn(self._rng)
        self._state = self.submission.init_optimizer_state(
            workload, self._params, None, self.point, self._rng
        )
        self.optimizer = self._state["optimizer"]
        hook(self.optimizer, self.timeline)
        self._queue = _batches(workload, self._rng)
        self.steps = 0

    def step(self) -> None:
        """One training step."""
        part = self.timeline.part
        with part("data"):
            batch = self.submission.data_selection(
                self.workload, self._queue, self._state, self._params, None, self.point,
                self.steps, self._rng,
            )  # fmt: skip
        with part("forward_backward"):
            self.submission.update_params(**self._keywords(), batch=batch)
        self.steps += 1

    def prepare_for_eval(self) -> None:
        """What a submission does before an evaluation, on the benchmark's clock."""
        if self.submission.prepare_for_eval is not None:
            self.submission.prepare_for_eval(**self._keywords())

    def evaluation(self) -> float:
        """Seconds of an evaluation of a mini; of a full model, of the forward passes of one."""
        w, clock = self.workload, self.timeline.clock
        if w.is_mini:
            last = (None, None, self.steps)
            return _timed(
                lambda: w.eval_model(w.eval_batch_size, self._params, None, self._rng, *last), clock
            )
        batch, eval_mode = next(self._queue), ForwardPassMode.EVAL
        examples = w.num_eval_train_examples + w.num_validation_examples + w.num_test_examples
        one = _timed(
            lambda: w.model_fn(self._params, batch, None, eval_mode, self._rng, False), clock
        )
        return one * examples / len(batch["targets"])

    def _keywords(self) -> dict[str, Any]:
        return {
            "workload": self.workload,
            "current_param_container": self._params,
            "current_params_types": None,
            "model_state": None,
            "hyperparameters": self.point,
            "loss_type": self.workload.loss_type,
            "optimizer_state": self._state,
            "eval_results": [],
            "global_step": self.steps,
            "rng": self._rng,
        }


@dataclass
class Periods:
    """What periods of F steps gave, the last step of each being one at which a check is due.

    Seconds of one step: ``whole`` of periods without marks, ``with_marks`` of those with, and
    ``marked`` by part.
    """

    whole: dict[str, list[float]] = field(default_factory=lambda: {"ordinary": [], "due": []})
    with_marks: dict[str, list[float]] = field(default_factory=lambda: {"ordinary": [], "due": []})
    marked: dict[str, list[dict[str, float]]] = field(
        default_factory=lambda: {"ordinary": [], "due": []}
    )


def run_periods(training: Training, frequency: int, count: int, seconds: float = 0.0) -> Periods:
    """``count`` periods with marks and as many without, in an order that no drift favours; then
    more of them, until ``seconds`` have gone."""
    clock, timeline, found = training.timeline.clock, training.timeline, Periods()
    while training.steps % frequency:
        training.step()
    begin, number = time.perf_counter(), 0
    with _no_garbage():
        while number < 2 * count or time.perf_counter() - begin < seconds:
            timeline.on = number % 4 in (1, 2)
            gc.collect()
            for kind, steps in (("ordinary", frequency - 1), ("due", 1)):
                if steps == 0:
                    continue
                start = clock.now()
                for _ in range(steps):
                    training.step()
                taken_by_step = (clock.now() - start) / steps
                if timeline.on:
                    taken = timeline.take()
                    found.marked[kind].append({n: s / steps for n, s in taken.items()})
                    found.with_marks[kind].append(taken_by_step)
                else:
                    found.whole[kind].append(taken_by_step)
            number += 1
    timeline.on = False
    return found


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Inside, garbage is collected where it is asked for alone."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def measure(
    workload: Any,
    variant: str,
    clock: Clock,
    frequency: int = 10,
    periods: int = PERIODS,
    evaluations: bool = True,
    seconds: float = 0.0,
) -> dict[str, Any]:
    """Parts of a mean step of one variant on one workload, seconds; see the module.

    ``frequency``: the F that is measured at; means are for the F of the variant's point.
    """
    training = Training(workload, variant, clock, {hparams.F_KEY: frequency})
    if clock.nests:
        places = hook_rotations(training.optimizer, lambda: training.timeline.part("rotations"))
    for _ in range(2 * frequency + 2):  # kernels are compiled, graphs recorded, bases in use
        training.step()
    found = run_periods(training, frequency, periods, seconds)
    f = training.frequency
    ordinary, due = (paired(found.marked[kind], found.whole[kind]) for kind in ("ordinary", "due"))
    whole = {kind: statistics.median(values or [0.0]) for kind, values in found.whole.items()}
    with_marks = {
        kind: paired([{"step": s} for s in values], found.whole[kind]).get("step", 0.0)
        for kind, values in found.with_marks.items()
    }
    note = ""
    if not clock.nests:
        rotations, places, note = _rotations(workload, variant, clock, frequency)
        if rotations is not None:
            for parts in (ordinary, due):
                parts["rotations"] = rotations
                parts["update"] -= rotations
    ordinary["communication"] = due["communication"] = 0.0
    parts = amortised(ordinary, due, f)
    step = _mean_step(whole, f, frequency)
    parts[RESIDUAL] = step - sum(parts.values())
    record: dict[str, Any] = {
        "workload": workload.name,
        "variant": variant,
        "F": f,
        "measured_at_F": frequency,
        "batch": _batch_size(workload),
        "step": step,
        "parts": parts,
        "ordinary": ordinary,
        "due": due,
        "whole": whole,
        "marks": _mean_step(with_marks, f, frequency) - step,
        "spread": {kind: _spread(values) for kind, values in found.whole.items()},
        "periods": len(found.whole["due"]),
        "sum_over_step": (step - parts[RESIDUAL]) / step if step else None,
        "notes": [note] if note else [],
        "rotation_places": places,
    }
    if evaluations:
        record["evaluation"] = training.evaluation()
        record["prepare_for_eval"] = _timed(training.prepare_for_eval, clock, before=training.step)
    return record


def compare(
    records: list[dict[str, Any]], steps_to_target: Mapping[tuple[str, str], float]
) -> list[dict[str, Any]]:
    """Every variant against the first one of its workload, where both have steps to the target."""
    made = []
    for record in records:
        first = next(r for r in records if r["workload"] == record["workload"])
        pair = [
            steps_to_target.get((r["workload"].removesuffix(MINI), r["variant"]))
            for r in (first, record)
        ]
        if record is first or pair[0] is None or pair[1] is None:
            continue
        seconds = speed_up(first["parts"], record["parts"], (pair[0], pair[1]))
        made.append(
            {
                "workload": record["workload"],
                "variant": record["variant"],
                "against": first["variant"],
                "steps": pair,
                "seconds": [n * r["step"] for n, r in zip(pair, (first, record), strict=True)],
                "saved": seconds,
            }
        )
    return made


def paper_steps() -> dict[tuple[str, str], float]:
    """Mean steps to target of Table 1, of the rows without tau, at full size."""
    path = ROOT / "results" / "paper" / "table1.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {
        (row["workload"], row["variant"]): row["steps_mean"]
        for row in rows
        if row["steps_mean"] is not None and row["tau"] is None
    }


def lines(records: list[dict[str, Any]], compared: list[dict[str, Any]]) -> list[str]:
    """Tables for a terminal: milliseconds a step, and seconds of the differences."""
    made = []
    for name in dict.fromkeys(r["workload"] for r in records):
        own = [r for r in records if r["workload"] == name]
        header = "  ".join(f"{r['variant']:>18}" for r in own)
        made += [f"{name}, batch {own[0]['batch']}, ms a mean step", f"{'':18}{header}"]
        for row in (*PARTS, RESIDUAL):
            cells = "  ".join(f"{1e3 * r['parts'].get(row, 0.0):18.3f}" for r in own)
            made.append(f"{row:18}{cells}")
        made.append(f"{'step':18}" + "  ".join(f"{1e3 * r['step']:18.3f}" for r in own))
        marks = "  ".join(f"{1e3 * r['marks']:18.3f}" for r in own if "marks" in r)
        made.append(f"{'marks add':18}{marks}")
        sums = [r["sum_over_step"] for r in own]
        made.append(
            f"{'parts / step':18}"
            + "  ".join(f"{100 * s:17.1f}%" if s is not None else f"{'-':>18}" for s in sums)
        )
        if all("evaluation" in r for r in own):
            for row in ("evaluation", "prepare_for_eval"):
                cells = "  ".join(f"{1e3 * r[row]:18.1f}" for r in own)
                made.append(f"{row:18}{cells}")
        made += [f"  {r['variant']}: {note}" for r in own for note in r["notes"]]
        made.append("")
    for one in compared:
        first, second = one["seconds"]
        made.append(
            f"{one['workload']}: {one['against']} {one['steps'][0]:.0f} steps, {first:.0f} s; "
            f"{one['variant']} {one['steps'][1]:.0f} steps, {second:.0f} s; "
            f"saved {first - second:.0f} s, by"
        )
        made += [f"  {row:18}{seconds:12.1f} s" for row, seconds in one["saved"].items()]
    return made


def _rotations(
    workload: Any, variant: str, clock: Clock, frequency: int
) -> tuple[float | None, int, str]:
    """Seconds of the rotations of one step, by events inside the recorded update; None, and why,
    where these cannot be had."""
    pairs = Pairs()
    training = Training(workload, variant, clock, {hparams.F_KEY: frequency})
    places = hook_rotations(training.optimizer, pairs.around)
    if not places:
        return 0.0, 0, ""
    values = []
    try:
        for number in range(3 * frequency):
            training.step()
            seconds = pairs.take()
            if number >= 2 * frequency + 2:
                values.append(seconds)
    except (RuntimeError, TypeError) as error:
        return None, places, f"rotations are in update: {type(error).__name__}: {error}"
    return statistics.median(values), places, ""


def _batches(workload: Any, rng: Any) -> Iterator[Any]:
    if workload.is_mini:
        batches: Iterator[Any] = workload._build_input_queue(
            rng, "train", None, _batch_size(workload)
        )
        return batches
    return _synthetic(workload, rng)


def _synthetic(workload: Any, rng: Any) -> Iterator[Any]:
    """Four batches in turn, from pinned memory on a GPU."""
    pinned = torch.cuda.is_available()
    made = []
    for number in range(4):
        batch = workload.synthetic_batch(_batch_size(workload), prng.fold_in(rng, number))
        made.append(_each(batch, lambda t: t.cpu().pin_memory() if pinned else t))
    while True:
        for batch in made:
            yield _each(batch, lambda t: t.to(workload.device, non_blocking=True))


def _each(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same batch, each tensor of it changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _each(inner, change) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_each(inner, change) for inner in value))
    if isinstance(value, list | tuple):
        return type(value)(_each(inner, change) for inner in value)
    return value


def _batch_size(workload: Any) -> int:
    if workload.is_mini or not torch.cuda.is_available():
        return batch_sizes.BATCH_SIZES[workload.name] if workload.is_mini else 2
    return BATCHES[workload.name]


def paired(marked: list[dict[str, float]], whole: list[float]) -> dict[str, float]:
    """Seconds of each part: its share of the unmarked period next to its own, the median over such
    pairs, times the median unmarked period. What changes slowly, as a host's speed, cancels."""
    pairs = list(zip(marked, whole, strict=False))  # the last period may have no neighbour
    names = dict.fromkeys(name for parts in marked for name in parts)
    usual = statistics.median(whole or [0.0])
    return {
        name: usual * statistics.median(parts.get(name, 0.0) / step for parts, step in pairs)
        for name in names
    }


def _mean_step(whole: Mapping[str, float], f: int, measured_at: int) -> float:
    """Seconds of a mean step at ``f``; at F = 1 a check is due at every step."""
    if measured_at == 1:
        return whole["due"]
    return (1 - 1 / f) * whole["ordinary"] + whole["due"] / f


def _spread(values: list[float]) -> float | None:
    """Largest less smallest of the periods, over their median."""
    return (max(values) - min(values)) / statistics.median(values) if any(values) else None


def _timed(
    call: Callable[[], object], clock: Clock, before: Callable[[], object] | None = None
) -> float:
    """Seconds of a call, after ``before()``, or after the same call: batches are made at first."""
    (before or call)()
    start = clock.now()
    call()
    return clock.now() - start


def main() -> None:
    """Measure, print, and write the record."""
    gpu = torch.cuda.is_available()
    names = ["fastmri", "imagenet_vit", "ogbg"]
    default = ",".join(names if gpu else [name + MINI for name in names])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workloads", default=default)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="the first is the reference")
    parser.add_argument("--frequency", type=int, default=10, help="F that is measured at")
    parser.add_argument("--periods", type=int, default=PERIODS, help="at least")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a variant, at least")
    parser.add_argument("--no-evaluation", action="store_true")
    parser.add_argument(
        "--steps", default="", help="to target: ogbg/eshampoo_fixed=120,...; else the paper's"
    )
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # AlgoPerf's setting on GPUs
    torch.backends.cudnn.benchmark = True
    if not gpu:
        torch.set_num_threads(1)
    records = []
    for name in args.workloads.split(","):
        for variant in args.variants.split(","):
            clock = DeviceClock() if gpu else HostClock()
            records.append(
                measure(
                    load(name),
                    variant,
                    clock,
                    args.frequency,
                    args.periods,
                    not args.no_evaluation,
                    args.seconds,
                )  # fmt: skip
            )
            print(f"{name} {variant}: {1e3 * records[-1]['step']:.2f} ms", flush=True)
    given = dict(word.split("=") for word in args.steps.split(",") if word)
    pairs = {tuple(key.split("/")): float(value) for key, value in given.items()}
    mini = any(r["workload"].endswith(MINI) for r in records)
    compared = compare(records, pairs or ({} if mini else paper_steps()))  # type: ignore[arg-type]
    print("", *lines(records, compared), sep="\n")
    if args.json:
        _write(args.json, {"records": records, "speed_ups": compared})


def _write(path: str, content: dict[str, Any]) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
    machine = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine, **content}, indent=1) + "\n"
    Path(path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
