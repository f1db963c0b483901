"""From run folders to the page of a study of claims, by real runs of a tiny workload."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from algoperf_shampoo.harness import seal
from algoperf_shampoo.study import logs, study
from algoperf_shampoo.study.claims import costs, figures, file, results, rule, statistics
from algoperf_shampoo.study.files import Unreadable
from tests.harness import fakes
from tests.study.claims.test_file import ROOT, write


def run_all(made: study.Study, leave_out: int = 0) -> None:
    """Every run of a study on the tiny workload: 40 steps; EShampoo's rate is the better one."""
    for job in made.jobs[leave_out:]:
        rate = 0.05 if job.run.variant == "eshampoo_fixed" else 0.0005
        submission = {"init_optimizer_state": starting_with(rate)}
        workload = fakes.FakeWorkload(validation_target_value=0.2, eval_period_steps=40)
        fakes.execute(job.run, workload, **submission)


def starting_with(rate: float):
    def init_optimizer_state(workload, model_params, *rest):
        state = fakes._init_optimizer_state(workload, model_params, *rest)
        for group in state["optimizer"].param_groups:
            group["lr"] = rate
        return state

    return init_optimizer_state


def laid_out(tmp_path: Path) -> tuple[file.Declared, study.Study]:
    path = write(tmp_path / "mine.json", "title", value="Claims")
    options = study.Options(out=str(tmp_path / "runs"), steps="40")  # the tiny workload's budget
    made = study.lay_out(ROOT, str(path), options)
    return file.read(path), made


def test_from_folders_to_a_verdict(tmp_path):
    declared, made = laid_out(tmp_path)
    run_all(made, leave_out=1)
    short = results.outcome(declared, made, quick=False)
    assert short.verdicts[0].verdict == "incomplete: 5 of 6 pairs"
    run_all(made)
    found = results.outcome(declared, made, quick=False)
    assert len(found.runs) == 12 and found.problems == ()
    (verdict,) = found.verdicts
    assert verdict.verdict == rule.SUPPORTED and verdict.corrected == 2.0**-5
    for run in found.runs:
        with (run.folder / "step_losses.csv").open() as losses:
            values = [float(row["loss"]) for row in csv.DictReader(losses)]
        assert run.values["loss"] == pytest.approx(math.fsum(values[36:]) / 4, rel=1e-15)
        assert run.steps == 40
    page = results.markdown(found, ROOT, tmp_path)
    assert "| better | here | loss: rotated < adam |" in page and "supported |" in page
    assert "| later | here | | | | | | waits for a variant |" in page
    record = json.loads(results.to_json(found, ROOT))
    assert record["claims"][0]["verdict"] == "supported" and len(record["runs"]) == 12
    quick = results.outcome(declared, made, quick=True)
    assert quick.verdicts == () and "no verdict" in results.markdown(quick, ROOT, tmp_path)
    assert "supported" not in results.markdown(quick, ROOT, tmp_path) + results.to_json(quick, ROOT)


def test_figures_on_the_papers_axes(tmp_path):
    arms = {
        "one": {"variant": "eshampoo_adaptive", "F": 7, "tau": 0.1},
        "two": {"variant": "eshampoo_adaptive", "F": 7, "tau": 0.1, "set": {"learning_rate": 0.5}},
    }
    part = {"statistic": "loss", "low": ["one"], "high": ["two"], "rule": "less"}
    claims = [{"name": "c", "source": "", "hypothesis": "", "parts": [part]}]
    path = write(tmp_path / "mine.json", "arms", value=arms)
    path.write_text(json.dumps({**json.loads(path.read_text()), "claims": claims}))
    declared = file.read(path)
    options = study.Options(seeds="5,", steps="40", out=str(tmp_path / "runs"))
    made = study.lay_out(ROOT, str(path), options)

    def logging(**given):  # counts as a submission with factors logs them
        step = given["global_step"]
        given["workload"].metrics_logger.append_scalar_metrics(
            {"eigenbasis_checks": 2 * step, "eigenbasis_refreshes": step}, step
        )
        return fakes._prepare_for_eval(**given)

    for job in made.jobs:
        fakes.execute(job.run, prepare_for_eval=logging)
    found = results.outcome(declared, made, quick=True)
    (name,) = figures.families(found.runs)
    assert name == "eshampoo_adaptive (F = 7, tau = 0.1)"
    shares = statistics.shares_between(found.runs[0].folder)
    assert shares == dict.fromkeys((1, 10, 20, 30, 40), 0.5)
    pytest.importorskip("matplotlib")
    drawn = {figure.name: figure for figure in figures.draw(found)}
    assert set(drawn) == {"claims_rates", "claims_refreshes"}
    for figure in drawn.values():
        assert figure.files["png"].startswith(b"\x89PNG") and "Imagewoof" in figure.caption
        text = figure.files["svg"].decode()
        assert all(mini in text for mini in ("fastmri", "imagenet_vit", "ogbg"))
    assert "learning rate" in drawn["claims_rates"].files["svg"].decode()


def test_axes_are_readable():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    left, right, curves = Figure().subplots(1, 3)
    figures._rate_axis(left, [0.008, 0.002, 0.004, 0.004])
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["0.002", "0.004", "0.008"]
    figures._rate_axis(right, [10.0**-power for power in range(5)])
    assert len(right.get_xticks()) != 5  # too many for labels of their own
    # The first tenth of the steps is 30 times as high as what the figure is about.
    figures._line(curves, 0, "one", {10.0: [30.0], 50.0: [1.0], 100.0: [0.5]}, each=False)
    figures._later_axis(curves)
    low, high = curves.get_ylim()
    assert 0.4 < low < 0.5 and 1.0 < high < 1.1


def test_curves_and_kinds_of_factors_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    arms = {"one": {"variant": "eshampoo_adaptive", "F": 7, "tau": 0.1}}
    part = {"statistic": "refresh_right_less_left", "low": ["one"], "than": 0, "rule": "less"}
    path = write(tmp_path / "mine.json", "arms", value=arms)
    claims = [{"name": "c", "source": "", "hypothesis": "", "parts": [part]}]
    curves = {"figure1": {"of": "Figure 1", "arms": ["one"]}}
    content = {**json.loads(path.read_text()), "claims": claims, "curves": curves}
    path.write_text(json.dumps(content))
    options = study.Options(seeds="5,", steps="40", out=str(tmp_path / "runs"))
    made = study.lay_out(ROOT, str(path), options)

    def logging(**given):
        step = given["global_step"]
        counts = {"left": 3 * step, "right": step, "one_dim": 4 * step}
        values = {f"eigenbasis_refreshes_{kind}": count for kind, count in counts.items()}
        values |= {f"eigenbasis_checks_{kind}": 4 * step for kind in counts}
        given["workload"].metrics_logger.append_scalar_metrics(values, step)
        return fakes._prepare_for_eval(**given)

    for job in made.jobs:
        fakes.execute(job.run, prepare_for_eval=logging)
    found = results.outcome(file.read(path), made, quick=True)
    assert {run.values["refresh_right_less_left"] for run in found.runs} == {-0.5}
    assert statistics.shares_between(found.runs[0].folder, "left")[40] == 0.75
    losses = statistics.loss_curve(found.runs[0].folder, 25)
    assert set(losses) == {25, 50} and losses[50] < losses[25]
    drawn = {figure.name: figure for figure in figures.draw(found, "mine")}
    assert set(drawn) == {"mine_refreshes", "mine_kinds", "mine_figure1"}
    assert "beside the paper's Figure 1 (there" in drawn["mine_figure1"].caption
    assert b"one_dim" in drawn["mine_kinds"].files["svg"]


def test_a_run_whose_files_were_changed_is_not_counted(tmp_path):
    declared, made = laid_out(tmp_path)
    run_all(made, leave_out=11)
    path = made.jobs[11].run.run_dir / "step_losses.csv"
    path.write_text(path.read_text().replace("40,", "40,1"))
    found = results.outcome(declared, made, quick=False)
    assert found.runs == () and found.verdicts[0].verdict == "incomplete: 0 of 6 pairs"
    assert "not counted: step_losses.csv" in found.problems[0]


def test_losses_and_sessions_that_a_record_lacks(tmp_path):
    """Records with right digests: a log that lost losses is not counted, and not the worst run."""
    declared, made = laid_out(tmp_path)
    run_all(made, leave_out=7)
    whole = results.outcome(declared, made, quick=False)
    cut, gone, *odd = [run.folder for run in whole.runs][:5]

    def sealed(folder: Path, **changes) -> None:
        record = json.loads((folder / "run.json").read_text())
        record["identity"] |= changes.pop("identity", {})
        record |= {**changes, "files": seal.make(folder)}
        (folder / "run.json").write_text(json.dumps(seal.signed(record)))

    path = cut / "step_losses.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    (gone / "step_losses.csv").unlink()
    sealed(cut)
    sealed(gone)
    for folder, sessions in zip(odd, ([], [5], [{"packages": [1], "cpu_count": {}}]), strict=True):
        sealed(folder, sessions=sessions, identity={"source_sha256": [1]})
    found = results.outcome(declared, made, quick=False)
    assert {run.folder for run in whole.runs} - {run.folder for run in found.runs} == {cut, gone}
    said = "\n".join(found.problems)
    assert "not counted: step_losses.csv has " in said
    assert "not counted: no file that has the mean training loss" in said
    assert "| None |" in results.markdown(found, tmp_path, tmp_path)
    json.loads(results.to_json(found, tmp_path))


def measured(folder: Path, rows: list[tuple]) -> Path:
    lines = ["global_step,eigenbasis_checks,eigenbasis_refreshes,loss"]
    lines += [",".join(map(str, row)) for row in rows]
    (folder / "measurements.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_shares_of_refreshes(tmp_path):
    # Two factors: checks grow by 2 a step; rows of evaluations have no counts.
    rows = [(1, 2, 2, 1), (25, 50, 40, 1), (25, "", "", 1), (50, 100, 60, 1), (75, 150, 70, 1)]
    folder = measured(tmp_path, [*rows, (100, 200, 75, 1)])
    assert statistics.refresh_share(folder, 100) == 75 / 200
    late, early = 5 / 50, 40 / 50
    assert statistics.refresh_late_less_early(folder, 100) == pytest.approx(late - early)
    # The last evaluation is missing; then, evaluations that are not at the quarters.
    assert math.isnan(statistics.refresh_late_less_early(measured(tmp_path, rows), 100))
    between = measured(tmp_path, [(1, 2, 2, 1), (25, 50, 40, 1), (50, 100, 60, 1)])
    assert statistics.refresh_late_less_early(between, 50) == pytest.approx(20 / 50 - 40 / 50)
    (tmp_path / "measurements.csv").write_text("global_step,loss\n1,1\n")
    assert math.isnan(statistics.refresh_share(tmp_path, 100))


def test_shares_by_kind_of_factor_and_the_slope_of_step_norms(tmp_path):
    header = ["global_step", "step_norm_slope"]
    kinds = ("one_dim", "left", "right")
    header += [f"eigenbasis_{n}_{k}" for k in kinds for n in ("checks", "refreshes")]
    rows = [(50, "", 10, 9, 10, 5, 10, 2), (50, -0.5, "", "", "", "", "", ""),
            (100, "", 20, 16, 20, 10, 20, 4), (100, -0.25, "", "", "", "", "", "")]  # fmt: skip
    lines = [",".join(header), *(",".join(map(str, row)) for row in rows)]
    (tmp_path / "measurements.csv").write_text("\n".join(lines) + "\n")
    of = {name: statistic.of for name, statistic in statistics.STATISTICS.items()}
    assert of["refresh_left_less_one_dim"](tmp_path, 100) == pytest.approx(0.5 - 0.8)
    assert of["refresh_right_less_left"](tmp_path, 100) == pytest.approx(0.2 - 0.5)
    assert of["step_norm_slope"](tmp_path, 100) == -0.25
    assert math.isnan(of["step_norm_slope"](tmp_path, 75))


def test_losses_of_the_last_tenth(tmp_path):
    def write_losses(rows: list[tuple]) -> Path:
        lines = ["global_step,loss", *(f"{step},{loss}" for step, loss in rows)]
        (tmp_path / "step_losses.csv").write_text("\n".join(lines) + "\n")
        return tmp_path

    rows = [(step, 100 - step) for step in range(1, 21)]
    assert statistics.last_tenth_loss(write_losses(rows), 20) == 80.5
    with pytest.raises(Unreadable, match="1 of the 2 losses of the last tenth"):
        statistics.last_tenth_loss(write_losses(rows[:-1]), 20)
    whole = write_losses([*rows[:-1], (20, "nan")])
    assert math.isnan(statistics.last_tenth_loss(whole, 20))


def test_a_diverged_run_is_the_worst(tmp_path):
    declared, made = laid_out(tmp_path)

    def diverging(**given):
        given["optimizer_state"]["optimizer"].param_groups[0]["lr"] = float("nan")
        return fakes._update_params(**given)

    run = made.jobs[0].run
    fakes.execute(run, update_params=diverging)
    trial = logs.read_trial(run.run_dir)
    assert statistics.of_run(trial, "loss", 40) == math.inf


def test_the_door_shows_the_design_and_refuses_what_cannot_be_decided(tmp_path):
    path = write(tmp_path / "mine.json", "mini", "seeds", value="5,")
    command = [sys.executable, "scripts/claims.py", f"--claims={path}", f"--out={tmp_path}/o"]
    done = subprocess.run([*command, "--dry_run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "1 seeds a mini decide none of 1 claims" in done.stderr
    quick = subprocess.run(
        [*command, "--dry_run", "--quick"], cwd=ROOT, capture_output=True, text=True
    )
    assert quick.returncode == 0, quick.stderr
    assert "smallest p 0.25" in quick.stdout and "STEPS=20 ALL_STEPS=1 SEEDS=5," in quick.stdout
    assert "6 of 6 runs to launch" in quick.stdout and not (tmp_path / "o").exists()


def test_costs_come_from_measured_parts_of_a_run(tmp_path):
    options = study.Options(seeds="201,", steps="100", evals="50", out=str(tmp_path))
    made = study.lay_out(ROOT, "claims", options)
    jobs = [job for job in made.jobs if job.run.label == "nadamw_steps100_allsteps_evals50"]
    record = json.loads((ROOT / costs.RECORD).read_text())
    expected = sum(
        record["start"] + 100 * record["step"]["nadamw"][mini] + 3 * record["evaluation"][mini]
        for mini in ("fastmri", "imagenet_vit", "ogbg")
    )
    assert sum(costs.seconds(job.run, record) for job in jobs) == pytest.approx(expected)
    (line,) = costs.lines(jobs, 2, ROOT)
    assert line.startswith(f"cost of 3 runs: {expected:.0f} core-seconds") and " on 2; by" in line
    (unknown,) = costs.lines(jobs, 2, tmp_path)
    assert unknown == "cost of 3 runs: unknown: no run like them is known"
