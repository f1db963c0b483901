"""Checkpoints of a run: written whole or not at all, and checked when read.

A file ``checkpoint_<step>`` is what ``torch.save`` wrote; ``checkpoint_<step>.sha256`` beside it
holds its digest. Both are renamed into place, the digest first, so a kill at any moment leaves
either a complete checkpoint or none of that step.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from algoperf_shampoo.errors import UserError

_NAME = re.compile(r"checkpoint_(\d+)")


def save(run_dir: Path, step: int, state: dict[str, Any], keep: int = 2) -> None:
    """Write ``state`` as the checkpoint of ``step`` and drop all but the newest ``keep``."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    path = run_dir / f"checkpoint_{step}"
    write_atomically(_digest_path(path), hashlib.sha256(data).hexdigest().encode())
    write_atomically(path, data)
    prune(run_dir, keep)


def load_newest(run_dir: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint that is whole, or None if there is none, and what was wrong with newer.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    damaged: list[str] = []
    for path in reversed(_checkpoints(run_dir)):
        data = path.read_bytes()
        digest = _digest_path(path)
        expected = digest.read_text() if digest.exists() else None
        if hashlib.sha256(data).hexdigest() != expected:
            damaged.append(f"{path.name} is damaged ({len(data)} bytes, checksum differs)")
            continue
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), damaged
    if damaged:
        raise UserError(
            f"{run_dir}: no whole checkpoint to continue from: {'; '.join(damaged)}; "
            "remove the folder to start the run again"
        )
    return None, damaged


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    _delete(_checkpoints(run_dir)[:-keep])


def discard_after(run_dir: Path, step: int) -> None:
    """Delete the checkpoints of later steps: the damaged ones a run has fallen back from."""
    _delete([path for path in _checkpoints(run_dir) if _step(path) > step])


def _delete(paths: list[Path]) -> None:
    for path in paths:
        path.unlink()
        _digest_path(path).unlink(missing_ok=True)


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


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, rename it into place."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _checkpoints(run_dir: Path) -> list[Path]:
    found = (path for path in run_dir.glob("checkpoint_*") if _NAME.fullmatch(path.name))
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint_"))


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
