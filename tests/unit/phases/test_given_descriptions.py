"""Weights of config.init whose arrays fit, and which are of another network all the same."""

import numpy as np
import pytest

from m2mkd_jax.checkpoint.store import save_weights
from m2mkd_jax.errors import UserError
from m2mkd_jax.phases.given_descriptions import other_fields
from m2mkd_jax.phases.phase import WeightsFrom
from m2mkd_jax.phases.weight_files import described
from tests.e2e import tiny


def given(directory, config, job, field, **changes):
    """Leaves weights of a job as this config describes them, with changes; config.init names them.

    Of the arrays nothing is looked at here.
    """
    description = described(config, job) | {"job": job}
    fields = changes.pop("spec", {})
    description = description | {"spec": {**description["spec"], **fields}} | changes
    save_weights(directory, {"tree": {"params": np.zeros(1)}}, description)
    config.init[field] = str(directory)
    return config


def test_weights_of_this_network_say_nothing_else(tmp_path):
    config = given(tmp_path / "pt", tiny.get_config(), "pt", "meta")
    # Of these other code decides.
    config.data.classes, config.data.image_size, config.teacher.remat = 5, 32, "none"
    assert other_fields(config, tmp_path, WeightsFrom("job", "pt", "meta_0")) == []


def test_other_heads_are_refused(tmp_path):
    config = given(tmp_path / "pt", tiny.get_config(), "pt", "meta", spec={"heads": 4})
    with pytest.raises(UserError, match="was made with heads 4, and is used with 2"):
        other_fields(config, tmp_path, WeightsFrom("job", "pt", "meta_0"))


def test_another_epsilon_or_truncation_is_said(tmp_path):
    config = given(tmp_path / "ft", tiny.get_config(), "ft", "teacher", spec={"eps": 1e-5})
    (line,) = other_fields(config, tmp_path, WeightsFrom("job", "ft", "module_1"))
    assert line == f"{tmp_path / 'ft'} was made with eps 1e-05, and is used with 1e-06"
    config = given(tmp_path / "e2e", tiny.get_config(), "e2e", "network", spec={"truncation": 9.0})
    (line,) = other_fields(config, tmp_path, WeightsFrom("init", "", "nac"))
    assert "truncation 9.0" in line


def test_weights_of_another_kind_or_module_are_refused(tmp_path):
    config = given(tmp_path / "s", tiny.get_config(), "m2mkd/0", "students")
    assert other_fields(config, tmp_path, WeightsFrom("job", "m2mkd/0", "student_0")) == []
    with pytest.raises(UserError, match="weights of m2mkd/0, not those of m2mkd/1"):
        other_fields(config, tmp_path, WeightsFrom("job", "m2mkd/1", "student_1"))
    config = given(tmp_path / "v", tiny.get_config(), "pt", "meta")
    config.init.students = config.init.meta
    with pytest.raises(UserError, match="of the kind 'vit', not 'nac_student'"):
        other_fields(config, tmp_path, WeightsFrom("job", "m2mkd/0", "student_0"))
