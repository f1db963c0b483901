"""The run-time patches that need no AlgoPerf to be seen at work."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest

from algoperf_shampoo.harness.algoperf import cpu_compat


def test_unknown_machine_answers_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    known = types.SimpleNamespace(bytes_sent=5, bytes_recv=6)
    psutil = types.SimpleNamespace(
        cpu_freq=lambda: None, disk_io_counters=lambda: None, net_io_counters=lambda: known
    )
    monkeypatch.setitem(sys.modules, "psutil", psutil)
    cpu_compat.tolerate_unknown_machine()
    assert psutil.cpu_freq().current == 0
    assert psutil.disk_io_counters().write_bytes == 0
    assert psutil.net_io_counters() is known


def test_ogbgs_probabilities_are_numpys_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Indexed:  # what JAX would compile a program for
        def __init__(self, values: list[float]) -> None:
            self.values = values

        def __array__(self, *_: Any, **__: Any) -> Any:
            return np.array(self.values)

    metrics: Any = types.ModuleType("algoperf.workloads.ogbg.metrics")
    metrics.jax = types.SimpleNamespace(nn=types.SimpleNamespace(sigmoid=Indexed))
    monkeypatch.setitem(sys.modules, metrics.__name__, metrics)
    cpu_compat.evaluate_ogbg_in_numpy()
    probabilities = metrics.jax.nn.sigmoid([0.25, 0.5])
    assert type(probabilities) is np.ndarray and probabilities.tolist() == [0.25, 0.5]
