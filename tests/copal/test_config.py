from __future__ import annotations

import math

import pytest
import yaml

from copal.config import CalibrationConfig, PruneConfig, canonical_json, from_mapping
from copal.errors import SettingsError


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5, math.nan, "half", True, None, "4:2", "0:4", "2:4:8", "4:4"])
def test_sparsity_outside_the_open_interval_is_refused_by_name(sparsity):
    with pytest.raises(SettingsError, match=r"prune\.sparsity must be between 0 and 1"):
        PruneConfig(sparsity=sparsity)


def test_a_pattern_without_quotes_is_what_yaml_makes_of_it_and_the_error_says_so():
    with pytest.raises(SettingsError, match=r'in quotes such as "2:4" .* not 124'):
        PruneConfig(sparsity=yaml.safe_load("2:4"))


@pytest.mark.parametrize(("sparsity", "share"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75), (0.6, 0.6)])
def test_a_pattern_says_how_many_stay(sparsity, share):
    config = PruneConfig(sparsity=sparsity)
    assert config.share == share
    assert (config.pattern is None) == isinstance(sparsity, float)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"criterion": "magnitude"}, r"prune\.criterion"),
        ({"rounds": [0.5, 0.4, 1]}, r"prune\.rounds"),
        ({"rounds": [0.5, 0.9]}, r"prune\.rounds"),
        ({"rounds": []}, r"prune\.rounds"),
        ({"rounds": 1}, r"prune\.rounds"),
        ({"iterations": 0}, r"prune\.iterations"),
        ({"damping": 0}, r"prune\.damping"),
        ({"sparsities": 0.5}, r"prune\.sparsities is not a setting"),
    ],
)
def test_a_bad_setting_is_named(values, named):
    with pytest.raises(SettingsError, match=named):
        from_mapping(PruneConfig, "prune", values)


def test_at_least_eight_evaluation_windows():
    with pytest.raises(SettingsError, match=r"calibration\.evaluation_windows must be a whole number of at least 8"):
        CalibrationConfig(evaluation_windows=7)


def test_fingerprints_depend_on_values_not_on_their_spelling():
    assert (
        PruneConfig(rounds=[0.5, 1], damping=1).fingerprint()
        == PruneConfig(rounds=(0.5, 1.0), damping=1.0).fingerprint()
    )
    assert PruneConfig().fingerprint() != PruneConfig(iterations=3).fingerprint()


def test_what_alters_no_statistic_alters_no_statistics_fingerprint():
    assert CalibrationConfig(evaluation_windows=9).fingerprint() == CalibrationConfig().fingerprint()
    assert CalibrationConfig(seed=1).fingerprint() != CalibrationConfig().fingerprint()


def test_states_of_before_the_names_of_fields_still_fit():
    old = "13bb16981fc264d2c75ff51d26a1582c30ecf1da420a11a6171df0f5faa89a12"
    assert CalibrationConfig().fingerprint() == old
    assert CalibrationConfig(text_field="body").fingerprint() != old
    assert CalibrationConfig(id_field="key").fingerprint() != old


def test_canonical_json_has_one_spelling_and_no_nan():
    assert canonical_json({"b": 1, "a": [1.5, "é"]}) == '{"a":[1.5,"é"],"b":1}'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(math.nan)
