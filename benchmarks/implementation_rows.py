"""The rows of the table of implementations: how each is built, and the terms where it differs."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from algoperf_shampoo.optim import reference
from algoperf_shampoo.optim.reference_eshampoo import EShampooAblation
from algoperf_shampoo.optim.reference_shampoo import Shampoo
from benchmarks import authors_fixtures as fixtures
from benchmarks import float64_peers as peers
from benchmarks.composite import KL_SHAMPOO, KL_SOAP, Composite
from benchmarks.other_shampoos import GraftedShampoo, UngraftedShampoo

F = 8


@dataclass
class Row:
    """One implementation of one variant.

    Args:
        source: "meta", "soap", "kl", "emerging" (checkouts), or the name of a package.
        name: as that source has it.
        variant: ours.
        build: theirs.
        rule: ours, a reference with switches.
        base: the switches of our reference.
        terms: those in which theirs differs, with their setting.
        F: of both.
        tau: of both.
        shape: of the parameter. Square where a basis is computed from the first gradient alone and
            its eigenvalues are inverted: the null space would be rounding.
    """

    source: str
    name: str
    variant: str
    build: Callable[[], peers.Build]
    rule: Callable[..., Any]
    base: dict[str, Any] = field(default_factory=dict)
    terms: dict[str, Any] = field(default_factory=dict)
    F: int = F
    tau: float = 0.0
    shape: tuple[int, int] = (5, 4)


def rows(folders: dict[str, str | None]) -> Iterator[Row]:
    """All rows whose source was named or is installed."""
    if folder := folders["meta"]:
        yield from meta_rows(folder)
    if folder := folders["soap"]:
        yield Row("soap", "SOAP", "soap", lambda f=folder: peers.soap(f, F=F), Composite)
    if folder := folders["kl"]:
        yield from kl_rows(folder)
    if folder := folders["emerging"]:
        yield from emerging_rows(folder)
    if installed("heavyball"):
        yield from heavyball_rows()
    if installed("pytorch_optimizer"):
        yield from pytorch_optimizer_rows()


def meta_rows(folder: str) -> Iterator[Row]:
    def build(**settings: Any) -> Callable[[], peers.Build]:
        return lambda: peers.meta(folder, **{"F": F, **settings})

    corrected, kept, eps = fixtures.CORRECTED, fixtures.KEPT, peers.EPSILON
    yield Row(
        "meta",
        "RootInvShampoo, Adam grafting",
        "shampoo-grafting",
        build(**fixtures.ROOT, grafting=True),
        lambda h: reference.ShampooGrafting(h, grafting_epsilon=eps),
    )
    yield Row("meta", "RootInvShampoo", "shampoo", build(**fixtures.ROOT), Shampoo)
    yield Row(
        "meta",
        "EigendecomposedShampoo, tolerance 0.1",
        "shampoo-adaptive",
        build(**kept, **fixtures.eigh(0.1)),
        Shampoo,
        tau=0.1,
    )
    yield Row(
        "meta",
        "RootInvShampoo, trace scaling, exponents 1/2",
        "shampoo2-trace",
        build(**fixtures.SQUARED),
        Shampoo,
        {"squared": True, "trace_scaled": True},
    )
    yield Row(
        "meta", "EigenvalueCorrectedShampoo", "eshampoo-fixed", build(**corrected), EShampooAblation
    )
    yield Row(
        "meta",
        "EigenvalueCorrectedShampoo, tolerance 0.1",
        "eshampoo-adaptive",
        build(**corrected, **fixtures.eigh(0.1)),
        EShampooAblation,
        tau=0.1,
    )
    yield Row(
        "meta",
        "EigenvalueCorrectedShampoo by QR, tolerance 0.1, 10 iterations",
        "eshampoo-qr",
        build(**corrected, **fixtures.qr(0.1, 10)),
        EShampooAblation,
        {"max_iterations": 10},
        {"qr_order": "ascending", "permute_D": False, "ridge": eps},
        tau=0.1,
    )
    yield Row(
        "meta",
        "DefaultSOAPConfig",
        "soap",
        build(**corrected, **fixtures.qr(0.0, 1)),
        Composite,
        {},
        {
            "first": "updates",
            "start": "zero",
            "statistics": "before",
            "debiased": True,
            "columns": "ascending afterwards",
            "lift": "epsilon",
            "correction": "moments",
            "decay": "beside",
        },
    )
    theirs = {
        "first": "updates",
        "start": "zero",
        "statistics": "before",
        "debiased": True,
        "divided": False,
        "eigenvalues": "refresh",
        "initial": 1.0,
        "floor": "plus epsilon",
        "solver": "eigh",
        "correction": "moments",
        "denominator": "no epsilon",
        "decay": "beside",
    }
    kl = dict(fixtures.ROOT, config="RootInvKLShampooPreconditionerConfig")
    yield Row(
        "meta",
        "RootInvKLShampoo",
        "kl-shampoo",
        build(**kl),
        Composite,
        KL_SHAMPOO,
        {**theirs, "exponent": 0.25},
    )
    yield Row(
        "meta",
        "EigendecomposedKLShampoo",
        "kl-shampoo",
        build(**dict(kept, config="EigendecomposedKLShampooPreconditionerConfig")),
        Composite,
        KL_SHAMPOO,
        {**theirs, "exponent": 0.25},
    )
    yield Row(
        "meta",
        "RootInvKLShampoo, exponents 1/2",
        "kl-shampoo",
        build(**kl, inverse_exponent_override={2: 0.5}),
        Composite,
        KL_SHAMPOO,
        theirs,
    )


def kl_rows(folder: str) -> Iterator[Row]:
    yield Row(
        "kl",
        "KLOpt",
        "kl-shampoo",
        lambda: peers.kl(folder, F=F, using_klsoap=False),
        Composite,
        KL_SHAMPOO,
    )
    yield Row(
        "kl",
        "KLOpt, using_klsoap",
        "kl-soap",
        lambda: peers.kl(folder, F=F, using_klsoap=True),
        Composite,
        KL_SOAP,
    )
    yield Row(
        "kl",
        "SOAP",
        "soap",
        lambda: peers.kl_soap_file(folder, F=F),
        Composite,
        {},
        {"columns": "unsorted"},
    )


def emerging_rows(folder: str) -> Iterator[Row]:
    """They refresh at every step."""
    soap = {
        "first": "updates",
        "start": "zero",
        "statistics": "before",
        "solver": "eigh once",
        "columns": "sorted afterwards",
        "correction": "moments",
        "decay": "beside",
    }
    kl = {
        **soap,
        "debiased": True,
        "eigenvalues": "refresh",
        "initial": 0.0,
        "floor": "at least epsilon",
    }
    legacy, v3 = "legacy_soap.soap", "shampoo.soap_v3"
    yield Row(
        "emerging",
        "SOAP (legacy_soap)",
        "soap",
        lambda: peers.emerging(folder, legacy, "SOAP"),
        Composite,
        {},
        soap,
        F=1,
        shape=(4, 4),
    )
    yield Row(
        "emerging",
        "SOAP (legacy_soap), use_kl_shampoo",
        "kl-soap",
        lambda: peers.emerging(folder, legacy, "SOAP", use_kl_shampoo=True),
        Composite,
        KL_SOAP,
        kl,
        F=1,
        shape=(4, 4),
    )
    yield Row(
        "emerging",
        "KlSoapV3",
        "kl-soap",
        lambda: peers.emerging(folder, v3, "KlSoapV3"),
        Composite,
        KL_SOAP,
        kl,
        F=1,
        shape=(4, 4),
    )
    yield Row(
        "emerging",
        "ReklsV3",
        "kl-soap",
        lambda: peers.emerging(folder, v3, "ReklsV3"),
        Composite,
        KL_SOAP,
        {**kl, "solver": "eigh", "columns": "unsorted"},
        F=1,
        shape=(4, 4),
    )


def heavyball_rows() -> Iterator[Row]:
    soap = {
        "due": "calls",
        "columns": "put back",
        "lift": "relative",
        "correction": "moments",
        "denominator": "at least epsilon",
        "decay": "beside",
    }
    kl = {"debiased": True, "eigenvalues": "each step", "floor": "at least epsilon"}
    yield Row(
        "heavyball", "SOAP", "soap", lambda: peers.heavyball("SOAP", F=F), Composite, {}, soap
    )
    yield Row(
        "heavyball",
        "KLSOAP",
        "kl-soap",
        lambda: peers.heavyball("KLSOAP", F=F),
        Composite,
        KL_SOAP,
        {**soap, **kl, "start": "whole"},
    )
    yield Row(
        "heavyball",
        "KLShampoo",
        "kl-shampoo",
        lambda: peers.heavyball("KLShampoo", F=F, dampening=0.0),
        Composite,
        KL_SHAMPOO,
        {
            "due": "calls",
            "columns": "put back",
            "lift": "relative",
            **kl,
            "start": "identity",
            "balanced": True,
            "denominator": "no epsilon",
            "decay": "beside",
        },
    )


def pytorch_optimizer_rows() -> Iterator[Row]:
    def build(name: str, **settings: Any) -> Callable[[], peers.Build]:
        return lambda: peers.pytorch_optimizer(name, **settings)

    yield Row(
        "pytorch_optimizer",
        "SOAP",
        "soap",
        build("SOAP", precondition_frequency=F, eps=peers.EPSILON),
        Composite,
    )
    shampoo = dict(preconditioning_compute_steps=F, matrix_eps=peers.EPSILON)
    summed = {
        "momentum": "none",
        "statistics": "sum",
        "start": "epsilon",
        "before_roots": "none",
    }
    yield Row(
        "pytorch_optimizer",
        "Shampoo",
        "shampoo",
        build("Shampoo", betas=None, weight_decouple=True, **shampoo),
        UngraftedShampoo,
        {},
        summed,
    )
    yield Row(
        "pytorch_optimizer",
        "Shampoo, momentum 0.9",
        "shampoo",
        build("Shampoo", betas=None, momentum=0.9, weight_decouple=True, **shampoo),
        UngraftedShampoo,
        {},
        {**summed, "momentum": "of gradient and last update"},
    )
    yield Row(
        "pytorch_optimizer",
        "ScalableShampoo, RMSProp grafting, averaged momentum, SVD",
        "shampoo-grafting",
        build(
            "ScalableShampoo",
            **shampoo,
            start_preconditioning_step=F,
            graft_type=3,
            diagonal_eps=peers.EPSILON,
            moving_average_for_momentum=True,
            nesterov=False,
            shape_interpretation=False,
            decoupled_weight_decay=True,
            use_svd=True,
        ),
        GraftedShampoo,
        {},
        {"momentum": "after", "correction": False, "start": "epsilon"},
    )


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
