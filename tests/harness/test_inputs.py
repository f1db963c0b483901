"""Search spaces, keys, submissions: what is taken, and how what is wrong is named."""

from __future__ import annotations

import json
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


def written(tmp_path, content) -> Path:
    path = tmp_path / "space.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_list_gives_its_points_in_order(tmp_path):
    points = [{"learning_rate": 0.1}, {"learning_rate": 0.2}]
    assert hparams.read_points(written(tmp_path, points), 2) == points
    assert hparams.as_namedtuple(points[1]).learning_rate == 0.2


def test_a_file_of_points_per_workload(tmp_path):
    space = {"ogbg_mini": [{"tau": 0.1}], "fastmri": [{"tau": 0.2}]}
    path = written(tmp_path, space)
    assert hparams.read_points(path, 1, "ogbg_mini") == [{"tau": 0.1}]
    assert hparams.read_points(path, 1, "fastmri_mini") == [{"tau": 0.2}]
    with pytest.raises(UserError, match="no points for 'imagenet_vit_mini': it has ogbg_mini"):
        hparams.read_points(path, 1, "imagenet_vit_mini")


def test_ranges_are_drawn_inside_and_the_same_each_time(tmp_path):
    space = {
        "learning_rate": {"min": 1e-4, "max": 1e-2, "scaling": "log"},
        "warmup_factor": {"min": 0.02, "max": 0.1, "scaling": "linear"},
        "use_nadam": {"feasible_points": [True, False]},
    }
    path = written(tmp_path, space)
    points = hparams.read_points(path, 64, "ogbg_mini")
    assert points == hparams.read_points(path, 64)
    assert points[:5] == hparams.read_points(path, 5)
    logs = np.log10([p["learning_rate"] for p in points])
    assert -4 <= logs.min() < -3.9 and -2.1 < logs.max() <= -2
    assert abs(logs.mean() + 3) < 0.05  # even on the log scale
    assert sum(p["use_nadam"] for p in points) == 32
    assert len({tuple(p.values()) for p in points}) == 64


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[{", "not valid JSON"),
        ("3", "a list of points or an object of ranges"),
        ([], "the list of points is empty"),
        ([{"a": 1}, {"a": 1, "b": 2}], "key 'b' is in point 2 and not in point 1"),
        ([{"a": 1, "b": 2}, {"a": 1}], "key 'b' is in point 1 and not in point 2"),
        ([3], "point 1 is 3, not an object"),
        ([{"learning_rate": "big"}], "learning_rate is 'big': a number above 0"),
        ([{"learning_rate": -1}], "learning_rate is -1"),
        ([{"precondition_frequency": 0}], "precondition_frequency is 0: an integer of at least 1"),
        ([{"precondition_frequency": 2.5}], "precondition_frequency is 2.5"),
        ([{"tau": 1.5}], "tau is 1.5: at least 0 and below 1"),
        ([{"a": [1, 2]}], "a is .1, 2.: one value, not a list"),
        ({"a": {"min": 1}}, "space.json: a: keys min; right are feasible_points, or min"),
        ({"a": {"min": 2, "max": 1, "scaling": "linear"}}, "min 2, max 1"),
        ({"a": {"min": 0, "max": 1, "scaling": "log"}}, "scaling 'log'"),
        ({"a": {"min": 0, "max": 1, "scaling": "cubic"}}, "scaling 'cubic'"),
        ({"a": {"feasible_points": []}}, "feasible_points is .., not a list"),
        ({"a": 3}, "a: 3 is neither"),
    ],
)
def test_a_malformed_search_space_is_named_with_key_and_value(tmp_path, content, named):
    with pytest.raises(UserError, match=named) as raised:
        hparams.read_points(written(tmp_path, content), 1)
    assert "space.json" in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_file_and_too_few_points(tmp_path):
    with pytest.raises(UserError, match="no such search space"):
        hparams.read_points(tmp_path / "none.json", 1)
    with pytest.raises(UserError, match="3 points asked for, the file has 1"):
        hparams.read_points(written(tmp_path, [{"a": 1}]), 3)


def test_overrides_change_the_point_and_not_the_file(tmp_path):
    point = {"precondition_frequency": 50, "tau": 0.1, "a": 1}
    changed = hparams.override(point, 20, 0.0, "here")
    assert changed == {"precondition_frequency": 20, "tau": 0.0, "a": 1}
    assert point["precondition_frequency"] == 50
    with pytest.raises(UserError, match="TAU=0.1: here has no field 'tau'"):
        hparams.override({"a": 1}, None, 0.1, "here")


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "abc", "", "1e3"])
def test_bad_f(text):
    with pytest.raises(UserError, match="F="):
        hparams.parse_f(text)


@pytest.mark.parametrize("text", ["1", "1.5", "-0.1", "nan", "inf", "x"])
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
