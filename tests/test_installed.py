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


# Run first where the package is installed: packages that an environment without extras lacks are
# not to be found, whatever else the Python at hand has.
WITHOUT_EXTRAS = """
import re, sys
from importlib import metadata

def named(requirement):
    return re.match(r"[\\w.-]+", requirement)[0].lower().replace("_", "-")

needed, pending = set(), ["algoperf-shampoo"]
while pending:
    name = pending.pop()
    if name not in needed:
        needed.add(name)
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another system
            continue
        pending += [named(r) for r in required if "extra ==" not in r]
owners = metadata.packages_distributions()
for top, names in owners.items():
    if not needed & {named(name) for name in names}:
        sys.modules[top] = None
assert sys.modules["pytest"] is None and "torch" not in sys.modules
"""


@pytest.mark.faults
def test_a_package_installed_elsewhere_is_whole(tmp_path: Path) -> None:
    """Not editable, the repository out of sight, no extras: README's loop, and workloads."""
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
            WITHOUT_EXTRAS,
            "import algoperf_shampoo",
            f"assert algoperf_shampoo.__file__.startswith({str(site)!r})",
            SETTING,
            readme_loop(),
            "print(torch.nn.functional.cross_entropy(model(inputs), targets).item())",
            "from algoperf_shampoo.workloads import load",
            "mini, full = load('ogbg_mini'), load('ogbg')",
            "model, _ = mini.init_model_fn([1, 2])",
            "print(mini.step_hint, full.step_hint, full.validation_target_value)",
            "print(mini.eval_model(64, model, None, [1, 2], None, None, 0)['test/num_examples'])",
        ]
    )
    (source / "workloads_config").rename(tmp_path / "elsewhere")
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    loss, hints, count = ran.stdout.splitlines()
    assert float(loss) < 1.0
    assert hints.split()[1:] == ["52000", "0.28098"] and int(count) > 0
