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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from algoperf_shampoo.optim.reference import Hyperparameters
from benchmarks import authors_fixtures as fixtures
from benchmarks import float64_peers as peers
from benchmarks import separated
from benchmarks.implementation_rows import Row, installed, rows

STEPS, SEED = 60, 1


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
