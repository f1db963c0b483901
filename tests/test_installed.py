"""What README promises of an installed package, and that an installed one is whole."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SETTING = """
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
inputs = torch.randn(64, 8)
targets = inputs[:, :3].argmax(1)
batches = [(inputs, targets)] * 60
"""


def readme_loop() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## In your own training loop")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    return block


def test_readmes_loop_trains_a_small_model() -> None:
    names: dict = {}
    exec(SETTING, names)
    loss = torch.nn.functional.cross_entropy
    before = loss(names["model"](names["inputs"]), names["targets"]).item()
    exec(readme_loop(), names)
    after = loss(names["model"](names["inputs"]), names["targets"]).item()
    assert after < 0.95 * before
    assert names["optimizer"].state_dict()["state"][0]["step"] == 60


@pytest.mark.slow
def test_a_package_installed_elsewhere_is_whole(tmp_path: Path) -> None:
    """Not editable, and with the repository out of sight: README's loop, and workloads."""
    source, site = tmp_path / "source", tmp_path / "site"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, str(source)], check=True, cwd=tmp_path)
    assert (site / "algoperf_shampoo" / "py.typed").is_file()
    program = "\n".join(
        [
            "import algoperf_shampoo",
            f"assert algoperf_shampoo.__file__.startswith({str(site)!r})",
            "from algoperf_shampoo.workloads import load",
            "assert load('ogbg_mini').step_hint < load('ogbg').step_hint",
            SETTING,
            readme_loop(),
            "print(torch.nn.functional.cross_entropy(model(inputs), targets).item())",
        ]
    )
    (source / "workloads_config").rename(tmp_path / "elsewhere")
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert float(ran.stdout) < 1.0
