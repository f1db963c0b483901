"""One table of variants: how to make the fast optimizer and the reference of each."""

import torch

from algoperf_shampoo.optim import AdamW, EShampoo, Shampoo, reference, reference_shampoo
from algoperf_shampoo.optim.blocks import state_dict
from algoperf_shampoo.optim.blocks.partition import cut

SETTINGS = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01)

VARIANTS = {
    "adamw": (AdamW, reference.AdamW, {}),
    "shampoo_grafting": (Shampoo, reference.ShampooGrafting, {}),
    # Nothing bounds its steps in a null space but epsilon.
    "shampoo_ungrafted": (Shampoo, reference_shampoo.shampoo, {"grafting": None, "eps": 1e-4}),
    "eshampoo_fixed": (EShampoo, reference.EShampoo, {"tau": 0.0}),
    "eshampoo_adaptive": (EShampoo, reference.EShampoo, {"tau": 0.1}),
}


def make(variant, params, **overrides):
    """The fast optimizer of a variant, F = 5 unless overridden."""
    build, _, settings = VARIANTS[variant]
    frequency = {} if variant == "adamw" else {"precondition_frequency": 5}
    return build(params, **{**SETTINGS, **frequency, **settings, **overrides})


class ReferenceParameter:
    """A parameter walked by the reference, block by block, in float64."""

    def __init__(self, variant, value, *, max_dim=1024, nadam=False, frequency=5):
        _, reference_class, settings = VARIANTS[variant]
        beta1, beta2 = SETTINGS["betas"]
        h = reference.Hyperparameters(
            alpha=SETTINGS["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=SETTINGS["weight_decay"],
            nadam=nadam,
            F=frequency,
            tau=settings.get("tau", 0.0),
            epsilon=settings.get("eps", 1e-8),
        )
        self.blocks = cut(tuple(value.shape), max_dim)
        self.rules = [reference_class(h) for _ in self.blocks]
        self.value = value.double().reshape(self.blocks[0].merged).clone()

    def step(self, gradient, bases=None):
        """bases: per block, the eigenbases to use instead of computing them."""
        gradient = gradient.double().reshape(self.value.shape)
        for i, (block, rule) in enumerate(zip(self.blocks, self.rules, strict=True)):
            given = {} if bases is None else {"bases": bases[i]}
            new = rule.step(self.value[block.slices], gradient[block.slices], **given)
            self.value[block.slices] = new

    def relative_error(self, parameter):
        value = parameter.detach().double().reshape(self.value.shape)
        return ((value - self.value).norm() / self.value.norm()).item()


def blocks_of(optimizer, index=0):
    """The canonical state of one parameter's blocks."""
    return state_dict.blocks_of(optimizer.state_dict()["state"][index])


def bases_of(optimizer, index=0):
    """Per block, its operators in float64, as the reference takes them."""
    return [
        [block[name].double() for name in sorted(block) if name.startswith("operator_")]
        for block in blocks_of(optimizer, index)
    ]


def gradients(shape, steps, seed=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
