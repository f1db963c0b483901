"""AlgoPerf's runner with a recorder: batches in and out, per-step losses and parameter hashes.

A tool of the acceptance runs, started like :mod:`algoperf_shampoo.harness.algoperf.runner`. It
wraps the submission's ``data_selection`` and ``update_params``, and does not touch the submission.

Environment: ``TRACE`` (prefix of the traces, one file a rank), ``RECORD`` or ``REPLAY`` (folder of
batches), ``KILL_AT`` (step before which the process dies at once), ``BATCH`` (global batch size),
``STEP_HINT``, ``EVAL_AFTER`` (number of steps after which to evaluate, and save, beside the first
and the last; the clock has no say), ``EVAL_BATCH`` (another batch size of evaluations),
``VIT_VARIANT`` (another of AlgoPerf's ViT sizes than S/16), ``FASTMRI_CHANNELS`` (another width of
its U-Net than 32).

One process that replays what two recorded gets the global batch as ``HALVES`` says: ``apart``
sends the halves through the model one after the other, so that gradients have the very bits of two
processes; ``joined`` and ``swapped`` put them together in either order: only rounding changes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import signal
from pathlib import Path
from typing import Any

RANK = int(os.environ.get("LOCAL_RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
# Seconds between evaluations, asked after every step. The runner counts the first from 1970.
PERIOD = property(lambda workload: 0.0 if getattr(workload, "evaluate_now", False) else 1e8)


def digest(model: Any) -> str:
    """Hash of all parameters' bytes."""
    whole = hashlib.sha256()
    for parameter in model.parameters():
        whole.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]


def factors_kept(optimizer: Any) -> tuple[int, int] | None:
    """Factors whose state this rank keeps, and those of all ranks; None where there are none."""
    if not hasattr(optimizer, "factor_sets"):
        return None
    own, everywhere = (
        sum(len(each.factors) for each in optimizer.factor_sets(everywhere=whose))
        for whose in (False, True)
    )
    return own, everywhere


def merge(parts: list[Any]) -> Any:
    """One global batch of the ranks' parts; graphs are laid side by side, padding and all."""
    import torch

    first = parts[0]
    if isinstance(first, dict):
        return {key: merge([part[key] for part in parts]) for key in first}
    if hasattr(first, "senders"):
        offset, senders, receivers = 0, [], []
        for graph in parts:
            senders.append(graph.senders + offset)
            receivers.append(graph.receivers + offset)
            offset += len(graph.nodes)
        names = ("nodes", "edges", "n_node", "n_edge")
        joined = {name: torch.cat([getattr(g, name) for g in parts]) for name in names}
        return first._replace(senders=torch.cat(senders), receivers=torch.cat(receivers), **joined)
    return torch.cat(parts)


def instrument(module: Any) -> None:
    """Wrap the two functions of a submission's module."""
    import torch
    import torch.distributed as dist

    select, update = module.data_selection, module.update_params
    environment = os.environ.get

    @functools.wraps(select)
    def data_selection(*arguments: Any) -> Any:
        step = arguments[6]
        if environment("REPLAY"):
            folder = Path(environment("REPLAY", ""))
            ranks = [RANK] if WORLD > 1 else [0, 1]
            parts = [
                torch.load(folder / f"batch_{step}_{rank}.pt", weights_only=False) for rank in ranks
            ]
            if environment("HALVES") == "swapped":
                parts.reverse()
            batch = parts[0] if len(parts) == 1 else merge(parts)
            if len(parts) == 2 and environment("HALVES") == "apart":
                batch["halves"] = parts
        else:
            batch = select(*arguments)
            if environment("RECORD"):
                path = Path(environment("RECORD", ""), f"batch_{step}_{RANK}.pt")
                torch.save(batch, path)
        return batch

    @functools.wraps(update)
    def update_params(**arguments: Any) -> Any:
        step, workload = arguments["global_step"], arguments["workload"]
        if str(step) == environment("KILL_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
        workload.evaluate_now = str(step + 1) == environment("EVAL_AFTER")
        seen: dict[str, Any] = {}
        halves = arguments["batch"].pop("halves", None)
        original, forward = workload.loss_fn, workload.model_fn

        @functools.wraps(forward)
        def model_fn(*a: Any, **k: Any) -> Any:
            if halves is None:
                return forward(*a, **k)
            name = "augmented_and_preprocessed_input_batch"
            outputs = [forward(*a, **{**k, name: half}) for half in halves]
            return torch.cat([logits for logits, _ in outputs]), outputs[-1][1]

        def loss_fn(*a: Any, **k: Any) -> Any:
            result = original(*a, **k)
            seen.update(result)
            return result

        workload.loss_fn, workload.model_fn = loss_fn, model_fn
        try:
            state, model, model_state = update(**arguments)
        finally:
            workload.loss_fn, workload.model_fn = original, forward
        sums = torch.stack([seen["summed"].detach().double(), seen["n_valid_examples"].double()])
        if WORLD > 1:
            dist.all_reduce(sums)
        line = {"step": step, "loss": (sums[0] / sums[1]).item(), "hash": digest(model)}
        line["factors_kept"] = factors_kept(state["optimizer"])
        with open(f"{environment('TRACE')}.{RANK}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return state, model, model_state

    module.data_selection = data_selection
    module.update_params = update_params
    if environment("BATCH"):
        module.get_batch_size = lambda name: int(environment("BATCH", "0"))


def main() -> None:
    """The runner's main with the submission instrumented as soon as its path is known."""
    from algoperf_shampoo.harness.algoperf import minidata, runner

    original = runner._register_minidata

    def register(values: Any) -> None:
        original(values)
        registry = importlib.import_module("algoperf.workloads.workloads")
        path = registry.convert_filepath_to_module(values.submission_path)
        instrument(importlib.import_module(path))
        kinds: dict[str, tuple[str, Any]] = {
            "STEP_HINT": ("step_hint", int),
            "EVAL_BATCH": ("eval_batch_size", int),
        }
        if "fastmri" in values.workload:
            kinds["FASTMRI_CHANNELS"] = ("num_channels", int)
        changes = {
            name: kind(os.environ[key]) for key, (name, kind) in kinds.items() if key in os.environ
        }
        load = registry.import_workload

        def import_workload(*a: Any, **k: Any) -> Any:
            workload = load(*a, **k)
            cls = minidata.with_properties(type(workload), changes)
            workload.__class__ = type(cls.__name__, (cls,), {"eval_period_time_sec": PERIOD})
            return workload

        registry.import_workload = import_workload
        if "VIT_VARIANT" in os.environ:
            name = "algoperf.workloads.imagenet_vit.imagenet_pytorch.workload"
            vit: Any = importlib.import_module(name)
            size = vit.decode_variant(os.environ["VIT_VARIANT"])
            vit.decode_variant = lambda _: size

    runner._register_minidata = register
    runner.main()


if __name__ == "__main__":
    main()
