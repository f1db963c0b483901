"""One table of variants: how to make the fast optimizer and the reference of each."""

import torch

from algoperf_shampoo.optim import (
    KLSOAP,
    SOAP,
    AdamW,
    EShampoo,
    KLShampoo,
    Shampoo,
    Shampoo2Trace,
    ShampooAdaptive,
    Solver,
    reference,
    reference_eshampoo,
    reference_kl,
    reference_shampoo,
    reference_soap,
)
from algoperf_shampoo.optim.blocks import state_dict
from algoperf_shampoo.optim.blocks.partition import cut

SETTINGS = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01)

# As the others are by default.
WHOLE = {"one_dim": "full", "small_matrices": "vector"}

VARIANTS = {
    "adamw": (AdamW, reference.AdamW, {}),
    "shampoo_grafting": (Shampoo, reference.ShampooGrafting, {}),
    # Nothing bounds its steps in a null space but epsilon.
    "shampoo_ungrafted": (Shampoo, reference_shampoo.shampoo, {"grafting": None, "eps": 1e-4}),
    "eshampoo_fixed": (EShampoo, reference.EShampoo, {"tau": 0.0}),
    "eshampoo_adaptive": (EShampoo, reference.EShampoo, {"tau": 0.1}),
    "eshampoo_qr": (
        EShampoo,
        lambda h: reference_eshampoo.EShampooAblation(h, max_iterations=2),
        {"tau": 0.1, "eigensolver": Solver(method="qr", max_iterations=2)},
    ),
    "shampoo_adaptive": (
        ShampooAdaptive,
        reference_shampoo.shampoo_adaptive,
        {"tau": 0.1, "eps": 1e-4},
    ),
    "shampoo2_trace": (Shampoo2Trace, reference_shampoo.shampoo2_trace, {"eps": 1e-4}),
    "soap": (SOAP, lambda h: reference_soap.SOAP(h, precondition_1d=True), WHOLE),
    "kl_shampoo": (KLShampoo, reference_kl.KLShampoo, WHOLE),
    "kl_soap": (KLSOAP, reference_kl.KLSOAP, WHOLE),
}
# Those whose first step only starts them.
STARTS = ("soap", "kl_shampoo", "kl_soap")
# Those without NAdam's numerator.
PLAIN = STARTS
# Those whose reference takes bases from outside at every step.
LENT = ("eshampoo_fixed", "eshampoo_adaptive")


def late(variant):
    """Steps that only start a parameter and do not count."""
    return 1 if variant in STARTS else 0


def make(variant, params, **overrides):
    """The fast optimizer of a variant, F = 5 unless overridden."""
    build, _, settings = VARIANTS[variant]
    frequency = {} if variant == "adamw" else {"precondition_frequency": 5}
    if variant in PLAIN and not overrides.get("nadam", False):
        overrides.pop("nadam", None)
    return build(params, **{**SETTINGS, **frequency, **settings, **overrides})


class ReferenceParameter:
    """A parameter walked by the reference, block by block, in float64."""

    def __init__(self, variant, value, *, max_dim=1024, nadam=False, frequency=5):
        self.variant = variant
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

    def walk(self, gradient, optimizer, index=0):
        """A step after the optimizer's, with its bases: at every step, or where the first one is a
        decomposition, after that."""
        borrowed = [[q.cpu() for q in block] for block in bases_of(optimizer, index)]
        first = self.rules[0].t == 0
        self.step(gradient, bases=borrowed if self.variant in LENT else None)
        if first and self.variant in STARTS:
            self.lend(borrowed)

    def lend(self, bases):
        """Go on with these bases, per block: one gradient alone leaves null spaces, whose bases are
        arbitrary."""
        for rule, mine in zip(self.rules, bases, strict=True):
            rule.bases = list(mine)

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
