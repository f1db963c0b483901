"""The variants of the battery, and how to make the fast optimizer and the reference of each.

A variant stands in one place, its folder in ``submissions/``. What the tests must know of it is
asked of that module: which class it makes of its point for the minis, and with which settings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from algoperf_shampoo import points
from algoperf_shampoo.harness import hparams, submission_loader
from algoperf_shampoo.optim import (
    KLSOAP,
    SOAP,
    AdamW,
    EShampoo,
    KLShampoo,
    PreconditionedOptimizer,
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
from algoperf_shampoo.optim.rule import Rule

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01)


@dataclass(frozen=True)
class Variant:
    """What a submission makes: a class with settings, and the rule that this is."""

    build: type[PreconditionedOptimizer]
    settings: dict[str, Any]
    rule: Rule

    @property
    def grafted(self) -> bool:
        """Whether there is a second moment, so that steps are bounded as Adam's are."""
        return "exp_avg_sq" in self.rule.moments


def made_by(module: Any, point: Any) -> tuple[type[PreconditionedOptimizer], dict[str, Any]]:
    """The class that a submission module calls with a point, and the arguments by name."""
    made: list[tuple[type[PreconditionedOptimizer], dict[str, Any]]] = []
    for name, value in list(vars(module).items()):
        if isinstance(value, type) and issubclass(value, PreconditionedOptimizer):
            noted = functools.partial(lambda build, _, **given: made.append((build, given)), value)
            setattr(module, name, noted)
    module.make_optimizer([], point, None)
    [(build, given)] = made
    return build, {name: value for name, value in given.items() if name != "process_group"}


def of_submissions(root: Path) -> dict[str, Variant]:
    """Every variant in ``root/submissions``, as the tests make it.

    The settings are those of its point for the minis, but for what belongs to a task: learning
    rate, averages, decay, F, the largest dimension. NAdam's numerator is a test's own choice.
    Where nothing bounds the steps in a null space but epsilon, it is 1e-4.
    """
    found = {}
    for name in submission_loader.variants(root):
        fields = submission_loader.fields(root, name)
        space = root / "search_spaces" / "mini" / f"{name}.json"
        [point] = hparams.read_points(space, 1, fields, "ogbg")
        module = submission_loader.import_module(root, name)
        build, settings = made_by(module, points.complete(point, fields))
        settings.pop("eigen_workspace_mib", None)  # of a device; some tests give solvers
        rule = build([torch.nn.Parameter(torch.zeros(2, 2))], **settings).rule
        variant = Variant(build, settings | SETTINGS, rule)
        settings = variant.settings
        if "nadam" in settings:
            settings["nadam"] = False
        if rule.has_factors:
            settings |= {"precondition_frequency": 5, "max_preconditioner_dim": 1024}
        if not rule.starts and not variant.grafted:
            settings["eps"] = 1e-4
        if isinstance(solver := settings.get("eigensolver"), Solver):
            settings["eigensolver"] = replace(solver, max_iterations=2)
        found[name] = variant
    return found


VARIANTS = of_submissions(ROOT)
PRECONDITIONED = tuple(name for name, v in VARIANTS.items() if v.rule.has_factors)
# Those whose first step only starts them.
STARTS = tuple(name for name, v in VARIANTS.items() if v.rule.starts)
# Those without NAdam's numerator.
PLAIN = tuple(name for name, v in VARIANTS.items() if "nadam" not in v.settings)

# The reference of each class, from its hyperparameters and the settings it is made with. A variant
# of a class that is here has one by itself.
REFERENCES: dict[type[PreconditionedOptimizer], Callable[[Any, dict[str, Any]], Any]] = {
    AdamW: lambda h, s: reference.AdamW(h),
    Shampoo: lambda h, s: (
        reference.ShampooGrafting(h) if s["grafting"] else reference_shampoo.shampoo(h)
    ),
    EShampoo: lambda h, s: (
        reference.EShampoo(h)
        if isinstance(s["eigensolver"], str)
        else reference_eshampoo.EShampooAblation(h, max_iterations=s["eigensolver"].max_iterations)
    ),
    ShampooAdaptive: lambda h, s: reference_shampoo.shampoo_adaptive(h),
    Shampoo2Trace: lambda h, s: reference_shampoo.shampoo2_trace(h),
    SOAP: lambda h, s: reference_soap.SOAP(h, precondition_1d=True),
    KLShampoo: lambda h, s: reference_kl.KLShampoo(h),
    KLSOAP: lambda h, s: reference_kl.KLSOAP(h),
}


def late(variant):
    """Steps that only start a parameter and do not count."""
    return 1 if variant in STARTS else 0


def limits(variant, **settings):
    """Settings of variants with factors, for those."""
    return settings if variant in PRECONDITIONED else {}


def make(variant, params, **overrides):
    """The fast optimizer of a variant, F = 5 unless overridden."""
    if variant in PLAIN and not overrides.get("nadam", False):
        overrides.pop("nadam", None)
    return VARIANTS[variant].build(params, **{**VARIANTS[variant].settings, **overrides})


class ReferenceParameter:
    """A parameter walked by the reference, block by block, in float64."""

    def __init__(self, variant, value, *, max_dim=1024, nadam=False, frequency=5):
        self.variant = variant
        settings = VARIANTS[variant].settings
        beta1, beta2 = SETTINGS["betas"]
        h = reference.Hyperparameters(
            alpha=SETTINGS["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=SETTINGS["weight_decay"],
            nadam=nadam,
            F=frequency,
            tau=settings.get("tau", 0.0),
            epsilon=settings["eps"],
        )
        self.blocks = cut(tuple(value.shape), max_dim)
        of = REFERENCES[VARIANTS[variant].build]
        self.rules = [of(h, settings) for _ in self.blocks]
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
        lent = isinstance(self.rules[0], reference.EShampoo)
        self.step(gradient, bases=borrowed if lent else None)
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
