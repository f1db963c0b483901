"""An exported submission: complete, without this package, the same optimizer."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import standalone, submission_loader
from algoperf_shampoo.study import export

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = submission_loader.variants(ROOT)

# Trains a small net and prints its parameters; {module} is where the functions come from.
TRAIN = """
import collections, importlib, json, sys, types
import torch
s = importlib.import_module("{module}")
point = json.load(open(sys.argv[1]))[0]
if point is not None:
    if "precondition_frequency" in point: point["precondition_frequency"] = 2
    point = collections.namedtuple("Hyperparameters", point)(**point)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
x, y = torch.randn(32, 6), torch.randn(32, 4)
def model_fn(params, augmented_and_preprocessed_input_batch, model_state, mode, rng,
             update_batch_norm, dropout_rate=0.1):
    return params(augmented_and_preprocessed_input_batch["inputs"]), None
def loss_fn(label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
    loss = (logits_batch - label_batch).square().mean(1)
    return dict(summed=loss.sum(), n_valid_examples=torch.tensor(len(loss)), per_example=loss)
w = types.SimpleNamespace(step_hint=50, model_fn=model_fn, loss_fn=loss_fn, metrics_logger=None)
state = s.init_optimizer_state(w, model, None, point, None)
queue = iter([dict(inputs=x, targets=y)] * 9)
for step in range(5):
    batch = s.data_selection(w, queue, state, model, None, point, step, None)
    state, model, _ = s.update_params(
        workload=w, current_param_container=model, current_params_types=None, model_state=None,
        hyperparameters=point, batch=batch, loss_type=None, optimizer_state=state,
        eval_results=[], global_step=step, rng=None)
assert not any(name.split(".")[0] == "algoperf_shampoo" for name in sys.modules) or {package}
print(json.dumps([p.tolist() for p in model.parameters()]))
"""


def started(
    module: str, folder: Path, space: Path, package: bool
) -> subprocess.CompletedProcess[str]:
    code = TRAIN.format(module=module, package=package)
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, str(space)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def parameters(module: str, folder: Path, space: Path, package: bool) -> list:
    done = started(module, folder, space, package)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_import_of_the_package_is_left(variant: str, tmp_path: Path) -> None:
    folder = export.export(ROOT, variant.replace("_", "-"), tmp_path)
    assert folder == tmp_path / "external_tuning" / variant
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
            assert not any(name.split(".")[0] == standalone.PACKAGE for name in names), path
    for name in ("tuning_search_space.json", "submission_info.yml", "LICENSE", "__init__.py"):
        assert (folder / name).is_file()
    assert not (folder / standalone.COPIES / "workloads").exists()


def test_the_same_steps_as_in_the_package(tmp_path: Path) -> None:
    variant = "eshampoo_adaptive"
    folder = export.export(ROOT, variant, tmp_path / "somewhere")
    space = folder / "tuning_search_space.json"
    ours = parameters(f"submissions.{variant}.submission", ROOT, space, package=True)
    inside = f"somewhere.external_tuning.{variant}.submission"
    assert parameters(inside, tmp_path, space, package=False) == ours
    assert parameters("submission", folder, space, package=False) == ours


def test_settings_are_in_the_points_and_the_name(tmp_path: Path) -> None:
    words = "learning_rate=1e-05 one_dim=adam"
    folder = export.export(ROOT, "eshampoo_adaptive", tmp_path, f="20", settings=words)
    assert folder.name == "eshampoo_adaptive_f20_lr1e_05_1dadam" and folder.name.isidentifier()
    [point] = json.loads((folder / "tuning_search_space.json").read_text())
    [own] = json.loads((ROOT / "search_spaces" / "eshampoo_adaptive.json").read_text())
    changes = {"precondition_frequency": 20, "learning_rate": 1e-5, "one_dim": "adam"}
    assert point == {**own, **changes}
    assert json.loads((folder / export.RECORD).read_text())["settings"] == changes
    with pytest.raises(UserError, match="TAU=0.1: tau is a field that this variant does not read"):
        export.export(ROOT, "eshampoo_fixed", tmp_path, tau="0.1")
    with pytest.raises(UserError, match="no such search space file"):
        export.export(ROOT, "eshampoo_fixed", tmp_path, search_space=tmp_path / "none.json")


def point_built_in(folder: Path) -> dict:
    tree = ast.parse((folder / "submission.py").read_text())
    [value] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "POINT"
    ]
    return ast.literal_eval(value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_self_tuning_export_has_its_point_built_in(variant: str, tmp_path: Path) -> None:
    folder = export.export(ROOT, variant, tmp_path, ruleset="self", settings="weight_decay=0.01")
    assert folder == tmp_path / "self_tuning" / f"{variant}_wd0_01"
    assert not (folder / "tuning_search_space.json").exists()
    assert 'ruleset: "self-tuning"' in (folder / export.INFO).read_text()
    [own] = json.loads((ROOT / "search_spaces" / f"{variant}.json").read_text())
    assert point_built_in(folder) == {**own, "weight_decay": 0.01}
    record = json.loads((folder / export.RECORD).read_text())
    assert record["point"] == point_built_in(folder) and record["ruleset"] == "self"


def test_a_self_tuning_export_takes_the_same_steps_as_the_external_one(tmp_path: Path) -> None:
    words = {"settings": "weight_decay=0.01 use_nadam=false", "f": "2"}
    theirs = export.export(ROOT, "eshampoo_fixed", tmp_path, **words)
    ours = export.export(ROOT, "eshampoo_fixed", tmp_path, ruleset="self", **words)
    none = tmp_path / "none.json"
    none.write_text("[null]")  # what AlgoPerf hands over: nothing
    space = theirs / "tuning_search_space.json"
    external = parameters("submission", theirs, space, package=False)
    assert parameters("submission", ours, none, package=False) == external


def test_one_point_is_built_in_and_the_text_survives_the_workflows(tmp_path: Path) -> None:
    space = tmp_path / "space.json"
    [own] = json.loads((ROOT / "search_spaces" / "nadamw.json").read_text())
    for content, named in (
        ([own, own], "2 points"),
        ({k: {"feasible_points": [v]} for k, v in own.items()}, "ranges"),
    ):
        space.write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"{named}: RULESET=self builds in the one point"):
            export.export(ROOT, "nadamw", tmp_path, search_space=space, ruleset="self")
    with pytest.raises(UserError, match="RULESET=both: there is external, self"):
        export.export(ROOT, "nadamw", tmp_path, ruleset="both")
    for text in ("A # B", "$HOME", "`x`", "a\x07"):
        with pytest.raises(UserError, match="would not survive"):
            export.export(ROOT, "nadamw", tmp_path, authors=text)
    assert not (tmp_path / "external_tuning").exists()
    folder = export.export(ROOT, "nadamw", tmp_path, authors='Zoë  "Z"\nMüller')
    assert 'authors: "Zoë \\"Z\\" Müller"' in (folder / export.INFO).read_text()


def test_a_bad_point_is_one_value_error_of_the_exported_submission(tmp_path: Path) -> None:
    folder = export.export(ROOT, "nadamw", tmp_path)
    space = tmp_path / "space.json"
    [point] = json.loads((folder / "tuning_search_space.json").read_text())
    space.write_text(json.dumps([{**point, "use_nadam": "no"}]))
    done = started("submission", folder, space, package=False)
    assert done.returncode == 1
    error = 'PointError: use_nadam is "no": it must be true or false'
    assert done.stderr.splitlines()[-1].endswith(error)
    assert "in init_optimizer_state" in done.stderr


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    folder = export.export(ROOT, "nadamw", tmp_path)
    (folder / "old.py").write_text("")
    export.export(ROOT, "nadamw", tmp_path, authors="A. Author")
    assert not (folder / "old.py").exists()
    assert 'authors: "A. Author"' in (folder / "submission_info.yml").read_text()
    (folder / export.RECORD).unlink()
    with pytest.raises(UserError, match="is not an export"):
        export.export(ROOT, "nadamw", tmp_path)
    with pytest.raises(UserError, match="unknown variant"):
        export.export(ROOT, "nadam", tmp_path)


def test_modules_are_found_through_functions_and_parents(tmp_path: Path) -> None:
    files = {
        "__init__.py": "",
        "a.py": "def f():\n    from .b.c import x\n",
        "b/__init__.py": "",
        "b/c.py": "from ..d import y\nfrom algoperf_shampoo.e import z\n",
        "d.py": "",
        "e.py": "",
        "unused.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert standalone.modules_needed(tmp_path, ["a"]) == ["a", "b", "b.c", "d", "e"]
    assert standalone._relative(files["b/c.py"], Path("b/c.py")).endswith("from ..e import z\n")
