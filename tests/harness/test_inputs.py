"""Search spaces, keys, submissions: what is taken, and how what is wrong is named."""

from __future__ import annotations

import json
import os
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import hparams, prng, submission_loader
from tests.harness import fakes

ROOT = Path(__file__).parents[2]


FIELDS = ("factors", "tau")
POINT = json.loads((ROOT / "search_spaces" / "eshampoo_adaptive.json").read_text())[0]


def point(**changes):
    """The variant's point with fields replaced, or taken away where the value is ``...``."""
    return {k: v for k, v in {**POINT, **changes}.items() if v is not ...}


def ranges(**changes):
    """A space of one choice a field, some entries replaced."""
    return {**{k: {"feasible_points": [v]} for k, v in POINT.items()}, **changes}


def written(tmp_path, content) -> Path:
    path = tmp_path / "space.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_list_gives_its_points_in_order(tmp_path):
    both = [point(learning_rate=0.1), point(learning_rate=0.2)]
    assert hparams.read_points(written(tmp_path, both), 2, FIELDS) == both
    assert hparams.as_namedtuple(both[1]).learning_rate == 0.2


def test_a_file_of_points_per_workload(tmp_path):
    space = {"ogbg_mini": [point(tau=0.1)], "fastmri": [point(tau=0.2)]}
    path = written(tmp_path, space)
    assert hparams.read_points(path, 1, FIELDS, "ogbg_mini") == [point(tau=0.1)]
    assert hparams.read_points(path, 1, FIELDS, "fastmri_mini") == [point(tau=0.2)]
    with pytest.raises(UserError, match="no points for 'imagenet_vit_mini': it has .ogbg_mini"):
        hparams.read_points(path, 1, FIELDS, "imagenet_vit_mini")


def test_ranges_are_drawn_inside_and_the_same_each_time(tmp_path):
    space = ranges(
        learning_rate={"min": 1e-4, "max": 1e-2, "scaling": "log"},
        warmup_factor={"min": 0.02, "max": 0.1, "scaling": "linear"},
        use_nadam={"feasible_points": [True, False]},
    )
    path = written(tmp_path, space)
    points = hparams.read_points(path, 64, FIELDS, "ogbg_mini")
    assert points == hparams.read_points(path, 64, FIELDS)
    assert points[:5] == hparams.read_points(path, 5, FIELDS)
    logs = np.log10([p["learning_rate"] for p in points])
    assert -4 <= logs.min() < -3.9 and -2.1 < logs.max() <= -2
    assert abs(logs.mean() + 3) < 0.05  # even on the log scale
    assert 28 <= sum(p["use_nadam"] for p in points) <= 36
    assert len({tuple(p.values()) for p in points}) == 64


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[{", "not valid JSON"),
        ("", "not valid JSON"),
        (b'[{"tau": "\xff"}]', "byte 10 is not UTF-8"),
        ("[" * 200_000, "nested too deeply"),
        ("[" + "7" * 5000 + "]", "a number of 5000 digits"),
        ('[{"tau": NaN}]', "NaN is no number"),
        ('[{"tau": -Infinity}]', "-Infinity is no number"),
        ('[{"tau": 1e999}]', "1e999 is larger than any number"),
        ('[{"tau": 1e-400}]', "1e-400 is nearer to 0 than any number"),
        ('[{"tau": 0.1, "tau": 0.2}]', '"tau" is there twice'),
        (" " * (1 << 20) + "[]", "1048578 bytes: a search space file is at most 1048576"),
        ("3", "a list of points or an object of ranges"),
        ([], "the list of points is empty"),
        ([point(), point(one_dim=...)], "key 'one_dim' is in point 1 and not in point 2"),
        ([point(one_dim=...), point()], "key 'one_dim' is in point 2 and not in point 1"),
        ([3], "point 1 is 3, not an object"),
        ([point(), point(learning_rate="big")], 'point 2: learning_rate is "big": .* a number at'),
        (ranges(a=3), '"a" is no field'),
        (ranges(tau={"min": 1}), 'tau: keys "min"; right are feasible_points, or min'),
        (ranges(tau={"min": 0.2, "max": 0.1, "scaling": "linear"}), "min 0.2, max 0.1"),
        (ranges(tau={"min": 0, "max": 0.5, "scaling": "log"}), 'scaling "log"'),
        (ranges(tau={"min": 0, "max": 0.5, "scaling": "cubic"}), 'scaling "cubic"'),
        (ranges(tau={"min": 0, "max": 0.5, "scaling": ["log"]}), 'scaling ."log".: linear'),
        (ranges(tau={"min": 0, "max": 10**400, "scaling": "linear"}), "a number of 401 digits"),
        (ranges(tau={"feasible_points": []}), "feasible_points is .., not a list"),
        (ranges(tau={"feasible_points": [0.1, 7]}), "tau is 7"),
        (ranges(tau=3), "tau: 3 is neither"),
        (
            ranges(precondition_frequency={"min": 1, "max": 9, "scaling": "linear"}),
            "precondition_frequency: takes feasible_points alone",
        ),
    ],
)
def test_a_malformed_search_space_is_named_with_key_and_value(tmp_path, content, named):
    with pytest.raises(UserError, match=named) as raised:
        hparams.read_points(written(tmp_path, content), 1, FIELDS)
    message = str(raised.value)
    assert "space.json" in message and "\n" not in message and len(message) < 400


def test_a_missing_file_and_too_few_points(tmp_path):
    with pytest.raises(UserError, match="no such search space"):
        hparams.read_points(tmp_path / "none.json", 1, FIELDS)
    with pytest.raises(UserError, match="3 points asked for, the file has 1"):
        hparams.read_points(written(tmp_path, [POINT]), 3, FIELDS)


def test_a_search_space_is_an_ordinary_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, word in (
        (tmp_path, "a folder"),
        (tmp_path / "pipe", "a pipe"),
        (Path("/dev/zero"), "a device"),
        (tmp_path / "loop", "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ):
        with pytest.raises(UserError, match=word):
            hparams.read_points(path, 1, FIELDS)


def test_settings_change_the_point_and_not_the_file():
    own = point()
    changes = hparams.parse_settings(FIELDS, "20", "0", "learning_rate=0.02 one_dim=adam")
    changed = hparams.override(own, changes, FIELDS, "here")
    assert changed == point(precondition_frequency=20, tau=0.0, learning_rate=0.02, one_dim="adam")
    assert own == POINT
    with pytest.raises(UserError, match="here: learning_rate 1000.0 times weight_decay 0.5"):
        hparams.override(own, {"learning_rate": 1e3, "weight_decay": 0.5}, FIELDS, "here")


@pytest.mark.parametrize(
    ("f", "tau", "text", "named"),
    [
        (None, "0.1", None, "TAU=0.1: tau is a field that this variant does not read"),
        ("5", None, "precondition_frequency=5", "is given by F= or TAU= as well"),
        (None, None, "learning_rte=1", "did you mean learning_rate"),
        (None, None, "lr=1", "did you mean learning_rate"),
        (None, None, "learning_rate", "not of the form field=value"),
        (None, None, "learning_rate=", 'learning_rate is ""'),
        (None, None, "learning_rate=1e308", "learning_rate is 1e.308"),
        (None, None, "learning_rate=NaN", 'learning_rate is "NaN"'),
        (None, None, "learning_rate=1 learning_rate=1", "twice"),
        (None, None, "one_dim=half", 'one_dim is "half": it must be "full" or "adam"'),
        (None, None, "use_nadam=no", 'use_nadam is "no": it must be true or false'),
        (None, None, "use_nadam=" + "9" * 9000, "use_nadam is"),
    ],
)
def test_bad_settings_are_named(f, tau, text, named):
    with pytest.raises(UserError, match=named) as raised:
        hparams.parse_settings(("factors",), f, tau, text)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "abc", "", "1e3", "1_0", "²", "9" * 5000])
def test_bad_f(text):
    with pytest.raises(UserError, match="F="):
        hparams.parse_f(text)


@pytest.mark.parametrize("text", ["1", "1.5", "-0.1", "nan", "inf", "x", "0_1", "٠"])
def test_bad_tau(text):
    with pytest.raises(UserError, match="TAU="):
        hparams.parse_tau(text)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_keys_are_values_and_differ(seed, data):
    key = prng.PRNGKey(seed)
    assert key.dtype == np.uint32 and key.shape == (2,)
    assert (prng.PRNGKey(seed) == key).all()
    keys = [key, prng.fold_in(key, data), *prng.split(key, 4)]
    assert len({tuple(k) for k in keys}) == 6
    assert (prng.fold_in(key, data) == keys[1]).all()


def test_every_seed_is_its_own_and_zero_is_one_of_them():
    assert len({tuple(prng.PRNGKey(seed)) for seed in range(1000)}) == 1000
    with pytest.raises(ValueError, match="outside"):
        prng.PRNGKey(-1)


def test_every_variant_of_the_suite_keeps_the_contract():
    names = submission_loader.variants(ROOT)
    assert {"shampoo_grafting", "eshampoo_fixed", "eshampoo_adaptive", "nadamw"} <= set(names)
    for name in names:
        submission = submission_loader.load(ROOT, name)
        assert submission.batch_size("fastmri_mini") >= 1


def test_the_fields_of_a_submission_are_read_without_importing_it(tmp_path):
    expected = ("factors", "tau", "grafting", "grafting_epsilon")
    assert submission_loader.fields(ROOT, "shampoo_adaptive") == expected
    path = tmp_path / "submissions" / "mine" / "submission.py"
    path.parent.mkdir(parents=True)
    for text, named in (
        ("x = 1", "lacks FIELDS"),
        ("FIELDS = f()", "no tuple of strings"),
        ('FIELDS = "factors"', "no tuple of strings"),
        ('FIELDS = ("factors", "taus")', "taus.* is no declared field .did you mean tau"),
        ("def", "cannot be read as a Python module"),
        ("x = 1\0", "cannot be read as a Python module"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=named):
            submission_loader.fields(tmp_path, "mine")


def test_an_unknown_variant_is_named_with_the_known_ones():
    with pytest.raises(UserError, match="unknown variant 'x': submissions/ has eshampoo_adaptive"):
        submission_loader.load(ROOT, "x")


@pytest.mark.parametrize(
    ("replaced", "named"),
    [
        ({"update_params": None}, "no function update_params"),
        (
            {"data_selection": lambda workload, input_queue: 0},
            "data_selection.* too many",
        ),
        (
            {"update_params": lambda workload, batch: 0},
            "update_params.* unexpected keyword",
        ),
        ({"prepare_for_eval": lambda **k: 0, "get_batch_size": lambda: 1}, "get_batch_size"),
    ],
)
def test_a_submission_off_the_contract_is_named(replaced, named):
    with pytest.raises(UserError, match=named):
        fakes.make_submission(**replaced)


def test_batch_size_falls_back_to_the_base_workload():
    def get_batch_size(workload_name):
        if workload_name != "fastmri":
            raise ValueError(workload_name)
        return 7

    submission = fakes.make_submission(get_batch_size=get_batch_size)
    assert submission.batch_size("fastmri_mini") == 7
    with pytest.raises(ValueError, match="ogbg"):
        submission.batch_size("ogbg_mini")


def test_modules_without_prepare_for_eval_are_fine():
    module = types.SimpleNamespace(**vars(fakes.make_submission(prepare_for_eval=None)))
    assert module.prepare_for_eval is None
