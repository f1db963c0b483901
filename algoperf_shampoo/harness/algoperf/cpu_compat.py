"""What AlgoPerf's runner needs changed, at run time, to start on a machine without a GPU.

Nothing of AlgoPerf is edited. Each patch stands for one line of its source that assumes CUDA; all
of them must be in place before ``submission_runner`` is imported, because its modules ask for the
number of GPUs as they load. Results on a CPU are for trying things out, never for timing.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

# Functions of psutil that may answer None, and what AlgoPerf reads of the answer.
PSUTIL_ANSWERS = {
    "cpu_freq": ("current",),
    "disk_io_counters": ("read_bytes", "write_bytes"),
    "net_io_counters": ("bytes_sent", "bytes_recv"),
}


def apply() -> None:
    """Patch torch and torchvision for this process: call it before importing AlgoPerf."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    _count_processes_as_gpus(world)
    _import_torchvision()
    if world > 1:
        _distributed_on_gloo()


def apply_after_import() -> None:
    """Patch AlgoPerf's own modules: call it once they are imported."""
    from algoperf import data_utils

    # Its prefetcher copies batches on a CUDA stream of its own.
    data_utils.PrefetchedWrapper.prefetched_loader = _plain_loader


def evaluate_ogbg_in_numpy() -> None:
    """Let OGBG's metric take its probabilities to numpy, once the workload is known to be OGBG's.

    In one process it indexes a JAX array by each task's mask, 128 to a split, and JAX compiles a
    program for every one of these shapes: minutes an evaluation on a CPU. The values are the same.
    """
    metrics: Any = importlib.import_module("algoperf.workloads.ogbg.metrics")
    numpy: Any = importlib.import_module("numpy")
    own = metrics.jax.nn.sigmoid
    sigmoid = types.SimpleNamespace(sigmoid=lambda logits: numpy.asarray(own(logits)))
    metrics.jax = types.SimpleNamespace(nn=sigmoid)


def tolerate_unknown_machine() -> None:
    """Let psutil answer zero where it knows nothing: containers often hide disks or CPU frequency.

    AlgoPerf reads fields of its answers without looking whether there is one.
    """
    psutil: Any = importlib.import_module("psutil")
    for name, fields in PSUTIL_ANSWERS.items():
        if getattr(psutil, name)() is None:
            nothing = types.SimpleNamespace(**dict.fromkeys(fields, 0))
            setattr(psutil, name, lambda nothing=nothing, **_: nothing)


def _count_processes_as_gpus(world: int) -> None:
    import torch

    # FastMRI and OGBG divide the batch by the number of GPUs, and data_utils.shard splits by it.
    torch.cuda.device_count = lambda: world
    # pytorch_init and the runner's clock call these whenever there is more than one process.
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None


def _import_torchvision() -> None:
    """Import torchvision even if its C++ extension was built for CUDA and does not load.

    It registers meta functions for two operators that the extension defines; AlgoPerf uses only its
    image transforms and folders, so an empty definition of the two is enough.
    """
    from torch import library

    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        own = library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            own.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _keep_alive.append(own)
        importlib.import_module("torchvision")


_keep_alive: list[Any] = []  # a torch Library takes its definitions with it when collected


def _distributed_on_gloo() -> None:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel, distributed

    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["WORLD_SIZE"])))
    start, send = dist.init_process_group, dist.broadcast

    def init_process_group(backend: str | None = None, **options: Any) -> None:
        del backend  # the runner asks for nccl, whose time limit it is; gloo's own is 30 minutes
        start("gloo", **{"timeout": timedelta(minutes=10), **options})

    def broadcast(tensor: torch.Tensor, src: int = 0, **options: Any) -> Any:
        if tensor.dtype != torch.bool:
            return send(tensor, src=src, **options)
        # gloo knows no bool; OGBG and MNIST broadcast their masks.
        as_bytes = tensor.to(torch.uint8)
        send(as_bytes, src=src, **options)
        tensor.copy_(as_bytes.bool())
        return None

    class OnCpu(DistributedDataParallel):
        """DDP that ignores the GPU indices the workloads pass."""

        def __init__(
            self,
            module: torch.nn.Module,
            device_ids: Any = None,
            output_device: Any = None,
            **options: Any,
        ) -> None:
            super().__init__(module, **options)

    for module, name, value in (
        (dist, "init_process_group", init_process_group),
        (dist, "broadcast", broadcast),
        (torch.nn.parallel, "DistributedDataParallel", OnCpu),
        (distributed, "DistributedDataParallel", OnCpu),
    ):
        setattr(module, name, value)


def _plain_loader(self: Any) -> Iterator[tuple[Any, Any]]:
    import torch

    for inputs, targets in self.dataloader:
        yield inputs.to(self.device, dtype=torch.float), targets.to(self.device)
