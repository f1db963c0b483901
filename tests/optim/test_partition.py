"""Merging and cutting: the examples the submission's behaviour is known for, and properties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algoperf_shampoo.optim.blocks.partition import cut, merge_dims


@pytest.mark.parametrize(
    ("shape", "merged"),
    [
        ((384, 3, 16, 16), (384, 768)),
        ((512, 512, 3, 3), (512, 512, 9)),
        ((64, 64, 3, 3), (64, 576)),
        ((32, 32, 3, 3), (1024, 9)),  # left to right; from the right it would be (32, 288)
        ((32, 1, 3, 3), (288,)),
        ((1, 32, 1, 1), (32,)),
        ((256, 256, 3, 3), (256, 768, 3)),
        ((1536, 384), (1536, 384)),
        ((1, 1), (1,)),
        ((), (1,)),
    ],
)
def test_merge_examples(shape, merged):
    assert merge_dims(shape, 1024) == merged


def test_cut_example():
    blocks = cut((1536, 384), 1024)
    assert [(b.start, b.shape) for b in blocks] == [((0, 0), (1024, 384)), ((1024, 0), (512, 384))]


@given(st.lists(st.integers(1, 12), max_size=4), st.integers(1, 20))
def test_blocks_partition_the_parameter(shape, max_dim):
    blocks = cut(tuple(shape), max_dim)
    assert all(d <= max_dim for b in blocks for d in b.shape)
    assert math.prod(blocks[0].merged) == math.prod(shape)
    covered = torch.zeros(blocks[0].merged)
    for b in blocks:
        covered[b.slices] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize(
    ("shape", "max_dim", "text"), [((3, 0), 8, "empty"), ((3,), 0, "max_preconditioner_dim")]
)
def test_bad_input_is_named(shape, max_dim, text):
    with pytest.raises(ValueError, match=text):
        cut(shape, max_dim)
