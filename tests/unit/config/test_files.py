"""Config files by name and by path, and what a broken one says."""

import pytest

from m2mkd_jax.config import base
from m2mkd_jax.config.files import check_overrides, find_config, read_config, shipped_configs
from m2mkd_jax.errors import UserError


def test_a_name_is_a_shipped_config_and_a_path_is_left_alone():
    assert find_config("nac_digits") == str(shipped_configs()["nac_digits"])
    for path in ("nac_digits.py", "./nac_digits", "some/where.py"):
        assert find_config(path) == path


def test_an_unknown_name_says_which_one_was_meant():
    with pytest.raises(UserError, match=r'no config "vmoe_digit" .*did you mean "vmoe_digits"'):
        find_config("vmoe_digit")


def test_a_file_gets_its_argument():
    path = str(shipped_configs()["nac_imnet"])
    assert read_config(path, ("ring",)).nac.prior == "ring-of-cliques"
    with pytest.raises(UserError, match='no prior "rings"'):
        read_config(path, ("rings",))


def test_a_broken_file_says_where(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("def get_config():\n    return {}['a']\n")
    with pytest.raises(UserError, match=r"broken\.py, line 2: KeyError: a"):
        read_config(str(file))
    with pytest.raises(FileNotFoundError):
        read_config(str(tmp_path / "none.py"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import sys\nsys.exit(0)\n", r"line 2: SystemExit: 0"),
        ("get_configs = 1\n", "defines no get_config"),
    ],
)
def test_a_file_that_gives_no_config_is_refused(tmp_path, text, says):
    file = tmp_path / "config.py"
    file.write_text(text)
    with pytest.raises(UserError, match=says):
        read_config(str(file))


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--config.seeed=1", 'did you mean "seed"'),
        ("--config.data=1", "is a group of keys"),
        ("--config.recipes.mt.modules.0.epochs=1", "numbers of modules cannot stand in a flag"),
        (
            "--config.recipes.mt.modules['1'].epochs=1",
            r"one entry cannot be set alone; .* --config.recipes.mt.modules=\"{}\"",
        ),
        ("--config.seed=1e2", "seed is '1e2'; it must be a whole number, such as 0$"),
        ("--config.seed=True", "seed is 'True'; it must be a whole number"),
        ("--config.seed=", "seed is ''; it must be a whole number"),
        ("--config.recipes.mt.lr=1,5", "recipes.mt.lr is '1,5'; it must be a number, such as 0"),
        ("--config.nac.truncation=None", "must be a number, such as 0.9; None is for config files"),
    ],
)
def test_overrides_of_unknown_keys_and_of_another_kind_are_refused(argument, says):
    with pytest.raises(UserError, match=says):
        check_overrides([argument], base())
    with pytest.raises(UserError, match=says):
        check_overrides(argument.split("=", 1), base())


def test_other_flags_are_no_overrides():
    check_overrides(["--config=x", "--workdir=config.y", "--config.seed=1"], base())
    check_overrides(["--config.seed=0x10", "--config.recipes.mt.lr", "1e-3", "x"], base())
