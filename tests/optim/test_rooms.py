"""Imports inside optim run one way, from the algorithms down to the blocks; nothing upward.

Every import statement counts, those inside functions and under TYPE_CHECKING too.
"""

from pathlib import Path

import pytest

from benchmarks import step_path

from ..test_arrows import imports

OPTIM = Path(__file__).resolve().parents[2] / "algoperf_shampoo" / "optim"
PREFIX = "algoperf_shampoo.optim"

# From the bottom up. A name with a dot is that module, else the module or all of the package. A
# module that is in no room is an algorithm: a new rule stands on top by itself.
ROOMS = {
    "references": "reference reference_eshampoo reference_ideal reference_kl reference_shampoo "
    "reference_soap",
    "books": "journal replicas",
    "device code": "gpu gpu.kernels gpu.mode_kernels gpu.tiles gpu.transfer",
    "blocks": "blocks",
    "gradients": "nonfinite",
    "operations": "ops noise",
    "criterion": "criterion",
    "telemetry": "telemetry",
    "decompositions": "eigen",
    "rule": "rule",
    "refresh": "refresh",
    "operations on a GPU": "gpu.launches gpu.mode_launches gpu.triton_ops gpu.graphs",
    "options": "settings options",
    "sharing": "sharding",
    "optimizer": "group step saving reports optimizer",
}
ORDER = [*ROOMS, "algorithms"]
EXACT = {"gpu"}  # the package itself: what is inside has rooms of its own


def room_of(module: str) -> str:
    """The room of a dotted name below optim; what follows a module's name is something in it."""
    best, found = "", "algorithms"
    for room, names in ROOMS.items():
        for name in names.split():
            inside = module == name or module.startswith(name + ".")
            if name in EXACT and module.count(".") and module in NAMES:
                inside = False
            if inside and len(name) > len(best):
                best, found = name, room
    return found


MODULES = sorted(p for p in OPTIM.rglob("*.py") if p != OPTIM / "__init__.py")
NAMES = {
    ".".join(p.relative_to(OPTIM).with_suffix("").parts).removesuffix(".__init__") for p in MODULES
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(OPTIM).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_import_goes_up(path):
    here = room_of(name_of(path))
    upward = []
    for name, _ in imports(path):
        if name.startswith(PREFIX + "."):
            there = room_of(name.removeprefix(PREFIX + "."))
            if ORDER.index(there) > ORDER.index(here):
                upward.append(f"{name} ({there})")
        else:
            assert name != PREFIX, "optim/__init__.py has all algorithms"
    assert not upward, f"{name_of(path)} ({here}) imports {', '.join(upward)}"


def test_all_rooms_are_there_and_a_new_rule_is_an_algorithm():
    for names in ROOMS.values():
        for name in names.split():
            assert name in NAMES, name
    assert room_of("eshampoo") == room_of("a_rule_of_tomorrow") == "algorithms"
    assert room_of("gpu.triton_kernels") == room_of("gpu.kernels.adam") == "device code"
    assert room_of("gpu.triton_ops.TritonOperations") == "operations on a GPU"


def test_an_import_upward_is_found(tmp_path):
    """The check sees relative imports, late ones and those for types."""
    module = tmp_path / "algoperf_shampoo" / "optim" / "blocks" / "layout.py"
    module.parent.mkdir(parents=True)
    module.write_text("def f():\n    from ..gpu import graphs\n    from .. import refresh\n")
    found = {name for name, _ in imports(module, tmp_path)}
    assert {"algoperf_shampoo.optim.gpu.graphs", "algoperf_shampoo.optim.refresh"} <= found


def test_an_ordinary_step_travels_six_files():
    found = step_path.ordinary_step()
    step = [name for name in found if name not in step_path.POLICIES]
    assert "eshampoo.py" in step and "optimizer.py" in step
    assert len(step) <= 6, step
    assert all(step_path.lines(name) <= 500 for name in found)
