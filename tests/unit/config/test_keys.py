"""Every key of the config has its meaning, and docs/config.md has every key."""

import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from m2mkd_jax.config import base
from m2mkd_jax.config.defaults import all_keys
from m2mkd_jax.config.document import document, list_keys
from m2mkd_jax.config.family_sections import SECTIONS
from m2mkd_jax.config.keys import ABOVE_0, Key, default_values, flatten
from m2mkd_jax.config.values import check_value, check_values, leaves
from m2mkd_jax.data.augment import CROPS
from m2mkd_jax.data.few_shot import SELECTIONS
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs.checks import PRECISIONS, REGULARISERS
from m2mkd_jax.losses.distillation import KINDS
from m2mkd_jax.models.moe.spec import DISPATCHES, ROUTERS
from m2mkd_jax.models.nac.priors import GENERATORS
from m2mkd_jax.train.optimizer import DECAY_RULES, OPTIMIZERS
from m2mkd_jax.train.schedule import SCHEDULES
from tests.shipped import ROOT

KEYS = dict(flatten(all_keys()))


def test_every_key_has_its_meaning():
    assert [name for name, key in KEYS.items() if not key.meaning] == []


def test_base_has_every_key_with_its_default():
    found = {
        name: value.to_dict() if isinstance(value, ConfigDict) else value
        for name, value in leaves(base())
    }
    assert found == {name: key.default for name, key in KEYS.items()}
    check_values(base())


def test_defaults_are_in_their_own_range():
    for name, key in KEYS.items():
        if not isinstance(key.default, dict):
            check_value(name, key.default, key)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("data.augment.crop", CROPS),
        ("few_shot.selection", SELECTIONS),
        ("precision", PRECISIONS),
        ("regulariser.kind", REGULARISERS),
        ("distillation.kind", KINDS),
        ("vmoe.dispatch", DISPATCHES),
        ("vmoe.router", ROUTERS),
        ("nac.prior", GENERATORS),
        ("recipes.pt.decay_rule", DECAY_RULES),
        ("recipes.pt.optimizer", OPTIMIZERS),
        ("recipes.pt.schedule", SCHEDULES),
    ],
)
def test_the_meaning_names_every_choice(name, choices):
    words = KEYS[name].meaning.replace(",", " ").replace(";", " ").replace(":", " ").split()
    assert set(choices) <= set(words)


def test_the_document_is_made_from_the_keys():
    """`make docs` writes it anew."""
    assert (ROOT / "docs" / "config.md").read_text() == document()


def test_the_document_has_every_key_once():
    rows = [line.split("`")[1] for line in document().splitlines() if line.startswith("| `")]
    again = ("teaching_data.", "few_shot.data.", *(f"recipes.{p}." for p in ("mt", "ft", "m2mkd")))
    again += ("recipes.e2e.", "recipes.fewshot.")
    assert sorted(rows) == sorted(name for name in KEYS if not name.startswith(again))


def test_a_listed_key_has_value_and_meaning():
    config = base()
    config.seed = 7
    lines = list_keys(config)
    assert f"config.seed = 7  # {KEYS['seed'].meaning}" in lines
    assert len(lines) == len(KEYS)


class Students:
    """The part of a family of one's own that the config reads."""

    section = "own"

    @staticmethod
    def defaults():
        return {"width": Key(8, "channels", ABOVE_0), "depth": 2, "deep": {"bias": True}}


def test_a_section_of_ones_own_may_leave_meanings_out():
    config = base(f"{__name__}:Students")
    assert config.own.to_dict() == {"width": 8, "depth": 2, "deep": {"bias": True}}
    check_values(config)
    config.own.width = 0
    with pytest.raises(UserError, match=r"config\.own\.width is 0; it must be above 0"):
        check_values(config)


def test_free_keys_are_not_shared_between_configs():
    one, other = base(), base()
    one.recipes.mt.modules = {"0": {"epochs": 2}}
    with one.unlocked():
        one.nac.options["m"] = 2
    assert not other.recipes.mt.modules and not other.nac.options
    assert default_values({"options": {}})["options"] is not SECTIONS["nac"]()["options"].default


def test_importing_config_loads_no_jax():
    """The files that describe a config are read by tools that have no accelerator to start."""
    modules = ", ".join(
        f"m2mkd_jax.config.{path.stem}"
        for path in sorted((ROOT / "m2mkd_jax" / "config").glob("[!_]*.py"))
    )
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
