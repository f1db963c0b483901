"""The options of parameter groups: what each may be, and which may change when.

An optimizer's groups name all of its options, as those of torch's optimizers do, so that they stand
in ``repr`` and in every saved state. Some may change at any step, some are settled when a group is
laid out, some are one for the whole optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from . import noise
from .blocks.partition import SMALL_MATRICES
from .nonfinite import POLICIES
from .ops.linalg import MATMUL_PRECISIONS

ONE_DIM = ("full", "adam", "only")
GRAFTING = ("adam", None)
EIGENVALUES = ("ema", "decomposition")
TRACE_SCALES = ("paper", "authors")


class Option(NamedTuple):
    """good(value): whether the value will do; wanted: what would, in words."""

    good: Callable[[Any], bool]
    wanted: str


def is_number(value: Any) -> bool:
    """Finite, and no bool; a tensor [] is one."""
    try:
        return not isinstance(value, bool | str) and math.isfinite(float(value))
    except (TypeError, ValueError, RuntimeError):
        return False


def _not_negative(value: Any) -> bool:
    return is_number(value) and float(value) >= 0


def _is_fraction(value: Any) -> bool:
    return is_number(value) and 0 <= float(value) < 1


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _one_of(known: Iterable[Any]) -> Option:
    known = tuple(known)
    return Option(lambda value: value in known, f"one of {', '.join(map(repr, known))}")


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _or_none(option: Option) -> Option:
    return Option(lambda value: value is None or option.good(value), f"{option.wanted}, or None")


NUMBER = Option(_not_negative, "a finite number >= 0")
COUNT = Option(_is_count, "an integer >= 1")
BETA = Option(_is_fraction, "in [0, 1)")
STEP_NUMBER = Option(_is_step, "an integer >= 0")
SWITCH = Option(lambda value: isinstance(value, bool), "True or False")

# May differ between groups and change between steps.
STEP = {
    "lr": NUMBER,
    "betas": Option(lambda b: isinstance(b, Sequence) and len(b) == 2, "a pair (beta1, beta2)"),
    "eps": NUMBER,
    "weight_decay": NUMBER,
    "nadam": SWITCH,
    "precondition_frequency": COUNT,
    "tau": BETA,
    "matmul_precision": _one_of(MATMUL_PRECISIONS),
    "nonfinite_gradients": _one_of(POLICIES),
    "nonfinite_limit": COUNT,
    "noise_directions": _one_of(noise.POLICIES),
    "noise_level": NUMBER,
    "beta3": _or_none(BETA),
    "tau_later": BETA,
    "tau_switch": _or_none(STEP_NUMBER),
    "freeze_after": _or_none(STEP_NUMBER),
}
# May differ between groups, but not change: blocks and state depend on them.
LAYOUT = {
    "max_preconditioner_dim": COUNT,
    "one_dim": _one_of(ONE_DIM),
    "small_matrices": _one_of(SMALL_MATRICES),
}
# One for the whole optimizer: the rule, and what the rule's state depends on.
RULE = {
    "rule": Option(lambda value: isinstance(value, str), "a name"),
    "grafting": _one_of(GRAFTING),
    "grafting_eps": NUMBER,
    "exponent_multiplier": NUMBER,
    "eigenvalues": _one_of(EIGENVALUES),
    "clamp": SWITCH,
    "trace_scale": _one_of(TRACE_SCALES),
    "basis_aware": SWITCH,
}
OPTIONS = {**STEP, **LAYOUT, **RULE}
CHANGEABLE = OPTIONS.keys() - {"lr"}  # and to be checked when they have changed
# What somebody may take for an option of a group: of our constructors, and torch.optim.AdamW's.
NOT_OF_GROUPS = (
    "eigensolver eigen_workspace_mib cuda_graph process_group "
    "amsgrad maximize foreach capturable differentiable fused"
).split()


def check(values: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: an option is out of its range; names it and the range.
    """
    for name, option in OPTIONS.items():
        if name in values:
            _check_one(name, values[name], option)
    for name, beta in zip(("beta1", "beta2"), values.get("betas", ()), strict=False):
        _check_one(name, beta, BETA)


def _check_one(name: str, value: Any, option: Option) -> None:
    if not option.good(value):
        raise ValueError(f"{name} must be {option.wanted}, got {value!r}")


def check_given(
    given: Mapping[str, Any], defaults: Mapping[str, Any], fixed: Iterable[str]
) -> None:
    """Whether a new group may set what it sets; keys that no optimizer of ours knows pass, as in
    torch.

    Args:
        given: the group as given.
        defaults: the optimizer's options, with its values.
        fixed: names of those that are one for the whole optimizer.

    Raises:
        ValueError: an option that the optimizer does not read, or that a group cannot set.
    """
    rule, fixed = defaults["rule"], tuple(fixed)
    for name, value in given.items():
        if name not in defaults and (name in OPTIONS or name in NOT_OF_GROUPS):
            known = ", ".join(n for n in defaults if n in OPTIONS and n not in fixed)
            raise ValueError(f"a group of {rule} has no option {name!r}; it has {known}")
        if name in fixed and value != defaults[name]:
            raise ValueError(
                f"{name} is one for all groups of this {rule}, {defaults[name]!r}; "
                f"a group cannot set it to {value!r}"
            )


def check_same(
    where: str, now: Mapping[str, Any], then: Mapping[str, Any], names: Iterable[str]
) -> None:
    """
    Raises:
        ValueError: one of the options differs from what it was; names both values.
    """
    for name in names:
        if now[name] != then[name]:
            raise ValueError(f"{where}: {name} is {now[name]!r}, this optimizer's {then[name]!r}")
