"""The pull request for an export: its text, and what submissions_algorithms' workflows make of it.

Their scripts are taken from a copy of mlcommons/submissions_algorithms, a checkout or a git
directory, that SUBMISSIONS_ALGORITHMS names, and run by node with js-yaml (NODE_PATH).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import submission_loader
from algoperf_shampoo.study import export, logs, memory, pull_request

ROOT = Path(__file__).resolve().parents[2]
SEEDS = ROOT / "results" / "measured" / "mini" / "seeds"
AUTHORS = 'Zoë O\'Neill, A. "B." Author'

# Runs a script of actions/github-script: its names, and what it set and said, as JSON.
HOST = """
const [path, body] = process.argv.slice(1);
const said = {outputs: {}, failed: [], comments: []};
const core = {
  setOutput: (name, value) => { said.outputs[name] = value; },
  setFailed: (message) => { said.failed.push(message); },
};
const createComment = async (comment) => { said.comments.push(comment.body); };
const github = {rest: {issues: {createComment}}};
const context = {
  payload: {pull_request: {number: 1, body: require('fs').readFileSync(body, 'utf8')}},
  repo: {owner: 'o', repo: 'r'},
};
const Asynchronous = Object.getPrototypeOf(async () => {}).constructor;
const script = new Asynchronous(
  'require', 'context', 'core', 'github', 'console', require('fs').readFileSync(path, 'utf8'));
script(require, context, core, github, {log: (line) => said.failed.push(line)})
  .then(() => process.stdout.write(JSON.stringify(said)));
"""


def of_seeds(variant: str) -> list[logs.Trial]:
    return logs.find_trials(path for path in [SEEDS / variant] if path.is_dir())


def test_the_text_has_the_block_and_evidence_from_records(tmp_path: Path) -> None:
    folder = export.export(ROOT, "eshampoo_adaptive", tmp_path, ruleset="self")
    minis = of_seeds("eshampoo_adaptive") + of_seeds("eshampoo_fixed")
    text = pull_request.compose(ROOT, folder, minis, AUTHORS, "")
    block = text.partition("```yaml\n")[2].partition("```")[0]
    fields = dict(line.split(": ", 1) for line in block.splitlines())
    assert json.loads(fields["authors"]) == AUTHORS
    assert json.loads(fields["submission_folder"]) == "eshampoo_adaptive"
    assert json.loads(fields["ruleset"]) == "self-tuning"
    evidence = text.partition("### Full-size runs")[2]
    assert "None in the records" in evidence.partition("###")[0]
    assert "| fastmri | EShampoo (tau = 0.1, F = 50) | 5/5 | 2468 ± 145 | 10.81 ± 0.72 |" in text
    assert "| FastMRI | eshampoo_adaptive (" in text
    assert "eshampoo_fixed" not in evidence
    point = json.loads((folder / export.RECORD).read_text())["point"]
    for line in memory.preview(point):
        assert f"- {line}" in text


def test_full_runs_count_with_exactly_the_exported_point(tmp_path: Path) -> None:
    folder = export.export(ROOT, "eshampoo_adaptive", tmp_path, authors="A. Author")
    [point] = json.loads((folder / "tuning_search_space.json").read_text())
    [mini, *_] = of_seeds("eshampoo_adaptive")
    full = dataclasses.replace(mini, workload="ogbg", hparams={**point, "eigensolver": "eigh"})
    other = dataclasses.replace(full, hparams={**point, "tau": 0.2})
    for trials, there in (([full], True), ([other], False), ([mini], False)):
        text = pull_request.compose(ROOT, folder, trials, "", "")
        part = text.partition("### Full-size runs")[2].partition("###")[0]
        assert ("| OGBG | eshampoo_adaptive" in part) == there
        assert ("None in the records" in part) == (not there)


def test_what_is_no_export_or_has_no_author_is_refused(tmp_path: Path) -> None:
    folder = export.export(ROOT, "nadamw", tmp_path)
    with pytest.raises(UserError, match="AUTHORS= is needed"):
        pull_request.compose(ROOT, folder, [], " ", "")
    with pytest.raises(UserError, match="would not survive"):
        pull_request.compose(ROOT, folder, [], "A # B", "")
    assert pull_request.exports(tmp_path) == [folder]
    (folder / "submission.py").write_text("")
    with pytest.raises(UserError, match="not as it was exported"):
        pull_request.compose(ROOT, folder, [], "A", "")
    with pytest.raises(UserError, match="no such record of an export"):
        pull_request.compose(ROOT, tmp_path, [], "A", "")


def script_of(workflow: str) -> str:
    """The only github-script of a workflow, as it stands in their YAML."""
    place = Path(os.environ["SUBMISSIONS_ALGORITHMS"])
    file = f".github/workflows/{workflow}.yml"
    if (place / file).is_file():
        text = (place / file).read_text(encoding="utf-8")
    else:
        show = ["git", f"--git-dir={place}", "show", f"HEAD:{file}"]
        text = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    before, mark, rest = text.partition("script: |\n")
    assert mark and "script: |" not in rest
    indent = len(rest) - len(rest.lstrip(" "))
    lines = []
    for line in rest.splitlines():
        if line.strip() and not line.startswith(" " * indent):
            break
        lines.append(line)
    return textwrap.dedent("\n".join(lines))


def said(workflow: str, body: str, folder: Path) -> dict[str, Any]:
    (folder / "script.js").write_text(script_of(workflow), encoding="utf-8")
    (folder / "body.md").write_text(body, encoding="utf-8")
    command = ["node", "-e", HOST, str(folder / "script.js"), str(folder / "body.md")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def have_workflows() -> bool:
    if "SUBMISSIONS_ALGORITHMS" not in os.environ or shutil.which("node") is None:
        return False
    return subprocess.run(["node", "-e", "require('js-yaml')"], capture_output=True).returncode == 0


@pytest.mark.skipif(
    not have_workflows(), reason="wants SUBMISSIONS_ALGORITHMS=, node and js-yaml (NODE_PATH=)"
)
@pytest.mark.parametrize("ruleset", ["external", "self"])
@pytest.mark.parametrize("variant", submission_loader.variants(ROOT))
def test_their_workflows_take_the_text_and_write_the_exported_folder(
    variant: str, ruleset: str, tmp_path: Path
) -> None:
    folder = export.export(ROOT, variant, tmp_path, ruleset=ruleset, settings="weight_decay=0.01")
    body = pull_request.compose(ROOT, folder, of_seeds(variant), AUTHORS, "Ärzte e.V.")
    assert said("validate_pr", body, tmp_path) == {"outputs": {}, "failed": [], "comments": []}
    nobody = body.replace(json.dumps(AUTHORS, ensure_ascii=False), '""')
    empty = said("validate_pr", nobody, tmp_path)
    assert empty["failed"], "their check, as run here, finds a missing author"
    synced = said("sync_submission", body, tmp_path)
    assert synced["failed"] == []
    assert synced["outputs"]["path"] == f"submissions/{export.RULESETS[ruleset]}/{folder.name}"
    # Their last step writes the YAML by a shell's here-document.
    written = subprocess.run(
        ["bash", "-c", f"cat <<EOF\n{synced['outputs']['yaml_string']}\nEOF\n"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    load = "console.log(JSON.stringify(require('js-yaml').load(process.argv[1])))"
    read = subprocess.run(["node", "-e", load, written], capture_output=True, text=True, check=True)
    expected = export.info(ROOT, variant, {"weight_decay": 0.01}, ruleset, AUTHORS, "Ärzte e.V.")
    assert json.loads(read.stdout) == expected
