"""What the tests of torch's customs share: optimizers, a small model, and equality to the bit."""

import pytest
import torch

from algoperf_shampoo.optim import (
    KLSOAP,
    SOAP,
    AdamW,
    EShampoo,
    KLShampoo,
    Shampoo,
    ShampooAdaptive,
)

STARTS = dict(lr=0.01, precondition_frequency=3, one_dim="full", small_matrices="vector")
OURS = {
    "adamw": lambda p, **k: AdamW(p, lr=0.01, **k),
    "shampoo": lambda p, **k: Shampoo(p, lr=0.01, precondition_frequency=3, **k),
    "ungrafted": lambda p, **k: Shampoo(
        p, lr=0.01, precondition_frequency=3, grafting=None, **{"eps": 1e-3, **k}
    ),
    "eshampoo": lambda p, **k: EShampoo(p, lr=0.01, precondition_frequency=3, tau=0.1, **k),
    "adaptive": lambda p, **k: ShampooAdaptive(
        p, lr=0.01, precondition_frequency=3, **{"eps": 1e-3, **k}
    ),
    "soap": lambda p, **k: SOAP(p, **{**STARTS, **k}),
    "kl_shampoo": lambda p, **k: KLShampoo(p, **{**STARTS, **k}),
    "kl_soap": lambda p, **k: KLSOAP(p, **{**STARTS, **k}),
}
ALL = {**OURS, "torch": lambda p, **k: torch.optim.AdamW(p, lr=0.01, **k)}
ours = pytest.mark.parametrize("build", OURS.values(), ids=OURS)
like_torch = pytest.mark.parametrize("build", ALL.values(), ids=ALL)


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Tanh(), torch.nn.Linear(30, 6))


def train(net, optimizer, steps, start=0):
    for t in range(start, start + steps):
        x = torch.randn(16, 40, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        (net(x) - x[:, :6]).square().mean().backward()
        optimizer.step()


def same(one, other):
    """Equal to the bit, through dicts and sequences."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        keys = one.keys() == other.keys()
        return keys and all(same(x, other[name]) for name, x in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def weights(net):
    return [p.detach().clone() for p in net.parameters()]
