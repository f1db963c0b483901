"""Walks the authors' own code in float64 and records the parameters it arrives at.

    PYTHONPATH=. python benchmarks/authors_fixtures.py \
        --meta CHECKOUT_OF_facebookresearch/optimizers --soap CHECKOUT_OF_nikhilvyas/SOAP \
        --kl CHECKOUT_OF_yorkerlin/KL-Methods

writes tests/optim/authors/{meta,soap,kl}.json: for every case the settings given, the seed of
:mod:`benchmarks.separated`, a sum that shows the gradients are the same again, the parameter
after some of the steps, and how far the same code in float32 ends from it, and from itself with
gradients one rounding away, in shares of the movement. `tests/optim/test_authors.py` holds our
references and the fast optimizer against them.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import float64_peers as peers
from benchmarks import separated

EIGH = "EighEigendecompositionConfig"
QR = "QREigendecompositionConfig"
ROOT = dict(config="RootInvShampooPreconditionerConfig", dtypes=["inv_factor_matrix_dtype"])
KEPT = dict(
    config="EigendecomposedShampooPreconditionerConfig",
    dtypes=["factor_matrix_eigenvectors_dtype", "factor_matrix_eigenvalues_dtype"],
)
CORRECTED = dict(
    config="EigenvalueCorrectedShampooPreconditionerConfig",
    dtypes=["factor_matrix_eigenvectors_dtype", "corrected_eigenvalues_dtype"],
)
SQUARED = dict(ROOT, use_trace_scaling=True, inverse_exponent_override={1: 0.5, 2: 0.5, 3: 0.5})

Case = tuple[str, tuple[int, ...], dict[str, Any], dict[str, Any]]


def eigh(tau: float) -> dict[str, Any]:
    return {"solver": {"class": EIGH, "tolerance": tau}}


def qr(tau: float, iterations: int) -> dict[str, Any]:
    return {"solver": {"class": QR, "tolerance": tau, "max_iterations": iterations}}


def meta_cases() -> Iterator[Case]:
    """Name, shape, settings of theirs, and of the sequence."""
    for shape in [(5, 4), (4, 3, 2), (3,)]:
        yield "shampoo_grafting", shape, dict(ROOT, F=5, grafting=True), {}
        yield "shampoo", shape, dict(ROOT, F=5), {}
        yield "shampoo2_trace", shape, dict(SQUARED, F=5), {}
        yield "eshampoo_fixed", shape, dict(CORRECTED, F=5), {}
        yield "eshampoo_adaptive", shape, dict(CORRECTED, F=5, **eigh(0.1)), {}
        yield "shampoo_adaptive", shape, dict(KEPT, F=5, **eigh(0.1)), {}
    # At F = 1 a factor must have full rank from the first gradient on: square.
    yield "shampoo", (4, 4), dict(ROOT, F=1), {}
    yield "shampoo2_trace", (4, 4), dict(SQUARED, F=1), {}
    yield "eshampoo_fixed", (4, 4), dict(CORRECTED, F=1), {}
    yield "eshampoo_adaptive", (4, 4), dict(CORRECTED, F=1, **eigh(0.1)), {}
    yield "eshampoo_adaptive", (4, 4), dict(CORRECTED, F=1, **eigh(0.3)), {}
    yield "shampoo_adaptive", (4, 4), dict(KEPT, F=1, **eigh(0.3)), {}
    yield "shampoo_adaptive_grafting", (4, 4), dict(KEPT, F=1, grafting=True, **eigh(0.3)), {}
    yield "eshampoo_qr", (4, 4), dict(CORRECTED, F=1, **qr(0.1, 3)), {}
    yield "eshampoo_qr", (5, 4), dict(CORRECTED, F=5, **qr(0.01, 10)), {}
    yield "eshampoo_qr", (4, 3, 2), dict(CORRECTED, F=5, **qr(0.1, 10)), {}


def soap_cases() -> Iterator[Case]:
    for shape in [(4, 4), (5, 4), (3, 4, 2), (5,)]:
        yield "soap", shape, dict(F=10), {}
    yield "soap", (5, 4), dict(F=1), {}
    yield "soap", (6, 4), dict(F=10, max_precond_dim=5), {}
    yield "soap", (2,), dict(F=10, precondition_1d=True), {}


def kl_cases() -> Iterator[Case]:
    for shape in [(4, 4), (5, 4), (3, 4, 2)]:
        for name in ("kl_shampoo", "kl_soap"):
            soap = name == "kl_soap"
            yield name, shape, dict(F=10, using_klsoap=soap), {}
            # Gradients so small that the clamp of the eigenvalues acts.
            yield name, shape, dict(F=10, using_klsoap=soap), {"scale": 0.03}
    yield "kl_shampoo", (5, 4), dict(F=1, using_klsoap=False), {}
    yield "kl_shampoo", (5, 4), dict(F=10, using_klsoap=False, using_clamping=False), {}


SOURCES: dict[str, tuple[str, Callable[..., peers.Build], Callable[[], Iterator[Case]]]] = {
    "meta": ("facebookresearch/optimizers", peers.meta, meta_cases),
    "soap": ("nikhilvyas/SOAP", peers.soap, soap_cases),
    "kl": ("yorkerlin/KL-Methods", peers.kl, kl_cases),
}
STEPS, EVERY = 60, 12
PERTURBED = 6  # times that gradients one rounding away are drawn


def recorded(
    build: peers.Build, start: Tensor, gradients: Iterable[Tensor], lifted: bool = True
) -> list[Tensor]:
    """The parameter after every :data:`EVERY` steps."""
    return list(peers.walk(build, start, gradients, lifted))[EVERY - 1 :: EVERY]


def distance(a: list[Tensor], b: list[Tensor], start: Tensor) -> float:
    """Largest ||a - b|| over ||b - start||, of parameters after the same steps."""
    return max(((x - y).norm() / (y - start).norm()).item() for x, y in zip(a, b, strict=True))


def commit(folder: str) -> str:
    """The checkout's commit, with -dirty where files were changed."""
    run = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()


def record(source: str, folder: str) -> dict[str, Any]:
    """All cases of one source."""
    repository, build, cases = SOURCES[source]
    out: dict[str, Any] = {
        "repository": repository,
        "commit": commit(folder),
        "torch": torch.__version__,
        "point": dict(peers.POINT, epsilon=peers.EPSILON),
        "steps": STEPS,
        "every": EVERY,
        "cases": [],
    }
    for seed, (name, shape, settings, sequence) in enumerate(cases(), start=1):
        gradients = list(separated.gradients(shape, STEPS, seed, **sequence))
        start = separated.start(shape, seed)
        optimizer = functools.partial(build, folder, **settings)
        path = recorded(optimizer(), start, gradients)
        in_float32 = recorded(optimizer(), start, gradients, lifted=False)
        perturbed = [
            recorded(optimizer(), start, separated.neighbours(gradients, k), lifted=False)
            for k in range(PERTURBED)
        ]
        out["cases"].append(
            {
                "name": name,
                "shape": shape,
                "settings": {k: v for k, v in settings.items() if k != "dtypes"},
                "sequence": {"seed": seed, **sequence},
                "sum_of_gradients": torch.stack(gradients).sum().item(),
                "parameters": [w.flatten().tolist() for w in path],
                "float32": distance(in_float32, path, start),
                "float32_perturbed": max(distance(p, in_float32, start) for p in perturbed),
            }
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for source, (repository, _, _) in SOURCES.items():
        parser.add_argument(f"--{source}", help=f"checkout of {repository}")
    parser.add_argument("--out", default="tests/optim/authors")
    arguments = vars(parser.parse_args())
    for source in SOURCES:
        if arguments[source]:
            path = Path(arguments["out"]) / f"{source}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record(source, arguments[source]), indent=1) + "\n")
            print(path)


if __name__ == "__main__":
    main()
