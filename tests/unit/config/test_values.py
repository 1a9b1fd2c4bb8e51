"""Keys by themselves: unknown and missing ones, types and ranges are refused in one line."""

import pytest
from ml_collections import ConfigDict

from m2mkd_jax.config.values import check_values
from m2mkd_jax.errors import UserError
from tests.shipped import change, digits


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("teacher.depths", (2, "a", 2, 2, 2, 2)),
        ("teacher.depths", (0, 2, 2, 2, 2, 2)),
        ("detection.data.mean", (0.5, 0.5)),
        ("data.std", (0.0, 1.0, 1.0)),
        ("data.workers", -9),
        ("recipes.e2e.lr", -1.0),
        ("recipes.e2e.lr", float("nan")),
        ("recipes.e2e.mixup", -1.0),
        ("recipes.e2e.smoothing", 2.0),
        ("recipes.e2e.mix_prob", 7.0),
        ("recipes.e2e.weight_decay", -1.0),
        ("recipes.e2e.drop_path", 1.0),
        ("recipes.e2e.ema", 1.5),
        ("recipes.e2e.ema", 0.9999999999),  # 1 in single precision: it would never move
        ("checkpoint_minutes", -1e-91),  # 0 in single precision
        ("recipes.e2e.lr", 1e39),
        ("data.mean", (1e39, 0.5, 0.5)),
        ("data.std", (1e-40, 0.5, 0.5)),
        ("distillation.temperature", 1e-40),
        ("recipes.e2e.clip", -1.0),
        ("distillation.alpha", 3.0),
        ("distillation.temperature", 0.0),
        ("evaluation.batch", 0),
        ("evaluation.every", -1.0),
        ("log_every", 0),
        ("e2e_seeds", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("nac.kernel_temperature", 0.0),
        ("nac.head_dim", 0),
        ("nac.position_dim", 0),
        ("nac.truncation", -0.5),
        ("regulariser.components", 0),
        ("regulariser.weight", -1.0),
    ],
)
def test_impossible_values_are_refused(key, value):
    """One line naming the key; the e2e phase of a run would meet them after hours."""
    config = digits()
    change(key, value)(config)
    with pytest.raises(UserError) as error:
        check_values(config)
    assert f"config.{key}" in str(error.value) and "\n" not in str(error.value)


def test_a_config_without_a_key_is_refused():
    config = ConfigDict({k: v for k, v in digits().items() if k != "mesh"})
    with pytest.raises(UserError, match=r"config\.mesh\.data is missing"):
        check_values(config)


def test_truncation_may_be_none():
    config = digits()
    change("nac.truncation", None)(config)
    check_values(config)
