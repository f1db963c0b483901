"""The page that adds a rule, run: its code is correct, and right on every back end."""

import copy
import os
import re
from pathlib import Path

import pytest
import torch

from algoperf_shampoo.optim.gpu.triton_ops import TritonOperations
from algoperf_shampoo.optim.reference import from_basis, matricize, to_basis

from .support import blocks_of, gradients
from .test_operations import INTERPRETED, on_back_end, small_tiles  # noqa: F401

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding_a_rule.md"


@pytest.fixture(scope="module")
def written():
    """What the page's code defines."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


class Reference:
    """The page's formula, one matrix, float64; bases are given."""

    def __init__(self, shape, beta1, beta2, eps):
        self.M = torch.zeros(shape, dtype=torch.float64)  # in the parameter's coordinates
        self.means = [torch.ones(d, dtype=torch.float64) for d in shape]
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    def step(self, W, G, lr, bases):
        X = to_basis(G, bases)
        self.M = self.beta1 * self.M + (1 - self.beta1) * G
        U = to_basis(self.M, bases)
        for i, mean in enumerate(self.means):
            new = (matricize(X, i) ** 2).mean(1)
            self.means[i] = self.beta2 * mean + (1 - self.beta2) * new
            shape = [-1 if j == i else 1 for j in range(G.ndim)]
            U = U * ((self.means[i] + self.eps) ** -0.25).view(shape)
        return W - lr * from_basis(U, bases)


def errors(written, back_end, dtype):
    start = next(gradients((9, 6), 1, seed=7))
    parameter = torch.nn.Parameter(start.to(back_end[0], dtype).clone())
    optimizer = written["ModeScaling"](
        [parameter], lr=0.01, precondition_frequency=4, max_preconditioner_dim=10
    )
    on_back_end(optimizer, back_end)
    expected, value = Reference((9, 6), 0.9, 0.99, 1e-8), start
    for gradient in gradients((9, 6), 14, dtype=dtype):
        parameter.grad = gradient.to(back_end[0])
        optimizer.step()
        (block,) = blocks_of(optimizer)
        bases = [block[f"operator_{i}"].double().cpu() for i in range(2)]
        value = expected.step(value, gradient.double(), 0.01, bases)
    assert block["refreshes_0"] == 3
    return (parameter.detach().double().cpu() - value).norm() / value.norm()


def test_on_a_cpu(written):
    assert errors(written, ("cpu", "torch"), torch.float64) < 1e-12


@pytest.mark.gpu
@pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"
)
def test_by_our_kernels(written, monkeypatch):
    seen = []
    products = TritonOperations._products
    monkeypatch.setattr(
        TritonOperations, "_products", lambda *a, **k: (seen.append(1), products(*a, **k))[1]
    )
    device = "cpu" if INTERPRETED and os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    assert errors(written, (device, "kernels"), torch.float32) < 1e-4
    assert len(seen) == 28 if device == "cpu" else seen  # recorded steps are replayed


def test_saved_and_loaded(written):
    """State per mode goes through the state_dict."""
    twins = []
    for _ in range(2):
        p = torch.nn.Parameter(next(gradients((9, 6), 1)))
        twins.append((p, written["ModeScaling"]([p], max_preconditioner_dim=10)))
    (p, optimizer), (q, other) = twins
    for t, gradient in enumerate(gradients((9, 6), 30)):
        p.grad = gradient
        optimizer.step()
        if t == 14:
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            q.data.copy_(p.data)
        elif t > 14:
            q.grad = gradient
            other.step()
    (block,) = blocks_of(optimizer)
    assert block["mean_square_0"].shape == (9,) and not torch.equal(p, torch.zeros_like(p))
    assert torch.equal(p, q)
