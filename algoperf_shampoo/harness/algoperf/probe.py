"""Facts about the Python that holds AlgoPerf, and about checkpoints there, as one line of JSON.

Run by that Python itself (``python -m algoperf_shampoo.harness.algoperf.probe CHECKPOINT...``),
because the launcher's own environment may have another torch, or none.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
import zipfile
from pathlib import Path
from typing import Any

from algoperf_shampoo.harness.algoperf import cpu_compat

# What the runner and the three workloads import, by module name.
NEEDED = (
    "absl",
    "algoperf",
    "clu",
    "flax",
    "GPUtil",
    "h5py",
    "jax",
    "jraph",
    "pandas",
    "psutil",
    "sklearn",
    "submission_runner",
    "tensorflow",
    "tensorflow_datasets",
    "torch",
    "torchvision",
)
MARK = "PROBE "


def environment() -> dict[str, Any]:
    """Versions, modules that are missing, and the GPUs that torch sees."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "missing": [name for name in NEEDED if importlib.util.find_spec(name) is None],
        "wandb": importlib.util.find_spec("wandb") is not None,
        "algoperf": _version("algoperf"),
        "algoperf_commit": _commit("algoperf"),
        "torch": None,
        "cuda": None,
        "gpus": [],
        "psutil_knows_machine": True,
    }
    if "torch" not in facts["missing"]:
        import torch

        facts["torch"] = torch.__version__
        facts["cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            facts["gpus"] = [torch.cuda.get_device_name(index) for index in range(count)]
    if "psutil" not in facts["missing"]:
        psutil: Any = importlib.import_module("psutil")
        answers = [getattr(psutil, name)() for name in cpu_compat.PSUTIL_ANSWERS]
        facts["psutil_knows_machine"] = None not in answers
    return facts


def checkpoint(path: str) -> dict[str, Any]:
    """Step and state of a run from one of AlgoPerf's PyTorch checkpoints; ``readable`` says if."""
    import torch

    try:
        # mmap: the tensors, by far the most of the file, are not read.
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        state = content["train_state"]
        # So the checksums of what torch has not read: a power cut can leave a file of zeros.
        damaged = zipfile.ZipFile(path).testzip()
        if damaged is not None:
            raise ValueError(f"{damaged}: checksum differs")
        return {
            "path": path,
            "readable": True,
            "global_step": int(content["global_step"]),
            "preemption_count": int(content["preemption_count"]),
            "training_complete": bool(state["training_complete"]),
            "goals_reached": bool(state["validation_goal_reached"] and state["test_goal_reached"]),
            "is_time_remaining": bool(state["is_time_remaining"]),
            "eval_results": [
                [int(step), {key: float(value) for key, value in result.items()}]
                for step, result in content["eval_results"]
            ],
        }
    except Exception as error:  # a truncated file fails in many ways; any means: do not resume it
        return {"path": path, "readable": False, "error": f"{type(error).__name__}: {error}"[:200]}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(name: str) -> str | None:
    try:
        text = importlib.metadata.distribution(name).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    return json.loads(text).get("vcs_info", {}).get("commit_id") if text else None


def main(arguments: list[str]) -> None:
    """Print the facts, marked so that chatter of imported libraries cannot be taken for them."""
    paths = [path for path in arguments if Path(path).is_file()]
    print(MARK + json.dumps({**environment(), "checkpoints": [checkpoint(path) for path in paths]}))


if __name__ == "__main__":
    main(sys.argv[1:])
