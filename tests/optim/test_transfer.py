"""Blocks as runs of consecutive entries: what the GPU's copies between parameters and blocks read.

The copies themselves are in test_gpu.py."""

import pytest
import torch

from algoperf_shampoo.optim.blocks.partition import cut, runs


@pytest.mark.parametrize(
    ("shape", "max_dim"),
    [
        ((10,), 4),
        ((7, 9), 4),
        ((7, 9), 20),
        ((5, 7, 9), 4),
        ((3, 5, 7, 9), 4),
        ((4, 9, 5), 10),
        ((384, 1536), 1024),
        ((1,), 3),
    ],
)
def test_runs_of_a_block_are_its_entries_in_order(shape, max_dim):
    flat = torch.arange(torch.Size(shape).numel())
    met = torch.zeros_like(flat)
    for block in cut(shape, max_dim):
        expected = flat.reshape(block.merged)[block.slices].flatten()
        copied = torch.full_like(expected, -1)
        for offset, inside, run, stride, entries in runs(block):
            k = torch.arange(entries)
            copied[inside + k] = flat[offset + k // run * stride + k % run]
        assert torch.equal(copied, expected)
        met[copied] += 1
    assert (met == 1).all()
