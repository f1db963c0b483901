"""Public optimizers, from checkouts or packages of your own, made to compute in float64.

They are not part of this project: name a checkout's folder, or install a package, and pass the
result to :func:`walk`. Most of them keep state in float32, or cast on the way to a decomposition;
:func:`float64` lifts that while they run, by making torch's default dtype, ``torch.float32`` and
the cast ``float()`` mean float64, and ``torch.compile`` mean no compiling.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

Build = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

# What all are given unless a case says otherwise. The learning rate is a power of two, so that
# keeping it in float32 loses nothing.
POINT: dict[str, Any] = dict(lr=2.0**-7, betas=(0.9, 0.95), weight_decay=0.01)
EPSILON = 1e-8


def _no_compile(fn: Any = None, **_: Any) -> Any:
    return fn if fn is not None else _no_compile


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Within: float32 means float64, and nothing is compiled."""
    patches: list[tuple[Any, str, Any]] = [
        (torch, "float32", torch.float64),
        (torch, "float", torch.float64),
        (torch, "compile", _no_compile),
        (Tensor, "float", lambda x, *_, **__: x.to(torch.float64)),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        torch.set_default_dtype(default)


def load(folder: str, module: str) -> Any:
    """A module of a checkout, imported under :func:`float64`."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    with float64():
        return importlib.import_module(module)


def walk(
    build: Build, start: Tensor, gradients: Iterable[Tensor], lifted: bool = True
) -> Iterator[Tensor]:
    """The parameter after every step, in float64; or as it comes in float32, not ``lifted``."""
    with float64() if lifted else contextlib.nullcontext():
        dtype = torch.float32  # float64 where that is lifted
        parameter = torch.nn.Parameter(start.to(dtype, copy=True))
        optimizer = build([parameter])
        for g in gradients:
            parameter.grad = g.to(dtype, copy=True)
            optimizer.step()
            yield parameter.detach().to(start.dtype, copy=True)


def meta(
    folder: str,
    config: str,
    *,
    F: int,
    solver: dict[str, Any] | None = None,
    grafting: bool = False,
    dtypes: Iterable[str] = (),
    **settings: Any,
) -> Build:
    """DistributedShampoo of facebookresearch/optimizers; tensors are neither merged nor cut.

    Args:
        folder: the checkout.
        config: name of the preconditioner's configuration class.
        F: precondition_frequency.
        solver: {"class": name of the solver's configuration, **its fields}.
        grafting: from Adam, with epsilon :data:`EPSILON`.
        dtypes: names of further dtype fields of the configuration.
        settings: further fields of the configuration.
    """
    module = load(folder, "distributed_shampoo")
    configs = load(folder, "distributed_shampoo.shampoo_types")
    solvers = load(folder, "distributed_shampoo.preconditioner.matrix_functions_types")
    if solver is not None:
        fields = {k: v for k, v in solver.items() if k != "class"}
        settings["amortized_computation_config"] = getattr(solvers, solver["class"])(**fields)

    def build(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        # Here, and not before: within float64() the name torch.float32 means float64.
        precision = {name: torch.float32 for name in ("factor_matrix_dtype", *dtypes)}
        adam = configs.AdamPreconditionerConfig(beta2=POINT["betas"][1], epsilon=EPSILON)
        return module.DistributedShampoo(
            params,
            **POINT,
            epsilon=EPSILON,
            precondition_frequency=F,
            start_preconditioning_step=F,
            grafting_config=adam if grafting else None,
            preconditioner_config=getattr(configs, config)(**settings, **precision),
            distributed_config=configs.SingleDeviceDistributedConfig(
                target_parameter_dimensionality=math.inf
            ),
        )

    return build


def soap(folder: str, *, F: int, **settings: Any) -> Build:
    """SOAP of nikhilvyas/SOAP."""
    module = load(folder, "soap")
    return lambda params: module.SOAP(
        params, **POINT, eps=EPSILON, precondition_frequency=F, **settings
    )


def kl(folder: str, *, F: int, **settings: Any) -> Build:
    """KLOpt of yorkerlin/KL-Methods."""
    module = load(folder, "optim.kl_opt")

    def build(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        with contextlib.redirect_stdout(None):
            return module.KLOpt(
                params,
                **POINT,
                eps=EPSILON,
                precondition_frequency=F,
                cast_dtype=torch.float32,
                **settings,
            )

    return build


def kl_soap_file(folder: str, *, F: int, **settings: Any) -> Build:
    """The SOAP that comes with yorkerlin/KL-Methods."""
    module = load(folder, "optim.soap")

    def build(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        with contextlib.redirect_stdout(None):
            return module.SOAP(
                params,
                **POINT,
                eps=EPSILON,
                precondition_frequency=F,
                cast_dtype=torch.float32,
                **settings,
            )

    return build


def emerging(folder: str, module: str, name: str, **settings: Any) -> Build:
    """A SOAP of NVIDIA-NeMo/Emerging-Optimizers, with the factors' EMA coefficient set to beta2."""
    if sys.version_info < (3, 12):
        # Theirs is written for 3.12: a decorator of typing, and the syntax of generics in the
        # register of names, which has no part in the computation.
        typing.override = lambda method: method  # type: ignore[attr-defined]
        register = types.ModuleType("emerging_optimizers.registry")
        register.register_optimizer = lambda _: lambda cls: cls  # type: ignore[attr-defined]
        sys.modules[register.__name__] = register
    cls = getattr(load(folder, f"emerging_optimizers.{module}"), name)
    beta2 = POINT["betas"][1]
    return lambda params: cls(params, **POINT, eps=EPSILON, shampoo_beta=beta2, **settings)


def heavyball(name: str, *, F: int, **settings: Any) -> Build:
    """An optimizer of the heavyball package, not compiled, tensors not merged."""
    with float64():
        module, utils = (importlib.import_module(m) for m in ("heavyball", "heavyball.utils"))
    utils.compile_mode = None
    cls, beta2 = getattr(module, name), POINT["betas"][1]
    return lambda params: cls(
        params,
        **POINT,
        eps=EPSILON,
        shampoo_beta=beta2,
        precondition_frequency=F,
        merge_dims=False,
        use_precond_schedule=False,
        **settings,
    )


def pytorch_optimizer(name: str, **settings: Any) -> Build:
    """An optimizer of the pytorch_optimizer package; None leaves out a setting of :data:`POINT`."""
    with float64():
        cls = getattr(importlib.import_module("pytorch_optimizer"), name)
    merged = {k: v for k, v in {**POINT, **settings}.items() if v is not None}
    return lambda params: cls(params, **merged)
