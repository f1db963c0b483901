"""What factors.csv says, as numbers, figures and the report's section."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.optim.telemetry import COLUMNS
from algoperf_shampoo.study import factors, figures, health, logs, report, report_health, tables
from tests.study.test_logs import made_trial

ROOT = Path(__file__).parents[2]
SEEDS = ROOT / "results/measured/mini/seeds"


def written(folder: Path) -> Path:
    """A run of 100 steps, checked at 10, 20, ..., of which every second is written down. L gets a
    new basis at every check, R at none, A at every second, and fails once."""
    rows = [(1, 1.0, 0.1), (50, 50.0, 0.4), (100, 99.0, 0.6)]
    path = made_trial(folder, rows, {"workload.max_allowed_runtime_sec": 100.0})
    lines = [",".join(COLUMNS)]
    for step in range(20, 101, 20):
        checks = step // 10
        for name, kind, letter, size, refreshes, failures, criterion, age in (
            ("w", "weight", "L", 8, checks, 0, 0.5, 10),
            ("w", "weight", "R", 4, 0, 0, 0.02, step),
            ("n", "norm", "A", 8, checks // 2, int(step >= 60), 0.3, 20),
        ):
            never = not refreshes
            spectrum = ",,," if never else f"2,1e-3,{2000 / size:g},{size / 4:g}"
            lines.append(
                f"{step},{name},{kind},0,{letter},{size},{int(not never)},{criterion},{age},"
                f"{checks},{refreshes},{failures},{spectrum}"
            )
    (path / "factors.csv").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def run(tmp_path):
    return written(tmp_path)


def test_numbers_of_a_file_that_is_known(run):
    checks = factors.read(run)
    assert len(checks) == 15 and checks[0].step == 20 and math.isnan(checks[1].condition)
    by_factor = factors.groups(checks, lambda c: c.factor)
    assert list(by_factor) == ["L", "R", "A"]
    assert list(factors.groups(checks, lambda c: c.kind)) == ["weight", "norm"]
    assert factors.decompositions(by_factor["L"]) == ([20, 40, 60, 80, 100], [2, 4, 6, 8, 10])
    weights = [c for c in checks if c.kind == "weight"]
    assert factors.decompositions(weights)[1] == [1, 2, 3, 4, 5]  # the mean of L and R
    assert factors.shares(by_factor["A"], bins=2) == ([25.0, 75.0], [0.5, 0.5])
    assert factors.shares(weights, bins=1) == ([50.0], [0.5])
    assert factors.course(by_factor["R"], lambda c: c.staleness, max, bins=2) == (
        [25.0, 75.0], [40, 100],
    )  # fmt: skip
    assert factors.course(by_factor["R"], lambda c: c.condition, max) == ([], [])
    found = {row.name: row for row in factors.table(checks)}
    assert list(found) == ["all", "weight", "norm", "L", "R", "A"]
    everything = found["all"]
    assert (everything.factors, everything.checks, everything.decompositions) == (3, 30, 15)
    assert everything.failures == 1 and everything.share == 0.5 and everything.oldest == 100
    assert found["A"].condition == 250 and found["A"].share_of_rank == 0.25
    assert found["R"].criterion == 0.02 and math.isnan(found["R"].condition)
    text = factors.text(checks).splitlines()
    assert text[0].split()[:4] == ["factors", "checks", "new", "bases"]
    assert text[5].split() == ["R", "1", "10", "0", "0.00", "0", "0.02", "60", "100", "-", "-"]
    assert len({len(line) for line in text}) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no factors.csv: no run's folder, or that of a run without"),
        (lambda path: path.write_text("a,b\n1,2\n"), "no column 'parameter': none of a run"),
        (lambda path: path.write_text(""), "factors.csv: has no header"),
        (
            lambda path: path.write_text(path.read_text().replace("\n40,", "\nforty,", 1)),
            "line 5: global_step is 'forty': no number",
        ),
        (
            lambda path: path.write_text(path.read_text().replace(",L,8,", ",L,nan,", 1)),
            "line 2: size is 'nan': no number",
        ),
    ],
)
def test_a_file_that_is_none_is_one_line(run, damage, message):
    damage(run / "factors.csv")
    with pytest.raises(UserError, match=re.escape(message)):
        factors.read(run)
    assert report_health.checks_of(logs.read_trial(run)) == []


def test_rows_before_a_torn_end_count(run):
    path = run / "factors.csv"
    path.write_bytes(path.read_bytes()[:-30])
    assert len(factors.read(run)) == 14


def drawn(run):
    pytest.importorskip("matplotlib", reason="the extra `figures` is not installed")
    trial, checks = logs.read_trial(run), factors.read(run)
    name = health.file_name(trial)
    return [health.figure4(trial, checks, name), health.beside_the_curve(trial, checks, name)]


def test_figures_name_what_they_show_without_colour_and_are_the_same_again(run):
    made = drawn(run)
    assert made == drawn(run)
    for figure in made:
        svg = figure.files["svg"]
        assert figure.files["png"].startswith(b"\x89PNG")
        colours = set(re.findall(rb"#([0-9a-f]{6})", svg))
        assert all(c[:2] == c[2:4] == c[4:] for c in colours), colours
    texts = [
        [e.text for e in ET.fromstring(f.files["svg"]).iter("{http://www.w3.org/2000/svg}text")]
        for f in made
    ]
    assert {"weights (2)", "normalization layers (1)", "L, left (1)", "A, of vectors (1)"} <= {
        *texts[0]
    }
    assert {"Eq. 11", "age of bases, steps", "condition number", "R, right"} <= {*texts[1]}
    assert "the axes of the paper's Figures 4 and 7" in made[0].caption
    trial = logs.read_trial(run)
    assert f"{trial.label}, {trial.workload}" in made[1].caption


def test_a_rule_that_keeps_roots_and_a_run_without_checks_say_so(run):
    path = run / "factors.csv"
    header, *lines = path.read_text().splitlines()
    blank = [re.sub(r"^((?:[^,]*,){7})[^,]*", r"\1", line) for line in lines]
    path.write_text("\n".join([header, *blank]) + "\n")
    assert b"this rule keeps roots" in drawn(run)[1].files["svg"]
    path.write_text(header + "\n")
    with pytest.raises(UserError, match="no check of a factor yet"):
        drawn(run)
    assert factors.text([]).splitlines()[1].split()[:3] == ["all", "0", "0"]


def test_a_reports_section_has_the_rows_numbers_and_figures(tmp_path):
    run = written(tmp_path / "runs")
    measured = run / "measurements.csv"
    measured.write_text(
        "global_step,eigenbasis_checks,eigenbasis_refreshes,eigenbasis_failures,gradients_skipped\n"
        "50,15,8,0,2\n100,30,15,1,2\n"
    )
    trials = logs.find_trials([tmp_path / "runs"])
    made = tables.build(trials, [], ("full",), tmp_path)
    by_name = {tables.run_name(t.path, tmp_path): t for t in trials}
    text = re.sub(r"<[^>]*>", "|", report_health.section(made[0], by_name))
    for part in ("|15\u00a0(50%)|", "|100%|", "|0%|", "|50%|", "|2|", "|0.3|", "|2.5e+02|"):
        assert part in text.replace("||", "|"), (part, text)
    pytest.importorskip("matplotlib", reason="the extra `figures` is not installed")
    (figure,) = report_health.draw(made, trials, tmp_path)
    assert figure.name == "full_health_1"
    content = report.build(made, [figure], trials, tmp_path, tmp_path / "page.html")
    assert content.count("<figure>") == 1
    assert content.index("health, full</h3>") < content.index("<figure>")


def test_runs_of_before_there_was_a_file_have_their_counts():
    trials = logs.find_trials([SEEDS / "eshampoo_fixed", SEEDS / "nadamw"])
    mini = tables.table1(trials, ROOT)[0]
    by_name = {tables.run_name(t.path, ROOT): t for t in trials}
    section = report_health.section(mini, by_name)
    rows = [row for row in mini.rows if row.runs]
    preconditioned = [row for row in rows if "eshampoo_fixed" in row.name]
    assert section.count("<tr>") == 1 + len(preconditioned) == 4
    assert section.count("(100%)") == 3 and "nadamw" not in section
    assert report_health.draw([mini], trials, ROOT) == []
    with_file = [figures.counted([row], by_name) for row in preconditioned]
    assert all(len(group) == 5 for ((_, group),) in with_file)
