"""The run-time patches that need no AlgoPerf to be seen at work."""

from __future__ import annotations

import sys
import types

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
