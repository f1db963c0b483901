"""Figures and the report: what they show, that they are files of their kind, that links lead on."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
import urllib.parse
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import figures, logs, report, tables
from tests.study.test_logs import made_trial

ROOT = Path(__file__).parents[2]
SEEDS = ROOT / "results/measured/mini/seeds"
VARIANTS = ("shampoo_grafting", "eshampoo_fixed", "eshampoo_adaptive")


def test_a_mean_goes_as_far_as_every_run_and_between_evaluations(tmp_path):
    one = made_trial(tmp_path / "a", [(1, 1.0, 0.1), (10, 10.0, 0.2), (30, 30.0, 0.6)])
    two = made_trial(tmp_path / "b", [(1, 1.0, 0.3), (20, 20.0, 0.4)])
    trials = [logs.read_trial(path) for path in (one, two)]
    steps, values = figures.mean_curve(trials)
    assert steps == [1, 10, 20]
    between = 0.3 + 0.1 * 9 / 19  # of the second, at step 10
    assert values == pytest.approx([0.2, (0.2 + between) / 2, (0.4 + 0.4) / 2])
    assert figures.mean_curve([]) == ([], [])
    broken = made_trial(tmp_path / "c", [(1, 1.0, "nan")])
    assert figures.mean_curve([trials[0], logs.read_trial(broken)]) == ([], [])


def test_only_what_the_table_counts_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `figures` is not installed")
    runs = [made_trial(tmp_path / n, [(1, 1.0, 0.1), (9, 9.0 + len(n), 0.6)]) for n in ("a", "bb")]
    cut = made_trial(tmp_path / "cut", [(1, 1.0, 0.1), (3, 2.0, 0.2)])
    shutil.copytree(runs[0], tmp_path / "copy/label/study_1/w_pytorch/trial_1")
    trials = logs.find_trials([tmp_path])
    made = tables.build(trials, [], ("full",), tmp_path)
    (row,) = made[0].rows
    assert (row.ended, len(row.runs)) == (2, 4) and cut in [t.path for t in trials]
    svg = figures.draw(made, trials, tmp_path)[0].files["svg"].decode()
    assert f"{row.name}, n = 2" in svg
    by_name = {tables.run_name(t.path, tmp_path): t for t in trials}
    (group,) = [group for _, group in figures.counted([row], by_name)]
    assert sorted(t.path for t in group) == sorted(runs)


@pytest.mark.parametrize("label", ["$x^$", r"a$\frac$", "b" * 240])
def test_a_label_is_no_formula_and_fits(tmp_path, label):
    pytest.importorskip("matplotlib", reason="the extra `figures` is not installed")
    path = made_trial(tmp_path, [(1, 1.0, 0.1), (9, 9.0, 0.6)])
    path.parents[2].rename(tmp_path / label)
    trials = logs.find_trials([tmp_path])
    drawn = figures.draw(tables.build(trials, [], ("full",), tmp_path), trials, tmp_path)
    shown = label if len(label) < 100 else "b" * 90
    assert [shown in figure.files["svg"].decode() for figure in drawn] == [True, True]


def test_figures_of_runs_that_are_not_counted_are_none_and_that_is_said(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `figures` is not installed")
    made_trial(tmp_path / "runs", [(1, 1.0, 0.1)])
    command = [sys.executable, "scripts/figures.py", f"--runs={tmp_path}/runs"]
    done = subprocess.run(
        [*command, f"--out={tmp_path}/out"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr.startswith("error: none of the 1 runs is counted")


class Page(HTMLParser):
    """Collects links, images, anchors and text, and checks that tags are closed."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.images: list[str] = []
        self.anchors: set[str] = set()
        self.tags: set[str] = set()
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        values = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "a":
            self.links.append(values["href"])
        if tag == "img":
            self.images.append(values["src"])
        if "id" in values:
            self.anchors.add(values["id"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page_of(runs: Path, page: Path, drawn=()) -> Page:
    trials = logs.find_trials([runs])
    made = tables.table1(trials, ROOT)
    content = report.build(made, drawn, trials, ROOT, page, "A <title> & more")
    page.write_text(content, encoding="utf-8")
    return Page(content)


def test_every_link_of_a_report_leads_to_what_is_there(tmp_path):
    (tmp_path / "my runs%20").mkdir()
    shutil.copytree(SEEDS / "eshampoo_adaptive", tmp_path / "my runs%20" / "eshampoo_adaptive")
    (tmp_path / "pages").mkdir()
    page = tmp_path / "pages" / "report.html"
    read = page_of(tmp_path / "my runs%20", page)
    inner = {link[1:] for link in read.links if link.startswith("#")}
    outer = [link for link in read.links if not link.startswith("#")]
    assert inner and inner <= read.anchors
    trials = logs.find_trials([SEEDS / "eshampoo_adaptive"])
    assert len(trials) >= 9 and len(outer) >= len(trials) * 7  # a folder, and six files or more
    for link in outer:
        assert not urllib.parse.urlsplit(link).scheme
        assert (page.parent / urllib.parse.unquote(link)).exists(), link
    assert not read.tags & {"script", "link", "iframe"} and 'src="http' not in page.read_text()
    assert "A <title> & more" in read.text
    text = " ".join(read.text)
    hits = sum(trial.outcome == "hit" for trial in trials)
    assert f"{len(trials)} runs: {hits} reached their target" in text
    assert "eshampoo_adaptive (F = " in text


def test_names_and_holes_are_text_in_the_page(tmp_path):
    path = made_trial(tmp_path, [(1, 1.0, 0.1)])
    label = path.parents[2]
    label.rename(label.with_name("<b>bold"))
    read = page_of(tmp_path, tmp_path / "report.html")
    assert "b" not in read.tags and any("<b>bold" in text for text in read.text)
    assert any("breaks off at step 1" in text for text in read.text)
    (tmp_path / "none").mkdir()
    assert "No runs yet." in page_of(tmp_path / "none", tmp_path / "empty.html").text


@pytest.fixture(scope="module")
def drawn():
    pytest.importorskip("matplotlib", reason="the extra `figures` is not installed")
    trials = logs.find_trials([SEEDS / name for name in VARIANTS])
    return figures.draw(tables.table1(trials, ROOT), trials, ROOT)


def test_figures_are_whole_and_the_same_when_made_again(drawn, tmp_path):
    names = [figure.name for figure in drawn]
    assert names == [
        "mini_fastmri_curves", "mini_imagenet_vit_curves", "mini_ogbg_curves",
        "mini_time_to_target",
    ]  # fmt: skip
    written = figures.write(drawn, tmp_path / "figures")
    assert len(written) == 8 and all(path.stat().st_size > 5000 for path in written)
    trials = logs.find_trials([SEEDS / "eshampoo_fixed"])
    twice = [
        figures.draw(tables.table1(trials, ROOT), trials, ROOT)[0].files["svg"] for _ in range(2)
    ]
    assert twice[0] == twice[1]
    curves = drawn[2].files
    assert curves["png"].startswith(b"\x89PNG")
    texts = [e.text for e in ET.fromstring(curves["svg"]).iter("{http://www.w3.org/2000/svg}text")]
    trial = logs.read_trial(SEEDS / "eshampoo_fixed/study_1/ogbg_mini_pytorch/trial_1")
    assert f"target {trial.target:g}" in texts
    rows = tables.table1(logs.find_trials([SEEDS / name for name in VARIANTS]), ROOT)[0].rows
    names = [f"{row.name}, n = {len(row.runs)}" for row in rows if row.workload == "OGBG"]
    assert len(names) == 3 and all(any(name in (text or "") for text in texts) for name in names)
    times = ET.fromstring(drawn[3].files["svg"])
    shown = [e.text for e in times.iter("{http://www.w3.org/2000/svg}text")]
    fractions = [f"{row.hits}/{row.ended}" for row in rows]
    assert len(fractions) == 9
    assert all(shown.count(text) >= fractions.count(text) for text in fractions)


@pytest.fixture(scope="module")
def of_many():
    """Curves of a workload with nine rows."""
    pytest.importorskip("matplotlib", reason="the extra `figures` is not installed")
    trials = [t for t in logs.find_trials([SEEDS]) if t.workload == "ogbg_mini"]
    made = tables.table1(trials, ROOT)
    return made[0], figures.draw(made, trials, ROOT)[0]


def test_many_rows_have_axes_each(of_many):
    """On one pair of axes they hide each other."""
    table, figure = of_many
    rows = [row for row in table.rows if row.runs]
    assert len(rows) > figures.TOGETHER
    root = ET.fromstring(figure.files["svg"])
    axes = [e for e in root.iter() if re.fullmatch(r"axes_\d+", e.get("id", ""))]
    assert len(axes) >= len(rows)
    texts = [e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert sum(text.startswith("target ") for text in texts) == 1
    for row in rows:
        assert texts.count(f"n = {row.ended}") == len(rows) and row.title in texts
        assert not row.settings or ", ".join(row.settings) in texts


def test_the_committed_figures_are_of_the_committed_runs():
    """Every row, with how many runs it has, and how many of them hit."""
    table = tables.table1(logs.find_trials([SEEDS]), ROOT)[0]
    folder = SEEDS.parent / "figures"
    text = "{http://www.w3.org/2000/svg}text"
    names = {"FastMRI": "fastmri", "ImageNet ViT": "imagenet_vit", "OGBG": "ogbg"}
    times = [e.text for e in ET.parse(folder / "mini_time_to_target.svg").iter(text)]
    for workload, name in names.items():
        rows = [row for row in table.rows if row.runs and row.workload == workload]
        drawn = [e.text for e in ET.parse(folder / f"mini_{name}_curves.svg").iter(text)]
        assert drawn.count("n = 5") == len(rows) > figures.TOGETHER
        for row in rows:
            for shown in (drawn, times):
                assert row.title in shown and (not row.settings or ", ".join(row.settings) in shown)
            assert f"{row.hits}/{row.ended}" in times
        assert workload in times
    assert len(list(folder.iterdir())) == 4


def test_curves_are_seen_where_they_part(of_many):
    """Not squeezed under the first evaluations: the axis begins above what the first tenth has."""
    values = [float(text) for text in re.findall(r">(0\.\d+)<", of_many[1].files["svg"].decode())]
    trials = [t for t in logs.find_trials([SEEDS]) if t.workload == "ogbg_mini"]
    first = min(t.evaluations[1].value for t in trials)
    assert values and min(values) > first


def test_no_colour_carries_meaning(drawn, of_many):
    """Every stroke and fill is a grey."""
    for figure in [*drawn, of_many[1]]:
        colours = set(re.findall(rb"#([0-9a-f]{6})", figure.files["svg"]))
        assert all(c[:2] == c[2:4] == c[4:] for c in colours), (figure.name, colours)


def test_a_report_holds_its_figures(drawn, tmp_path):
    read = page_of(SEEDS, tmp_path / "report.html", drawn)
    assert len(read.images) == 4
    for source in read.images:
        kind, _, data = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert ET.fromstring(base64.b64decode(data)).tag.endswith("svg")
    assert (tmp_path / "report.html").stat().st_size < 5e6


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_a_browser_shows_the_page_without_a_network(tmp_path):
    page_of(SEEDS / "eshampoo_fixed", tmp_path / "report.html")
    done = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
            f"--user-data-dir={tmp_path}/profile", "--proxy-server=127.0.0.1:9",
            (tmp_path / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "eshampoo_fixed (F = " in done.stdout, done.stderr[-500:]
    runs = len(logs.find_trials([SEEDS / "eshampoo_fixed"]))
    # The paper's rows, the factors' health of three workloads, and a row a run.
    assert done.stdout.count("<tr") == (1 + 9) + (1 + 3) + (1 + runs)


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"no matplotlib in this Python: pip install -e '\.\[fig"):
        figures.draw([], [], ROOT)
