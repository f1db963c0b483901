"""Public implementations of the family on one sequence of gradients, against our references.

    PYTHONPATH=. python benchmarks/implementations.py --meta CHECKOUT --soap CHECKOUT \
        --kl CHECKOUT --emerging CHECKOUT --json results/measured/cpu/implementations.json

with heavyball and pytorch_optimizer installed; what is not named or not installed is left out, and
the output says so. For every implementation: how far it is from our reference after 60 steps, in
shares of the movement; the terms in which it differs, each with how far it would be if that one
alone were ours; and what remains once all terms are theirs. In float64
(:mod:`benchmarks.float64_peers`), a 5 x 4 or 4 x 4 parameter of :mod:`benchmarks.separated`, the
settings of `float64_peers.POINT`, F = 8 where F is a setting (a power of two, because HeavyBall
adds up 1/F). ``--table RECORD`` prints the table of docs/implementations.md from a record.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from algoperf_shampoo.optim import reference
from algoperf_shampoo.optim.reference import Hyperparameters
from algoperf_shampoo.optim.reference_eshampoo import EShampooAblation
from algoperf_shampoo.optim.reference_shampoo import Shampoo
from benchmarks import authors_fixtures as fixtures
from benchmarks import float64_peers as peers
from benchmarks import separated
from benchmarks.composite import KL_SHAMPOO, KL_SOAP, Composite
from benchmarks.other_shampoos import GraftedShampoo, UngraftedShampoo

STEPS, SEED, F = 60, 1, 8


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


def path_of(rule: Any, start: Tensor, gradients: list[Tensor]) -> Tensor:
    W = start
    for G in gradients:
        W = rule.step(W, G)
    return W


def compare(row: Row) -> dict[str, Any]:
    """The figures of one row, in shares of their movement."""
    start = separated.start(row.shape, SEED)
    gradients = list(separated.gradients(row.shape, STEPS, SEED))
    beta1, beta2 = peers.POINT["betas"]
    h = Hyperparameters(
        alpha=peers.POINT["lr"],
        beta1=beta1,
        beta2=beta2,
        epsilon=peers.EPSILON,
        weight_decay=peers.POINT["weight_decay"],
        F=row.F,
        tau=row.tau,
    )
    theirs = list(peers.walk(row.build(), start, gradients))[-1]

    def distance(terms: dict[str, Any]) -> float:
        ours = path_of(row.rule(h, **{**row.base, **terms}), start, gradients)
        return ((ours - theirs).norm() / (theirs - start).norm()).item()

    alone = {
        name: distance({k: v for k, v in row.terms.items() if k != name}) for name in row.terms
    }
    return {
        "source": row.source,
        "name": row.name,
        "variant": row.variant,
        "shape": row.shape,
        "F": row.F,
        "tau": row.tau,
        "from_reference": distance({}),
        "terms": {name: {"theirs": row.terms[name], "alone": alone[name]} for name in row.terms},
        "with_all_terms": distance(row.terms),
    }


REPOSITORIES = {
    "meta": "facebookresearch/optimizers",
    "soap": "nikhilvyas/SOAP",
    "kl": "yorkerlin/KL-Methods",
    "emerging": "NVIDIA-NeMo/Emerging-Optimizers",
    "heavyball": "HeavyBall",
    "pytorch_optimizer": "pytorch_optimizer",
}
WORDS: dict[tuple[str, Any], str] = {
    ("qr_order", "ascending"): "columns ascending",
    ("permute_D", False): "D left when columns are sorted",
    ("ridge", peers.EPSILON): "epsilon on the factor's diagonal",
    ("first", "updates"): "the first step updates",
    ("start", "zero"): "bases start as I",
    ("start", "whole"): "factors start as GG'",
    ("start", "identity"): "factors start as 0.1 I",
    ("start", "epsilon"): "factors start as epsilon I",
    ("statistics", "before"): "statistics before the update",
    ("statistics", "sum"): "a sum, no EMA",
    ("debiased", True): "bias correction of factors",
    ("divided", False): "no 1/d in the factors",
    ("eigenvalues", "refresh"): "eigenvalues of the refresh",
    ("eigenvalues", "each step"): "eigenvalues diag(Q'SQ) of each step",
    ("initial", 1.0): "eigenvalues start at 1",
    ("initial", 0.0): "eigenvalues start at 0",
    ("floor", "at least epsilon"): "eigenvalues at least epsilon, no clamp",
    ("floor", "plus epsilon"): "eigenvalues plus epsilon, no clamp",
    ("exponent", 0.25): "exponent 1/4",
    ("balanced", True): "factors balanced",
    ("due", "calls"): "F counts the first call",
    ("solver", "eigh"): "eigh",
    ("solver", "eigh once"): "eigh at the first step",
    ("columns", "unsorted"): "columns not sorted",
    ("columns", "sorted afterwards"): "columns sorted after QR, D left",
    ("columns", "ascending afterwards"): "columns ascending, D left",
    ("columns", "put back"): "QR in sorted order, columns put back",
    ("lift", "epsilon"): "epsilon on the factor's diagonal",
    ("lift", "relative"): "diagonal lifted before QR",
    ("correction", "moments"): "bias correction of the moments",
    ("correction", False): "no bias corrections",
    ("denominator", "at least epsilon"): "at least epsilon in the denominator",
    ("denominator", "no epsilon"): "no epsilon in the denominator",
    ("decay", "beside"): "weight decay of the W before",
    ("momentum", "none"): "no momentum",
    ("momentum", "after"): "momentum of the grafted update",
    ("momentum", "of gradient and last update"): "momentum mixes gradient and last update",
    ("before_roots", "none"): "no update before the first root",
}
AGREES = 1e-6  # of the movement; terms that matter less are not listed


def table(record: dict[str, Any]) -> str:
    """The rows of a record in Markdown."""
    lines = [
        "| implementation | of | distance | terms, and the distance without each | rest |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        terms = [
            f"{WORDS[name, term['theirs']]} {term['alone']:.2g}"
            for name, term in row["terms"].items()
            if term["alone"] > max(AGREES, 10 * row["with_all_terms"])
        ]
        distance, rest = row["from_reference"], row["with_all_terms"]
        lines.append(
            f"| {REPOSITORIES[row['source']]} {row['name']} | {row['variant']} | "
            + (f"agrees, {distance:.0e} | | |" if distance < AGREES else f"{distance:.2g} | ")
            + ("" if distance < AGREES else f"{'; '.join(terms)} | {rest:.0e} |")
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", help="print the table of this record, and do nothing else")
    checkouts = ("meta", "soap", "kl", "emerging")
    for source in checkouts:
        parser.add_argument(f"--{source}", help="checkout")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--only", default="", help="rows whose source and name contain this")
    arguments = vars(parser.parse_args())
    if arguments["table"]:
        print(table(json.loads(Path(arguments["table"]).read_text())))
        return
    folders = {source: arguments[source] for source in checkouts}
    versions = {s: fixtures.commit(f) for s, f in folders.items() if f}
    for package in ("heavyball", "pytorch_optimizer"):
        if installed(package):
            versions[package] = importlib.metadata.version(package)
    for source in (*checkouts, "heavyball", "pytorch_optimizer"):
        if source not in versions:
            print(f"{source}: left out, not named or not installed")
    out = []
    for row in rows(folders):
        if arguments["only"] not in f"{row.source} {row.name}":
            continue
        figures = compare(row)
        out.append(figures)
        print(f"{row.source:18} {row.name:60} {row.variant:18}", end=" ")
        print(f"{figures['from_reference']:.1e} -> {figures['with_all_terms']:.1e}")
        for name, term in figures["terms"].items():
            print(f"{'':20} {name} = {term['theirs']}: {term['alone']:.1e}")
    if arguments["json"]:
        record = {
            "torch": torch.__version__,
            "versions": versions,
            "point": dict(peers.POINT, epsilon=peers.EPSILON),
            "steps": STEPS,
            "rows": out,
        }
        Path(arguments["json"]).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
