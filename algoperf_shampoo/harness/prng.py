"""Splittable random keys with the shape AlgoPerf's PyTorch path uses: numpy uint32 of shape [2].

A key is a value, never a hidden state, so whatever is drawn at step t depends on the seed and on t
alone. Derived keys come from ``numpy.random.SeedSequence``, whose mixing is documented and stable
across numpy versions.
"""

from __future__ import annotations

import numpy as np

_ROOT, _SPLIT, _FOLD = 0, 1, 2  # domain tags: no two kinds of derivation can meet


def PRNGKey(seed: int) -> np.ndarray:  # noqa: N802 (AlgoPerf's and JAX's name)
    """Key of an integer seed, 0 <= seed < 2**32. Seed 0 is a seed like any other."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is outside [0, 2**32)")
    return _mix([_ROOT, seed, 0], 1)[0]


def split(rng: np.ndarray, n: int = 2) -> np.ndarray:
    """``n`` independent keys, uint32 [n, 2]."""
    return _mix([_SPLIT, *_words(rng)], n)


def fold_in(rng: np.ndarray, data: int) -> np.ndarray:
    """The key for item ``data`` (a step, an epoch) under ``rng``, uint32 [2]; 0 <= data < 2**32."""
    return _mix([_FOLD, *_words(rng), int(data)], 1)[0]


def _words(rng: np.ndarray) -> list[int]:
    first, second = (int(word) for word in rng)
    return [first, second]


def _mix(entropy: list[int], n: int) -> np.ndarray:
    return np.random.SeedSequence(entropy).generate_state(2 * n, np.uint32).reshape(n, 2)
