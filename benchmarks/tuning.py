"""How learning rate, betas, F and the settings of vectors and small matrices relate to AdamW's.

    python benchmarks/tuning.py --task digits --json results/measured/cpu/tuning_digits.json

Two small tasks whose data come with a package: ``digits``, scikit-learn's 1,797 images by a
multilayer perceptron of two hidden layers of 48, and ``fashion``, 14,000 images of Fashion-MNIST
(the data of our ImageNet ViT mini) by two convolutions and a linear layer. 300 steps on batches of
64, learning rate falling linearly to 0. What is compared is the validation loss at the end.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import machine, table, write
from torch import Tensor, nn

from algoperf_shampoo.optim import EShampoo, Shampoo

STEPS, BATCH = 300, 64
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FASHION = Path("algoperf_shampoo/workloads/data/imagenet_vit_mini.npz")
Build = Callable[..., torch.optim.Optimizer]


class Task(NamedTuple):
    """Inputs and labels to train and to validate on, and a model's constructor."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    model: Callable[[], nn.Module]


def digits() -> Task:
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.tensor(found.data, dtype=torch.float32) / 16
    y = torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, rest = order[:1297], order[1297:]

    def model() -> nn.Module:
        return nn.Sequential(
            nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10)
        )

    return Task((x[train], y[train]), (x[rest], y[rest]), model)


def fashion() -> Task:
    found = np.load(Path(__file__).resolve().parents[1] / FASHION)

    def part(name: str) -> tuple[Tensor, Tensor]:
        images = torch.tensor(found[f"{name}_images"], dtype=torch.float32)[:, None] / 255
        return images - 0.3, torch.tensor(found[f"{name}_labels"], dtype=torch.int64)

    def model() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(),
            nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(24 * 25, 10),
        )  # fmt: skip

    return Task(part("train"), part("validation"), model)


TASKS = {"digits": digits, "fashion": fashion}


def contenders() -> dict[str, tuple[Build, dict[str, Any]]]:
    """Name -> (class, settings besides lr)."""
    by_adam = dict(one_dim="adam")
    table: dict[str, tuple[Build, dict[str, Any]]] = {
        "AdamW": (torch.optim.AdamW, {}),
        "EShampoo, F = 10": (EShampoo, dict(precondition_frequency=10)),
        "EShampoo, F = 10, matrices": (
            EShampoo,
            dict(precondition_frequency=10, small_matrices="matrix"),
        ),
    }
    for F, tau in ((1, 0.0), (10, 0.0), (100, 0.0), (10, 0.1)):
        name = f"EShampoo, F = {F}{f', tau = {tau}' if tau else ''}, matrices, 1-D Adam"
        own = dict(precondition_frequency=F, tau=tau, small_matrices="matrix", **by_adam)
        table[name] = EShampoo, own
    table["Shampoo with grafting, F = 10, matrices, 1-D Adam"] = (
        Shampoo,
        dict(precondition_frequency=10, small_matrices="matrix", **by_adam),
    )
    best = table["EShampoo, F = 10, matrices, 1-D Adam"]
    for beta2 in (0.9, 0.99):
        betas = dict(betas=(0.9, beta2))
        table[f"AdamW, beta2 = {beta2}"] = torch.optim.AdamW, betas
        table[f"EShampoo, F = 10, matrices, 1-D Adam, beta2 = {beta2}"] = best[0], best[1] | betas
    return table


def run(job: tuple[str, str, float, int]) -> dict[str, Any]:
    """Train once, given task, contender, lr and seed: validation loss and accuracy at the end, and
    seconds spent in steps."""
    task_name, name, lr, seed = job
    task, (build, settings) = loaded(task_name), contenders()[name]
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = task.model()
    optimizer = build(model.parameters(), lr=lr, **settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / STEPS)
    x, y = task.train
    spent = 0.0
    for _ in range(STEPS):
        batch = torch.randint(len(x), (BATCH,))
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        start = time.perf_counter()
        optimizer.step()
        spent += time.perf_counter() - start
        scheduler.step()
    with torch.no_grad():
        logits = model(task.validation[0])
    labels = task.validation[1]
    return {
        "loss": nn.functional.cross_entropy(logits, labels).item(),
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),
        "seconds_in_steps": spent,
    }


@functools.cache
def loaded(name: str) -> Task:
    return TASKS[name]()


def mean(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(r[key] for r in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", help="where to write the record")
    args = parser.parse_args()
    seeds = range(1, args.seeds + 1)
    jobs = [(args.task, c, lr, s) for c in contenders() for lr in LEARNING_RATES for s in seeds]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        results = dict(zip(jobs, pool.map(run, jobs, chunksize=1), strict=True))
    rows = []
    record: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "task": args.task,
        "runs": {},
    }
    for name, (_, settings) in contenders().items():
        of_lr = {lr: [results[args.task, name, lr, s] for s in seeds] for lr in LEARNING_RATES}
        record["runs"][name] = {"settings": settings, "lr": of_lr}
        losses = {lr: mean(runs, "loss") for lr, runs in of_lr.items()}
        best = min(losses, key=lambda lr: losses[lr])
        error = statistics.stdev([r["loss"] for r in of_lr[best]]) / len(seeds) ** 0.5
        rows.append(
            [
                name,
                *(f"{losses[lr]:.3f}" for lr in LEARNING_RATES),
                f"{losses[best]:.3f} ± {error:.3f} at {best:g}",
                f"{mean(of_lr[best], 'accuracy'):.3f}",
                f"{1e3 * mean(of_lr[best], 'seconds_in_steps') / STEPS:.2f}",
            ]
        )
    print(f"\n{args.task}: validation loss after {STEPS} steps, n = {args.seeds} seeds")
    header = ["optimizer", *(f"lr {lr:g}" for lr in LEARNING_RATES), "best", "accuracy"]
    print(table([*header, "ms a step"], rows))
    write(args.json, record)


if __name__ == "__main__":
    main()
