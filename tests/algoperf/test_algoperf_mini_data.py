"""Simulated k-space, and the refusal to write where something else is."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from algoperf_shampoo.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "data"


def _module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


formats = _module("algoperf_formats")


@pytest.fixture
def head() -> np.ndarray:
    """A smooth blob off the centre, on air."""
    y, x = np.mgrid[0:128, 0:128]
    return 200 * np.exp(-((y - 60.0) ** 2 + (x - 70.0) ** 2) / (2 * 15.0**2))


def test_full_sampling_gives_the_target_where_the_pipeline_crops(head: np.ndarray) -> None:
    kspace, target = formats.kspace_of(head)
    assert (kspace.shape, kspace.dtype) == ((640, 368), np.complex64)
    assert (target.shape, target.dtype) == ((320, 320), np.float32)
    # AlgoPerf: shift, inverse DFT, shift, times sqrt(H W), crop to the middle.
    image = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace))) * np.sqrt(kspace.size)
    np.testing.assert_allclose(np.abs(image)[160:480, 24:344], target, atol=1e-5 * target.max())


def test_target_is_the_image_enlarged(head: np.ndarray) -> None:
    _, target = formats.kspace_of(head)
    assert target.max() == pytest.approx(200 * formats.SCALE, rel=0.01)
    assert np.unravel_index(target.argmax(), target.shape) == pytest.approx((150, 175), abs=1)
    # Areas grow by (320 / 128)^2; rounding to 16 bits moves the sum little.
    assert target.sum() / (head.sum() * formats.SCALE) == pytest.approx(6.25, rel=0.02)


def test_spread_takes_the_ends_and_no_more_than_there_is() -> None:
    assert list(formats._spread(np.arange(10), 4)) == [0, 3, 6, 9]
    with pytest.raises(UserError, match="11 asked for"):
        formats._spread(np.arange(10), 11)


def test_does_not_write_into_another_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        formats.make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_script_refuses_before_it_writes(tmp_path: Path) -> None:
    """From its own folder, as make calls it: what it shares with the other scripts is found."""
    for words, named in (
        (["--workloads=wmt"], "--workloads=wmt: there is fastmri, imagenet_vit, ogbg, mnist"),
        (["ogbg"], "unexpected argument 'ogbg'"),
    ):
        command = [sys.executable, FOLDER / "algoperf_mini.py", f"--out={tmp_path / 'o'}", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith(f"error: {named}")
    assert not (tmp_path / "o").exists()
