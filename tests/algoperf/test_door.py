"""Commands of the runner: which flags, which processes, and what is refused before launch."""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import gpus
from algoperf_shampoo.harness.algoperf import console, data_check, door, env, folder, minidata
from algoperf_shampoo.harness.algoperf.command import OWN_RUNNER, WORKER
from algoperf_shampoo.study.plan import make_plan
from tests.contract import record

ROOT = Path(__file__).resolve().parents[2]
FLAGS = json.loads(record.PATH.read_text(encoding="utf-8"))["flags"]


def environment(gpus: int = 0, **changes: Any) -> env.Environment:
    facts: dict[str, Any] = {
        "executable": "/venv/bin/python",
        "python": "3.11.2",
        "torch": "2.13.0",
        "cuda": "13.0",
        "algoperf": "0.6",
        "algoperf_commit": env.COMMIT,
        "missing": (),
        "gpus": ("H200",) * gpus,
        "wandb": True,
        "psutil_knows_machine": True,
        "checkpoints": {},
    }
    return env.Environment(**{**facts, **changes})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder that looks like AlgoPerf's data, with the manifest of a mini data set."""
    root = tmp_path / "data"
    for path in (
        "fastmri/knee_singlecoil_train",
        "imagenet/pytorch/train",
        "imagenet/pytorch/imagenet_v2/matched-frequency",
        "ogbg/ogbg_molpcba",
    ):
        (root / path).mkdir(parents=True)
    entry = {
        "folder": "ogbg",
        "global_batch_size": 64,
        "max_global_steps": 60,
        "on_disk": {"train": 3},
        "properties": {name: 8 for name in minidata._PROPERTIES},
    }
    (root / minidata.MANIFEST).write_text(json.dumps({"workloads": {"ogbg": entry}}))
    return root


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The door with an environment of our choosing and data that passes its check."""
    state: dict[str, Any] = {"environment": environment(gpus=2)}
    monkeypatch.setattr(env, "look", lambda root, checkpoints=(): state["environment"])
    monkeypatch.setattr(gpus, "_driver", lambda: {})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    real = door.find_data
    monkeypatch.setattr(door, "find_data", lambda p, w, e, check: real(p, w, e, check=False))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return state


def plan(data: Path | None, tmp_path: Path, **words: Any) -> Any:
    words = {"workload": "ogbg", "size": "full", "seeds": "3", **words}
    return make_plan(
        ROOT,
        ["eshampoo_adaptive"],
        harness="algoperf",
        data_dir=str(data) if data else None,
        out=str(tmp_path / "out"),
        dry_run=words.pop("dry_run", True),
        **words,
    )


def commands(plan: Any, flags: dict[str, Any] | None = None) -> list[str]:
    lines: list[str] = []
    assert door.launch(plan, flags or {}, echo=lines.append) == 0
    return [line for line in lines if not line.startswith("#")]


def flags_of(command: str) -> dict[str, str]:
    words = [word for word in command.split() if word.startswith("--")]
    pairs = [word.removeprefix("--").partition("=") for word in words]
    return {name: value for name, _, value in pairs}


def test_every_flag_is_the_runners_own(
    data: Path, tmp_path: Path, fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    lines = commands(plan(data, tmp_path, workload="all"), {"steps": "7", "wandb": True})
    torchrun = {"standalone", "nnodes", "nproc_per_node"}
    for line in lines:
        own = set(flags_of(line)) - torchrun
        assert own <= set(FLAGS) | {f"no{name}" for name, kind in FLAGS.items() if kind == "bool"}


def test_each_seed_has_its_own_seed_and_study(
    data: Path, tmp_path: Path, fake: dict[str, Any]
) -> None:
    found = [flags_of(line) for line in commands(plan(data, tmp_path, f="20", tau="0.05"))]
    assert [f["rng_seed"] for f in found] == ["1", "2", "3"]
    assert [f["experiment_name"] for f in found] == ["study_1", "study_2", "study_3"]
    assert {Path(f["experiment_dir"]).name for f in found} == {"eshampoo_adaptive_F20_tau0.05"}


def test_self_tuning_runs_a_copy_with_the_point_built_in(
    data: Path, tmp_path: Path, fake: dict[str, Any]
) -> None:
    made = plan(data, tmp_path, ruleset="self", settings="learning_rate=0.002", seeds="7,")
    [line] = commands(made)
    found = flags_of(line)
    assert found["tuning_ruleset"] == "self" and "tuning_search_space" not in found
    assert set(found) & {"num_tuning_trials", "hparam_start_index"} == set()
    [run] = made.runs
    assert run.label == "eshampoo_adaptive_lr0.002_self" and run.ruleset == "self"
    assert not run.run_dir.exists()
    folder.prepare(run, folder.State(run.run_dir, None, ()), [run.hparams])
    door._write_entry(made, run)
    assert not (run.run_dir / folder.SEARCH_SPACE).exists()
    assert f"PYTHONPATH={run.run_dir / folder.ENTRY}:" in line
    text = (run.run_dir / folder.ENTRY / found["submission_path"]).read_text()
    assert '"learning_rate": 0.002' in text and "built_in=POINT" in text
    assert json.loads((run.run_dir / "hparams.json").read_text()) == run.hparams
    for words, named in (
        ({"trials": "2"}, "RULESET=self: one point is built in; TRIALS=2"),
        ({"ruleset": "both"}, "RULESET=both: there is external, self"),
    ):
        with pytest.raises(UserError, match=named):
            plan(data, tmp_path, **{"ruleset": "self", **words})


def test_the_point_is_in_the_folder_before_any_process_looks_for_it(
    data: Path, tmp_path: Path, fake: dict[str, Any]
) -> None:
    # AlgoPerf's rank 0 writes hparams.json in place while the other ranks read it if it is there.
    [run] = plan(data, tmp_path, seeds="7,").runs
    place = run.run_dir / folder.HPARAMS
    folder.prepare(run, folder.State(run.run_dir, None, ()), [run.hparams])
    assert json.loads(place.read_text()) == run.hparams
    theirs = json.dumps(run.hparams, indent=2)  # as the runner writes it: left as it is
    place.write_text(theirs)
    folder.prepare(run, folder.State(run.run_dir, None, ()), [run.hparams])
    assert place.read_text() == theirs
    place.write_text(theirs[:40])  # cut short
    assert folder.prepare(run, folder.State(run.run_dir, None, ()), [run.hparams])
    assert json.loads(place.read_text()) == run.hparams


def test_the_prompt_and_the_removal_cannot_come_up(
    data: Path, tmp_path: Path, fake: dict[str, Any]
) -> None:
    for line in commands(plan(data, tmp_path, workload="all")):
        assert "resume_last_run" in flags_of(line)
        assert "overwrite" not in flags_of(line)


def test_torchrun_and_visible_gpus(data: Path, tmp_path: Path, fake: dict[str, Any]) -> None:
    one, two = (commands(plan(data, tmp_path, gpus=n, seeds="1"))[0] for n in ("1", "2"))
    assert "torch.distributed.run" not in one and "CUDA_VISIBLE_DEVICES=0 " in one
    assert "--nproc_per_node=2" in two and "CUDA_VISIBLE_DEVICES=0,1 " in two
    assert all(f"-m {WORKER} submission_runner " in line for line in (one, two))


def test_gpus_given_by_a_scheduler_are_kept(
    data: Path, tmp_path: Path, fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert "CUDA_VISIBLE_DEVICES=5 " in commands(plan(data, tmp_path, gpus="1"))[0]


def test_cpu_goes_through_our_runner(data: Path, tmp_path: Path, fake: dict[str, Any]) -> None:
    fake["environment"] = environment(gpus=0)
    line = commands(plan(data, tmp_path), {"processes": "2"})[0]
    assert f"-m {WORKER} {OWN_RUNNER} " in line and "--nproc_per_node=2" in line
    assert "notorch_compile" in flags_of(line)


def test_batch_sizes_are_checked_without_torch_too(
    data: Path, tmp_path: Path, fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="GPUS=3: ogbg: the global batch size, 512, is not a mul"):
        commands(plan(data, tmp_path, gpus="3"))
    assert len(commands(plan(data, tmp_path, gpus="4"))) == 4  # a note, and a command a seed


def test_a_version_goes_through_our_runner_and_previews_its_budget(
    data: Path, tmp_path: Path, fake: dict[str, Any]
) -> None:
    line = commands(plan(data, tmp_path, gpus="2", version="2026"))[0]
    assert f"-m {WORKER} {OWN_RUNNER} " in line
    assert "SHAMPOO_ALGOPERF_VERSION=2026 " in line and "CUDA_VISIBLE_DEVICES=0,1 " in line
    assert Path(flags_of(line)["experiment_dir"]).name == "eshampoo_adaptive_2026"
    assert "VERSION" not in commands(plan(data, tmp_path, gpus="2"))[0]


def test_mini_data_runs_under_its_own_name(
    data: Path, tmp_path: Path, fake: dict[str, Any]
) -> None:
    found = flags_of(commands(plan(data, tmp_path, size="mini"))[0])
    assert found["workload"] == "ogbg_minidata"
    assert found["max_global_steps"] == "60"


def test_points_of_the_search_space_are_run_one_by_one(
    data: Path, tmp_path: Path, fake: dict[str, Any]
) -> None:
    space = tmp_path / "space.json"
    point = json.loads((ROOT / "search_spaces" / "eshampoo_adaptive.json").read_text())[0]
    space.write_text(json.dumps([point, {**point, "tau": 0.2}]))
    asked = plan(data, tmp_path, seeds="1", trials="2", search_space=str(space))
    found = [flags_of(line) for line in commands(asked)]
    indices = [(f["hparam_start_index"], f["hparam_end_index"]) for f in found]
    assert indices == [("0", "1"), ("1", "2")]
    assert [f["num_tuning_trials"] for f in found] == ["1", "2"]
    assert [p["tau"] for p in door._points(asked, asked.runs[1])] == [0.1, 0.2]


def test_wandb_resumes_the_same_record(
    data: Path, tmp_path: Path, fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")  # the record is written when the run has ended
    assert "use_wandb" not in flags_of(commands(plan(data, tmp_path), {"wandb": True})[0])
    monkeypatch.setenv("WANDB_MODE", "online")
    first, second = (commands(plan(data, tmp_path), {"wandb": True})[0] for _ in range(2))
    assert first == second
    assert "use_wandb" in flags_of(first) and "WANDB_RESUME=allow" in first


@pytest.mark.parametrize(
    ("gpus", "present", "flags", "words"),
    [
        ("3", 2, {}, "GPUS=3"),
        ("1", 0, {}, "GPUS=1"),
        (None, 2, {"processes": "2"}, "PROCESSES=2"),
        (None, 2, {"steps": "0"}, "STEPS=0"),
        (None, 3, {}, "is not a multiple"),
    ],
)
def test_refused_in_one_line(
    data: Path,
    tmp_path: Path,
    fake: dict[str, Any],
    gpus: str | None,
    present: int,
    flags: dict[str, Any],
    words: str,
) -> None:
    fake["environment"] = environment(gpus=present)
    with pytest.raises(UserError, match=words) as caught:
        door.launch(plan(data, tmp_path, gpus=gpus, dry_run=False), flags)
    assert "\n" not in str(caught.value)


def test_missing_algoperf_and_missing_data(
    data: Path, tmp_path: Path, fake: dict[str, Any]
) -> None:
    fake["environment"] = environment(gpus=2, missing=("algoperf", "submission_runner"))
    with pytest.raises(UserError, match="make algoperf-env"):
        door.launch(plan(data, tmp_path, dry_run=False), {})
    assert any("note: " in line for line in commands(plan(data, tmp_path)))
    fake["environment"] = environment(gpus=2)
    with pytest.raises(UserError, match="make data-algoperf-mini"):
        door.launch(plan(None, tmp_path, dry_run=False), {})
    with pytest.raises(UserError, match="no fastmri data"):
        data_check.locate("fastmri", tmp_path)


# What a folder of an earlier launch allows.


def facts(path: Path, step: int, **changes: Any) -> dict[str, Any]:
    own = {
        "path": str(path),
        "readable": True,
        "global_step": step,
        "preemption_count": 0,
        "training_complete": False,
        "goals_reached": False,
        "is_time_remaining": True,
        "eval_results": [[s, {"score": s / 2}] for s in (1, 10) if s <= step],
    }
    return {str(path): {**own, **changes}}


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Any:
    """The plan's first run with a folder that a killed launch left."""
    own = plan(data, tmp_path).runs[0]
    own.run_dir.mkdir(parents=True)
    (own.run_dir / "hparams.json").write_text(json.dumps(own.hparams))
    for step in (1, 9, 10):
        (own.run_dir / f"checkpoint_{step}").write_bytes(b"x")
    rows = ["global_step,score", "1,0.5", "10,5.0", "12,6.0"]
    (own.run_dir / "eval_measurements.csv").write_text("\n".join(rows) + "\n")
    return own


def test_resumes_from_the_newest_readable_checkpoint(run: Any) -> None:
    newest, older = run.run_dir / "checkpoint_10", run.run_dir / "checkpoint_9"
    known = {str(newest): {"readable": False}, **facts(older, 9)}
    state = folder.examine(run, known, None)
    assert (state.step, state.unreadable, state.ended) == (9, (newest,), None)
    notes = folder.prepare(run, state, [run.hparams])
    assert not newest.exists() and (run.run_dir / "set_aside_1_checkpoint_10").exists()
    assert folder.checkpoints(run.run_dir)[0] == older
    assert len(notes) == 2


def test_rows_of_steps_to_come_again_are_set_aside(run: Any) -> None:
    state = folder.examine(run, facts(run.run_dir / "checkpoint_10", 10), None)
    folder.prepare(run, state, [run.hparams])
    kept = (run.run_dir / "eval_measurements.csv").read_text().splitlines()
    aside = (run.run_dir / "set_aside_1_eval_measurements.csv").read_text().splitlines()
    assert kept == ["global_step,score", "1,0.5", "10,5.0"]
    assert aside == ["global_step,score", "1,0.5", "10,5.0", "12,6.0"]
    assert json.loads((run.run_dir / folder.SEARCH_SPACE).read_text()) == [run.hparams]


@pytest.mark.parametrize(
    "found",
    [
        b"global_step,score\n1,0.5\n",  # the last row is lost
        b"global_step,score\n1,0.5\n10,5.",  # cut short: another number
        b"global_step,score\n1,0.5\n10\n",
        b"global_step,score\n1,0.5\n10,7.5\n",
        b"global_step,score\n1,0.5\n1,0.5\n10,5.0\n10,5.0\n",
        b"global_step,sc\xff",
        b"\0" * 40,
        b"",
        None,
    ],
)
def test_evaluations_are_put_back_from_the_checkpoint(run: Any, found: bytes | None) -> None:
    path = run.run_dir / "eval_measurements.csv"
    path.unlink() if found is None else path.write_bytes(found)
    state = folder.examine(run, facts(run.run_dir / "checkpoint_10", 10), None)
    notes = folder.prepare(run, state, [run.hparams])
    rows = list(csv.DictReader(path.open(newline="")))
    values = [(float(row["global_step"]), float(row["score"])) for row in rows]
    assert values == [(1, 0.5), (10, 5.0)]
    same = found is not None and found.endswith(b"10,5.")  # the same number
    assert len(notes) == (0 if same else 1)
    again = folder.prepare(run, state, [run.hparams])
    assert again == []


def test_what_the_runner_has_rounded_is_left_alone(run: Any) -> None:
    path = run.run_dir / "eval_measurements.csv"
    path.write_text("global_step,preemption_count,score\n1,0,0.5000000000000001\n10,1,5.0\n")
    before = path.read_bytes()
    state = folder.examine(run, facts(run.run_dir / "checkpoint_10", 10), None)
    assert folder.prepare(run, state, [run.hparams]) == []
    assert path.read_bytes() == before


def test_without_checkpoints_the_time_that_is_spent_is_not_forgotten(run: Any) -> None:
    path = run.run_dir / "eval_measurements.csv"
    path.write_text("global_step,accumulated_submission_time\n1,0.5\n10,5.0\n")
    for known, why in (({}, "damaged"), ({}, "gone")):
        with pytest.raises(UserError, match=f"{why}, and AlgoPerf .* 5.0 s in 10 steps"):
            folder.examine(run, known, None)
        for old in folder.checkpoints(run.run_dir):
            old.unlink()
    path.write_text("global_step,accumulated_submission_time\n1,0.5\n")  # killed in its first save
    state = folder.examine(run, {}, None)
    assert state.step == 0 and "come again" in folder.prepare(run, state, [run.hparams])[0]


def test_a_complete_run_that_was_damaged_is_said_so(run: Any) -> None:
    known = facts(run.run_dir / "checkpoint_10", 10, goals_reached=True)
    door._seal(run.run_dir, {"ended": "now", "exit_code": 0})
    assert folder.examine(run, known, None).ended == "both targets reached"
    path = run.run_dir / "eval_measurements.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(UserError, match="damaged since: eval_measurements.csv: .* 2 of 3 rows"):
        folder.examine(run, known, None)


def test_the_runners_line_on_an_evaluation_tells_of_divergence() -> None:
    line = "I1126 runner.py:400] Time since start: 9.87s, \tStep: 20, \t{'train/accuracy': 0.1, "
    assert console.divergence(line + "'validation/loss': 2.5, 'test/num_examples': 8}") is None
    for value in ("nan", "tensor(nan)", "np.float64(inf)"):
        news = console.divergence(line + f"'validation/loss': {value}, 'test/num_examples': 8}}")
        assert news is not None and news.startswith("diverged: validation/loss is ")
        assert news.endswith(" at step 20")


def test_another_point_is_not_resumed(run: Any) -> None:
    other = {**run.hparams, "tau": 0.5}
    (run.run_dir / "hparams.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="tau is 0.5 there"):
        folder.examine(run, {}, None)


def test_a_run_ended_by_its_step_limit_is_not_continued(run: Any) -> None:
    known = facts(run.run_dir / "checkpoint_10", 10, training_complete=True)
    assert folder.examine(run, known, 10).ended == "step limit reached"
    for limit in (20, None):
        with pytest.raises(UserError, match="ended at step 10"):
            folder.examine(run, known, limit)


@pytest.mark.parametrize(
    ("change", "why"),
    [({"goals_reached": True}, "targets"), ({"is_time_remaining": False}, "time budget")],
)
def test_a_finished_run_is_left_alone(run: Any, change: dict[str, bool], why: str) -> None:
    state = folder.examine(run, facts(run.run_dir / "checkpoint_10", 10, **change), None)
    assert why in str(state.ended)


def test_two_checkpoints_are_kept(run: Any) -> None:
    folder.keep_checkpoint(run.run_dir)
    assert [p.name for p in folder.checkpoints(run.run_dir)] == ["checkpoint_10", "checkpoint_9"]


def test_a_dry_run_without_data_notes_it_and_shows_the_command(
    tmp_path: Path, fake: dict[str, Any]
) -> None:
    (tmp_path / "empty").mkdir()
    note, *lines = commands(plan(tmp_path / "empty", tmp_path, seeds="1"))
    assert note.startswith("note: DATA_DIR=") and "no ogbg data" in note
    assert flags_of(lines[-1])["data_dir"] == str(tmp_path / "empty" / "ogbg")  # where it would be


def test_a_dry_run_is_of_another_machine_if_this_one_has_nothing(
    tmp_path: Path, fake: dict[str, Any]
) -> None:
    fake["environment"] = environment(gpus=0, torch=None, cuda=None, missing=("torch",))
    asked = plan(None, tmp_path, workload="imagenet_vit", gpus="4", seeds="1")
    lines = commands(asked)
    notes = [line for line in lines if line.startswith("note: ")]
    for words in ("shown for 4; GPUS=", "DATA_DIR= is needed", "no torch"):
        assert words in str(notes)
    assert "CUDA_VISIBLE_DEVICES=0,1,2,3 " in lines[-1] and "--nproc_per_node=4" in lines[-1]
    assert "notorch_compile" not in flags_of(lines[-1])
    assert flags_of(lines[-1])["imagenet_v2_data_dir"] == "DATA_DIR/imagenet/pytorch"


def test_a_dry_run_without_a_number_of_gpus_shows_the_gpu_command(
    data: Path, tmp_path: Path, fake: dict[str, Any]
) -> None:
    fake["environment"] = environment(gpus=0)
    for words, own in (({}, False), ({"processes": "2"}, True)):
        line = commands(plan(data, tmp_path, seeds="1"), words)[-1]
        assert (f" {OWN_RUNNER} " in line) == own
        assert ("CUDA_VISIBLE_DEVICES=0 " in line) != own


def test_runs_of_one_machine_get_different_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gpus, "_PATIENCE", 0.0)
    monkeypatch.setattr(gpus, "_driver", lambda: {"0": "GPU-a", "1": "GPU-b", "2": "GPU-c"})
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    here = gpus.here()
    with gpus.claim(here, 1) as first, gpus.claim(here, None) as second:
        assert [[gpu.name for gpu in each] for each in (first, second)] == [["0"], ["1", "2"]]
        monkeypatch.setenv(gpus.VISIBLE, "GPU-b")  # a scheduler's or container's name for it
        (again,) = gpus.here()
        assert again.uuid == "GPU-b" and gpus.free([again]) == []
        with pytest.raises(UserError, match="GPUS=1: 0 of 3 GPUs"), gpus.claim(here, 1):
            pass
    assert gpus.free(here) == here
