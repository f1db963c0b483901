"""What a run ran on and from: machine, packages, sources; AlgoPerf's names where it has one."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import algoperf_shampoo

_PACKAGE = Path(algoperf_shampoo.__file__).resolve().parent
_CODE = ("algoperf_shampoo", "submissions", "search_spaces", "workloads_config", "scripts")
_PACKAGES = ("torch", "numpy", "absl-py", "scipy", "triton", "algoperf")


def describe(root: Path) -> dict[str, Any]:
    """Hardware, software and git state; no host name, user or path, so a record can be shared."""
    record: dict[str, Any] = {
        "os_platform": platform.platform(),
        "python_version": platform.python_version(),
        "python_compiler": platform.python_compiler(),
        "packages": {name: v for name in _PACKAGES if (v := _version(name)) is not None},
        "cpu_model_name": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_num_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "gpu_count": torch.cuda.device_count(),
        **_git(root),
    }
    if torch.cuda.is_available():
        record["gpu_model_name"] = torch.cuda.get_device_name(0)
        record["cuda_version"] = torch.version.cuda
        record["cudnn_version"] = torch.backends.cudnn.version()
        record["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    return record


def source_digests(root: Path, variant: str) -> dict[str, str]:
    """sha256 of the sources that make a curve: the submission, the optimizer, the workloads."""
    return {
        "submission": _digest(root / "submissions" / variant, root),
        "optimizer": _digest_many(
            [
                _PACKAGE / "points.py",
                _PACKAGE / "submission.py",
                *sorted((_PACKAGE / "optim").rglob("*.py")),
            ],
            _PACKAGE,
        ),
        "workloads": _digest(_PACKAGE / "workloads", _PACKAGE),
    }


def workload_properties(workload: Any) -> dict[str, Any]:
    """Public attributes of a workload that are plain values, as AlgoPerf's meta data lists them."""
    names = (name for name in dir(workload) if not name.startswith("_"))
    values = ((name, getattr(workload, name)) for name in names)
    return {name: value for name, value in values if isinstance(value, (bool, int, float, str))}


def workload_config(workload: Any) -> dict[str, Any] | None:
    """The workload's configuration as read: model sizes, targets, data file and its checksum."""
    config = getattr(workload, "config", None)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return None
    fields = dataclasses.asdict(config)
    return {key: value for key, value in fields.items() if not isinstance(value, Path)}


def _digest(folder: Path, base: Path) -> str:
    return _digest_many(sorted(folder.rglob("*.py")), base)


def _digest_many(files: list[Path], base: Path) -> str:
    total = hashlib.sha256()
    for path in files:
        if path.is_file():
            total.update(path.relative_to(base).as_posix().encode() + b"\0")
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    if sys.platform.startswith("linux"):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        if match:
            return match[1]
    return platform.processor() or platform.machine()


def _git(root: Path) -> dict[str, Any]:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return {
            "git_commit_hash": git("rev-parse", "HEAD"),
            "git_branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "git_dirty": bool(git("status", "--porcelain", "--", *_CODE)),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit_hash": None, "git_branch": None, "git_dirty": None}
