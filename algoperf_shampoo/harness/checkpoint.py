"""Checkpoints of a run: written whole or not at all, and checked when read.

A file ``checkpoint_<step>`` is what ``torch.save`` wrote; ``checkpoint_<step>.sha256`` beside it
holds its digest. Both are renamed into place, the digest first, so a kill at any moment leaves
either a complete checkpoint or none of that step. Older ones go only when the new one's name is on
disk, so a power cut leaves one too.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import disk

_NAME = re.compile(r"checkpoint_(\d+)")


def save(run_dir: Path, step: int, state: dict[str, Any]) -> None:
    """Write ``state`` as the checkpoint of ``step``. It counts once the folder is synced.

    Raises:
        DiskError: it cannot be written; older checkpoints are as they were.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    path = run_dir / f"checkpoint_{step}"
    digest = hashlib.sha256(data).hexdigest().encode()
    disk.write_atomically(_digest_path(path), digest, sync_name=False)
    disk.write_atomically(path, data, sync_name=False)


def load_newest(run_dir: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint that is whole, or None if there is none, and what was wrong with newer.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    damaged: list[str] = []
    for path in reversed(_checkpoints(run_dir)):
        found = _load(path)
        if isinstance(found, dict):
            return found, damaged
        damaged.append(found)
    if damaged:
        raise UserError(
            f"{run_dir}: no whole checkpoint to continue from: {'; '.join(damaged)}; "
            "remove the folder to start the run again"
        )
    return None, damaged


def _load(path: Path) -> dict[str, Any] | str:
    """The content of a checkpoint, or what is wrong with it."""
    with disk.explained(path):
        data = path.read_bytes()
        digest = _digest_path(path)
        expected = digest.read_bytes() if digest.exists() else b""
    if hashlib.sha256(data).hexdigest().encode() != expected:
        return f"{path.name} is damaged ({len(data)} bytes, checksum differs)"
    content, problem = _load_safely(data)
    if problem:
        return f"{path.name} cannot be read: {problem}"
    return content if isinstance(content, dict) else f"{path.name} is no checkpoint of a run"


def _load_safely(data: bytes) -> tuple[Any, str | None]:
    """What a file's content holds, or why torch does not take it in its safe mode."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), None
    except Exception as error:  # whatever is in the file decides what is raised
        # torch's message goes on with how to switch its safety off: not for a checkpoint.
        found = re.search(r"(?:GLOBAL|class) `?([\w.]+)", str(error))
        what = f"of type {found[1]}" if found else f"({type(error).__name__})"
        return None, f"it holds something {what} that torch's safe loader refuses"


def refuse_unloadable(run_dir: Path, step: int) -> None:
    """Look at a checkpoint that was just written.

    Raises:
        UserError: a run could not go on from it.
    """
    path = run_dir / f"checkpoint_{step}"
    with disk.explained(path):
        _, problem = _load_safely(path.read_bytes())
    if problem:
        raise UserError(
            f"{path}: {problem}: the run could not be continued from its checkpoints; "
            "state_dict() of an optimizer_state entry is to hold tensors and plain values"
        )


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints, and digests without a checkpoint."""
    _delete(_checkpoints(run_dir)[:-keep])
    for path in run_dir.glob("checkpoint_*.sha256"):
        if _NAME.fullmatch(path.stem) and not path.with_suffix("").exists():
            disk.remove(path)


def discard_after(run_dir: Path, step: int) -> None:
    """Delete the checkpoints of later steps: the damaged ones a run has fallen back from."""
    _delete([path for path in _checkpoints(run_dir) if _step(path) > step])


def _delete(paths: list[Path]) -> None:
    for path in paths:
        disk.remove(path)
        disk.remove(_digest_path(path))


def rng_states() -> dict[str, Any]:
    """States of the global generators of torch (CPU and every GPU), numpy and Python."""
    kind, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, python_words, python_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(kind), [int(w) for w in words], int(position), int(has_gauss), float(gauss)),
        "python": (version, list(python_words), python_gauss),
    }


def restore_rng_states(states: dict[str, Any]) -> None:
    """Put back what :func:`rng_states` took."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, words, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, np.array(words, dtype=np.uint32), position, has_gauss, gauss))
    version, python_words, python_gauss = states["python"]
    random.setstate((version, tuple(python_words), python_gauss))


def _checkpoints(run_dir: Path) -> list[Path]:
    found = (path for path in run_dir.glob("checkpoint_*") if _NAME.fullmatch(path.name))
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint_"))


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
