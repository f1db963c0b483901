"""Steps of an exported self-tuning submission on AlgoPerf's own models, whole, without their data.

``PYTHON tests/algoperf/nine_workloads.py exports/self_tuning/<variant> [WORKLOAD ...]`` with
AlgoPerf's Python: builds each workload's model, hands the submission batches of the shapes
that its pipeline makes, filled with noise, and takes two steps through the functions that AlgoPerf
calls. criteo1tb has a small vocabulary here, its embedding does not fit; finewebedu_lm came after
this AlgoPerf. Needs 8 GB of memory (wmt); prints one line a workload.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
# Imported by workloads, and used for their data and metrics alone.
DATA_ONLY = ("tensorflow_text", "sacrebleu", "sentencepiece", "pydub")
STEPS = 2


def waves(samples: int = 64000, labels: int = 20) -> dict[str, Any]:
    """Sound and characters with their paddings (1 where there is nothing)."""
    padding = torch.zeros(2, 256)
    padding[:, labels:] = 1
    return {
        "inputs": (torch.randn(2, samples), torch.zeros(2, samples)),
        "targets": (torch.randint(1, 1000, (2, 256)), padding),
    }


BATCHES = {
    "criteo1tb": lambda: {
        "inputs": torch.cat([torch.rand(16, 13), torch.randint(0, 4096, (16, 26)).float()], 1),
        "targets": torch.randint(0, 2, (16, 1)).float(),
        "weights": torch.ones(16, 1),
    },
    "imagenet_resnet": lambda: {
        "inputs": torch.randn(4, 3, 224, 224),
        "targets": torch.randint(0, 1000, (4,)),
    },
    "librispeech_conformer": waves,
    "librispeech_deepspeech": waves,
    "wmt": lambda: {
        "inputs": torch.randint(1, 32000, (4, 32)),
        "targets": torch.randint(1, 32000, (4, 32)),
        "weights": torch.ones(4, 32),
    },
}


def workload_of(name: str) -> Any:
    """AlgoPerf's workload object."""
    registry: Any = importlib.import_module("algoperf.workloads.workloads")
    entry = registry.WORKLOADS[name]
    path = os.path.join(
        registry.BASE_WORKLOADS_DIR, entry["workload_path"] + "_pytorch", "workload.py"
    )
    cls = registry.import_workload(path, entry["workload_class_name"], True, {})
    # A schedule without warm-up, whose first step is taken at a learning rate of next to nothing.
    smaller = {"step_hint": property(lambda self: 20)}
    if name == "criteo1tb":
        smaller["vocab_size"] = property(lambda self: 4096)
    return type("Small", (cls,), smaller)()


def train(name: str, submission: Any) -> str:
    """Two steps; a line of what came of them.

    Raises:
        AssertionError: a loss is not finite, or a parameter did not move or is not finite.
    """
    workload = workload_of(name)
    assert submission.get_batch_size(name) % 8 == 0
    model, state = workload.init_model_fn([1, 2])
    optimizer_state = submission.init_optimizer_state(workload, model, state, None, [3, 4])
    torch.manual_seed(0)
    queue = iter([BATCHES[name]() for _ in range(STEPS)])
    before = [p.detach().clone() for p in model.parameters()]
    start = time.monotonic()
    losses = []
    for step in range(STEPS):
        batch = submission.data_selection(
            workload, queue, optimizer_state, model, state, None, step, [5, 6]
        )
        common = dict(
            workload=workload,
            current_param_container=model,
            current_params_types=workload.model_params_types,
            model_state=state,
            hyperparameters=None,
            loss_type=workload.loss_type,
            optimizer_state=optimizer_state,
            eval_results=[],
            global_step=step,
            rng=[7, 8],
        )
        optimizer_state, model, state = submission.update_params(batch=batch, **common)
        losses.append(optimizer_state["monitor"].flush()["loss"])
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    given = [p.grad is not None and bool(p.grad.any()) for p in model.parameters()]
    assert all(math.isfinite(loss) for loss in losses), losses
    assert all(p.isfinite().all() for p in model.parameters())
    stuck = [g for m, g in zip(moved, given, strict=True) if g and not m]
    assert not stuck and sum(moved) > len(moved) / 2, (len(stuck), sum(moved), sum(given))
    seconds = time.monotonic() - start
    return f"{name}: {sum(moved)} of {len(moved)} parameters moved, loss {losses}, {seconds:.0f} s"


def main() -> None:
    from algoperf_shampoo.harness.algoperf import cpu_compat

    folder = Path(sys.argv[1]).resolve()
    cpu_compat.apply()
    for name in DATA_ONLY:
        sys.modules[name] = mock.MagicMock()
    sys.path.insert(0, str(folder.parent))
    submission = importlib.import_module(f"{folder.name}.submission")
    for name in sys.argv[2:] or BATCHES:
        print(train(name, submission), flush=True)


if __name__ == "__main__":
    main()
