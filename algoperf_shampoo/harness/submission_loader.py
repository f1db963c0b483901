"""Load ``submissions/<variant>/submission.py`` and hold it to AlgoPerf's contract."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from algoperf_shampoo import batch_sizes, points
from algoperf_shampoo.errors import UserError

# Arguments the harness passes: by keyword to the first two, by position to the rest.
_UPDATE = (
    "workload current_param_container current_params_types model_state hyperparameters batch "
    "loss_type optimizer_state eval_results global_step rng"
).split()
_PREPARE = [name for name in _UPDATE if name != "batch"]
_INIT = "workload model_params model_state hyperparameters rng".split()
_SELECT = (
    "workload input_queue optimizer_state current_param_container model_state hyperparameters "
    "global_step rng"
).split()


@dataclass(frozen=True)
class Submission:
    """The functions of one submission module, as AlgoPerf calls them."""

    path: Path
    get_batch_size: Callable[[str], int]
    init_optimizer_state: Callable[..., dict[str, Any]]
    update_params: Callable[..., tuple[dict[str, Any], Any, Any]]
    data_selection: Callable[..., dict[str, Any]]
    prepare_for_eval: Callable[..., tuple[dict[str, Any], Any, Any]] | None
    needs_train_state: bool
    get_eval_batch_size: Callable[[str], int] | None

    def batch_size(self, workload_name: str) -> int:
        """Global batch size; a variant of a workload falls back to its base, as in AlgoPerf."""
        try:
            return self.get_batch_size(workload_name)
        except ValueError:
            return self.get_batch_size(workload_name.removesuffix("_mini"))


def variants(root: Path) -> list[str]:
    """Names of the folders in ``root/submissions`` that hold a ``submission.py``."""
    return sorted(path.parent.name for path in (root / "submissions").glob("*/submission.py"))


def fields(root: Path, variant: str) -> tuple[str, ...]:
    """What the variant's module says it reads of a point: its ``FIELDS``, groups or single fields.

    Read without importing it, which would import torch.

    Raises:
        UserError: no such variant, no module of Python, no ``FIELDS``, or an undeclared name in it.
    """
    path, tree = _parsed(root, variant)
    wanted = 'FIELDS = "factors", "tau": what it reads, as declared in algoperf_shampoo/points.py'
    values = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id == "FIELDS" for t in node.targets)
    ]
    if not values:
        raise UserError(f"{path}: lacks {wanted}")
    try:
        names = ast.literal_eval(values[-1])
    except ValueError:
        names = None
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: FIELDS is no tuple of strings; right is {wanted}")
    try:
        points.fields(names)
    except points.PointError as error:
        raise UserError(f"{path}: FIELDS: {error}") from error
    return names


@dataclass(frozen=True)
class Optimizer:
    """What a variant's module makes: the name of a class, and arguments that are written out."""

    name: str
    settings: Mapping[str, Any]


def optimizer(root: Path, variant: str) -> Optimizer | None:
    """The class of :mod:`algoperf_shampoo.optim` that the variant's module calls; None where it
    calls none, or several. Read without importing it, as :func:`fields`.

    Raises:
        UserError: no such variant, or no module of Python.
    """
    _, tree = _parsed(root, variant)
    ours = {
        alias.asname or alias.name: alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module == "algoperf_shampoo.optim"
        for alias in node.names
    }
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    made = [
        Optimizer(
            ours[node.func.id],
            {
                keyword.arg: keyword.value.value
                for keyword in node.keywords
                if keyword.arg is not None and isinstance(keyword.value, ast.Constant)
            },
        )
        for function in functions
        if function.name == "make_optimizer"
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ours
    ]
    optimizers = [one for one in made if one.name != "Solver"]
    return optimizers[0] if len(optimizers) == 1 else None


def load(root: Path, variant: str) -> Submission:
    """Import the variant's module by path and check its functions.

    Raises:
        UserError: no such variant, or a function is missing or takes other arguments.
    """
    return from_module(import_module(root, variant), _path(root, variant))


def batch_size(root: Path, variant: str, workload: str) -> int:
    """The variant's global batch size for a workload of ours, full or mini.

    Where there is no torch to import the variant with, that of the table which the variants share.

    Raises:
        UserError: see :func:`load`.
        ValueError: no batch size is known.
    """
    if importlib.util.find_spec("torch") is None:
        return batch_sizes.of(workload)
    return load(root, variant).batch_size(workload)


def from_module(module: ModuleType | Any, path: Path) -> Submission:
    """The submission in ``module``; ``path`` is named in messages and in the run record."""
    get_batch_size = _function(module, path, "get_batch_size", ["workload_name"], keywords=False)
    update_params = _function(module, path, "update_params", _UPDATE, keywords=True)
    assert get_batch_size and update_params
    return Submission(
        path=path,
        get_batch_size=get_batch_size,
        init_optimizer_state=_required(module, path, "init_optimizer_state", _INIT),
        update_params=update_params,
        data_selection=_required(module, path, "data_selection", _SELECT),
        prepare_for_eval=_function(
            module, path, "prepare_for_eval", _PREPARE, keywords=True, optional=True
        ),
        needs_train_state="train_state" in inspect.signature(update_params).parameters,
        get_eval_batch_size=_function(
            module, path, "get_eval_batch_size", ["workload_name"], keywords=False, optional=True
        ),
    )


def _path(root: Path, variant: str) -> Path:
    path = root / "submissions" / variant / "submission.py"
    if not path.is_file():
        known = ", ".join(variants(root)) or "none"
        raise UserError(f"unknown variant {variant!r}: submissions/ has {known}")
    return path


def _parsed(root: Path, variant: str) -> tuple[Path, ast.Module]:
    path = _path(root, variant)
    try:
        return path, ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a Python module: {error}") from error


def import_module(root: Path, variant: str) -> ModuleType:
    """The variant's module, imported anew by path.

    Raises:
        UserError: no such variant, or its file cannot be imported.
    """
    path = _path(root, variant)
    spec = importlib.util.spec_from_file_location(f"submissions.{variant}.submission", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: cannot be imported as a Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _required(module: Any, path: Path, name: str, arguments: list[str]) -> Callable[..., Any]:
    function = _function(module, path, name, arguments, keywords=False)
    assert function is not None
    return function


def _function(
    module: Any,
    path: Path,
    name: str,
    arguments: list[str],
    *,
    keywords: bool,
    optional: bool = False,
) -> Callable[..., Any] | None:
    function = getattr(module, name, None)
    if function is None and optional:
        return None
    if not callable(function):
        raise UserError(f"{path}: no function {name}, which AlgoPerf's contract asks for")
    signature = inspect.signature(function)
    try:
        if keywords:
            offered = dict.fromkeys(arguments)
            if name == "update_params" and "train_state" in signature.parameters:
                offered["train_state"] = None
            signature.bind(**offered)
        else:
            signature.bind(*arguments)
    except TypeError as error:
        how = "keywords" if keywords else "positions"
        raise UserError(
            f"{path}: {name}{signature} {error}; the contract passes {', '.join(arguments)} "
            f"by {how}"
        ) from error
    return function
