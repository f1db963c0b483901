"""The kernels as machine code, without a GPU: they compile, use tensor cores, keep to registers.

Needs Triton (`make test-kernels` installs it), whose compiler and disassembler need no device.
"""

import inspect
import os
import re
import subprocess
from pathlib import Path

import pytest

from algoperf_shampoo.optim.gpu import tiles

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
)

TABLES = {"groups": "*i64", "tiles": "*i32"}
AVERAGE = {"beta": "fp32", "weight": "fp32"}
PRODUCT_ALIGNED = dict(A_ROWS=False, BETWEEN=False, ALIGN_M=4, ALIGN_N=4, ALIGN_K=4)
# kernel, its arguments besides tables, compile-time settings, tile, whether tensor cores are used
CASES = [
    *(
        ("product", {}, dict(PRODUCT_ALIGNED, B_ROWS=rows, SPLIT=split), tile, True)
        for rows in (False, True)
        for split, tile in (
            (True, tiles.LARGE),
            (True, tiles.SMALL),
            (False, tiles.LARGE_ROUNDED),
        )
    ),
    (
        "product",
        {},
        dict(PRODUCT_ALIGNED, A_ROWS=True, B_ROWS=True, SPLIT=True),
        tiles.LARGE,
        True,
    ),
    *(
        ("product", {}, dict(PRODUCT_ALIGNED, A_ROWS=True, B_ROWS=False, SPLIT=split), tile, True)
        for split, tile in ((True, tiles.LARGE), (False, tiles.LARGE_ROUNDED))
    ),
    (
        "product",
        {},
        dict(PRODUCT_ALIGNED, BETWEEN=True, B_ROWS=False, SPLIT=True),
        tiles.SMALL,
        True,
    ),
    (
        "product",
        {},
        dict(PRODUCT_ALIGNED, B_ROWS=False, SPLIT=True, ALIGN_N=1, ALIGN_K=1),
        tiles.NARROW,
        True,
    ),
    *(
        (
            "gram",
            {"partial_ptr": "*fp32", **AVERAGE},
            dict(
                COLUMNS=columns,
                IN_PIECES=False,
                MEAN=scaled,
                SCALED=scaled,
                ALIGN_D=4,
                ALIGN_K=1 if columns else 4,
            ),
            tiles.GRAM,
            True,
        )
        for columns in (False, True)
        for scaled in (False, True)
    ),
    ("inverse_sqrts", {}, dict(SIZE=tiles.ENTRIES, ALIGN=4), {}, False),
    ("scales", {}, dict(ORDER=2, SIZE=tiles.ENTRIES, ALIGN=4), {}, False),
    *(
        ("squares", {"partial_ptr": "*fp32"}, dict(WHERE=where, ALIGN=4), tiles.SQUARES, False)
        for where in (0, 1, 2)
    ),
    (
        "eigenvalues",
        {"partial_ptr": "*fp32", "beta": "fp32", "rest": "fp32"},
        dict(BN=tiles.SQUARES["BN"]),
        {},
        False,
    ),
    *(
        (
            "momentum",
            {"rest1": "fp32", "eps": "fp32"},
            dict(ORDER=order, LEARNS=learns, SIZE=tiles.ENTRIES, ALIGN=4),
            {},
            False,
        )
        for order, learns in ((2, True), (3, True), (4, True), (0, False))
    ),
    ("outer", AVERAGE, dict(ALIGN_D=4), tiles.OUTER, False),
    ("matvec", {}, dict(B_ROWS=True, ALIGN_K=4), tiles.VECTOR, False),
    ("row_absmax", {}, dict(SIZE=tiles.ENTRIES, ALIGN=4), {}, False),
    ("limits", dict.fromkeys(("first", "second"), "fp32"), dict(SIZE=128), {}, False),
    (
        "adam",
        dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "eps"), "fp32"),
        dict(NADAM=True, SIZE=tiles.ENTRIES, ALIGN=4),
        {},
        False,
    ),
]


def compiled(name, arguments, settings, tile, capability, tables=TABLES):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from algoperf_shampoo.optim.gpu import kernels, mode_kernels

    tile = dict(tile)
    options = {k: tile.pop(k) for k in ("num_warps", "num_stages") if k in tile}
    constants = {**settings, **tile}
    signature = {**tables, **arguments}
    kernel = getattr(kernels if hasattr(kernels, name) else mode_kernels, name)
    if "constants" in inspect.signature(ASTSource.__init__).parameters:  # up to Triton 3.1
        source = ASTSource(fn=kernel, signature=signature, constants=constants)
    else:
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


def stack_bytes(kernel, folder):
    """Local memory a thread uses: registers that were spilled."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [str(tools / "cuobjdump"), "-res-usage", str(cubin)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"STACK:(\d+)", printed)
    return int(found)


ADDRESSES = {"addresses": "*i64", "pieces": "*i64", "tiles": "*i64", "buffer": "*fp32"}
COUNTS = dict.fromkeys(
    ("first", "row_of", "row_absmax", "bad_rows", "bad_params", "counts"), "*i32"
)
WITHOUT_TABLES = {
    "gather": ({**ADDRESSES, "row_absmax": "*i32"}, dict(SIZE=4096, MEASURE=True)),
    "scatter": (
        {**ADDRESSES, "lr_ptr": "*fp32", "weight_decay": "fp32", "bad": "*i32"},
        dict(SIZE=4096),
    ),
    "judge": ({**COUNTS, "count": "i32", "bound": "i32"}, {}),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", WITHOUT_TABLES)
def test_machine_code_without_tables(name, capability, tmp_path):
    arguments, settings = WITHOUT_TABLES[name]
    kernel = compiled(name, arguments, settings, {}, capability, tables={})
    assert "mma" not in kernel.asm["ptx"]
    assert stack_bytes(kernel, tmp_path) == 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("name", "arguments", "settings", "tile", "multiplies"),
    CASES,
    ids=[f"{c[0]}{i}" for i, c in enumerate(CASES)],
)
def test_machine_code(name, arguments, settings, tile, multiplies, capability, tmp_path):
    kernel = compiled(name, arguments, settings, tile, capability)
    ptx = kernel.asm["ptx"]
    if multiplies:
        assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in ptx
    else:
        assert "mma" not in ptx
    # The one exception, on an A100: 64 bytes, in what moves moments out of a basis.
    moves_back = settings.get("A_ROWS") and settings["B_ROWS"]
    assert stack_bytes(kernel, tmp_path) <= (64 if moves_back and capability == 80 else 0)
    # Rows said to be aligned are written 16 bytes at a time.
    aligned = settings.get("ALIGN_N", 4) == 4 and not settings.get("BETWEEN")
    if name in ("product", "adam", "momentum") and aligned:
        assert re.search(r"st\.global\S*\.v4", ptx)
