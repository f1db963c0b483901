"""Where TF32 is the process's default, as in AlgoPerf 2026, statistics stay float32-accurate.

torch has two kinds of switch, an older and a newer, and must not see both in one process: each
measurement is a process of its own. Taken away, our local switch is missed: the error of the
factors and of the criterion is then TF32's.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from algoperf_shampoo.optim import EShampoo, criterion
from algoperf_shampoo.optim import optimizer as optimizer_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parents[2]
SWITCHES = ("set_float32_matmul_precision", "allow_tf32", "fp32_precision")
FLOAT32, TF32 = 2e-6, 2e-5  # errors: at most, where right; at least, where TF32 was used


def set_default(switch: str) -> None:
    """Make TF32 the default of products in this process."""
    if switch == "set_float32_matmul_precision":
        torch.set_float32_matmul_precision("high")
    elif switch == "allow_tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        torch.backends.cuda.matmul.fp32_precision = "tf32"


def measure(switch: str, local_switch: bool, own_kernels: bool) -> dict[str, float]:
    """Relative errors against float64 of a plain product, the factors, and the criterion."""
    set_default(switch)
    g = torch.Generator("cuda").manual_seed(5)
    x, y = (torch.randn(512, 512, device="cuda", generator=g) for _ in range(2))
    errors = {"plain product": relative(x @ y, x.double() @ y.double())}
    nothing: Any = lambda setting: contextlib.nullcontext()  # noqa: E731
    with contextlib.ExitStack() as stack:
        if not local_switch:
            for module in (optimizer_, criterion):
                stack.enter_context(mock.patch.object(module, "matmul_precision", nothing))
        if not own_kernels:
            stack.enter_context(
                mock.patch("algoperf_shampoo.optim.gpu.multiplies", lambda *_: False)
            )
        weight = torch.nn.Parameter(torch.zeros(512, 256, device="cuda"))
        optimizer = EShampoo([weight], precondition_frequency=4, tau=0.1, betas=(0.9, 0.95))
        factors = [torch.zeros(n, n, device="cuda", dtype=torch.float64) for n in weight.shape]
        for _ in range(6):
            weight.grad = torch.randn(512, 256, device="cuda", generator=g)
            true = weight.grad.double()
            factors = [
                0.95 * f + 0.05 * gram
                for f, gram in zip(factors, (true @ true.T, true.T @ true), strict=True)
            ]
            optimizer.step()
        (group,) = optimizer._groups
        sets = group.factor_sets
        found = {s.n: s for s in sets}
        errors["factors"] = max(
            relative(found[len(factor)].factors[0], factor) for factor in factors
        )
        # With the eigenvectors themselves Eq. 11's left side is 0: what is read is the error.
        errors["criterion"] = 0.0
        for factor_set in sets:
            vectors = torch.linalg.eigh(factor_set.factors[0].double())[1]
            factor_set.operators[0].copy_(vectors)
            score = float(criterion.scores(factor_set, [0], 0.1)[0])
            errors["criterion"] = max(errors["criterion"], score)
    return errors


def relative(found: torch.Tensor, true: torch.Tensor) -> float:
    """||found - true|| / ||true||, Frobenius norms."""
    return float((found.double() - true).norm() / true.norm())


def measured(switch: str, local_switch: bool, own_kernels: bool) -> dict[str, float]:
    """:func:`measure` in a process of its own."""
    call = f"measure({switch!r}, {local_switch}, {own_kernels})"
    code = f"import json; from {__name__} import measure; print(json.dumps({call}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("own_kernels", [True, False], ids=["own kernels", "torch's products"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_grams_and_criterion_are_float32_accurate_under_a_tf32_default(switch, own_kernels):
    if switch == "fp32_precision" and not hasattr(torch.backends.cuda.matmul, switch):
        pytest.skip("this torch has the older switch alone")
    errors = measured(switch, True, own_kernels)
    assert errors["plain product"] > TF32, "TF32 is not the default here: the test shows nothing"
    assert errors["factors"] < FLOAT32 and errors["criterion"] < FLOAT32, errors


@pytest.mark.parametrize("switch", SWITCHES)
def test_without_the_local_switch_they_are_not(switch):
    """So that the test above can fail: where torch multiplies, the local switch is what helps."""
    if switch == "fp32_precision" and not hasattr(torch.backends.cuda.matmul, switch):
        pytest.skip("this torch has the older switch alone")
    errors = measured(switch, False, False)
    assert errors["factors"] > TF32 and errors["criterion"] > TF32, errors
