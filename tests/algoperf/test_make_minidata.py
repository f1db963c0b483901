"""Simulated k-space, and the refusal to write where something else is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness.algoperf import make_minidata


@pytest.fixture
def head() -> np.ndarray:
    """A smooth blob off the centre, on air."""
    y, x = np.mgrid[0:128, 0:128]
    return 200 * np.exp(-((y - 60.0) ** 2 + (x - 70.0) ** 2) / (2 * 15.0**2))


def test_full_sampling_gives_the_target_where_the_pipeline_crops(head: np.ndarray) -> None:
    kspace, target = make_minidata.kspace_of(head)
    assert (kspace.shape, kspace.dtype) == ((640, 368), np.complex64)
    assert (target.shape, target.dtype) == ((320, 320), np.float32)
    # AlgoPerf: shift, inverse DFT, shift, times sqrt(H W), crop to the middle.
    image = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace))) * np.sqrt(kspace.size)
    np.testing.assert_allclose(np.abs(image)[160:480, 24:344], target, atol=1e-5 * target.max())


def test_target_is_the_image_enlarged(head: np.ndarray) -> None:
    _, target = make_minidata.kspace_of(head)
    assert target.max() == pytest.approx(200 * make_minidata.SCALE, rel=0.01)
    assert np.unravel_index(target.argmax(), target.shape) == pytest.approx((150, 175), abs=1)
    # Areas grow by (320 / 128)^2; rounding to 16 bits moves the sum little.
    assert target.sum() / (head.sum() * make_minidata.SCALE) == pytest.approx(6.25, rel=0.02)


def test_spread_takes_the_ends_and_no_more_than_there_is() -> None:
    assert list(make_minidata._spread(np.arange(10), 4)) == [0, 3, 6, 9]
    with pytest.raises(UserError, match="11 asked for"):
        make_minidata._spread(np.arange(10), 11)


def test_does_not_write_into_another_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        make_minidata.make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
