"""Choices of a recipe and of starting weights, from the config to what a job leaves."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.checkpoint.store import save_weights
from m2mkd_jax.conversion.open_weights import open_weights
from m2mkd_jax.conversion.resize_positions import resize_positions
from m2mkd_jax.errors import UserError
from m2mkd_jax.inference import load
from m2mkd_jax.jobs.checks import validate
from m2mkd_jax.jobs.data_checks import check_normalisation
from m2mkd_jax.jobs.detection_checks import check_detection
from m2mkd_jax.jobs.pipeline import run
from m2mkd_jax.jobs.plan import Plan
from m2mkd_jax.jobs.setup import make_program
from m2mkd_jax.models import chain
from m2mkd_jax.phases.build import build_phase
from m2mkd_jax.phases.families import teacher
from m2mkd_jax.phases.initial_weights import check_given, load_stages
from tests.e2e import tiny, tiny_vmoe
from tests.random_params import random_params


def apply(config, changes):
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def test_tuning_looks_at_validation_and_eval_at_test(tmp_path, capsys):
    changes = {
        "phases": ("pt", "eval"),
        "evaluation.networks": ("pt",),
        "data.validation": 0.1,
        "data.test_images": 0,
        "data.channels": 1,
        "data.mean": (0.5,),
        "data.std": (0.25,),
        "vmoe.keep_stitches": False,
        "recipes.pt.epochs": 1.0,
        "recipes.pt.schedule": "constant",
        "recipes.pt.optimizer": "lion",
        "recipes.pt.layer_decay": 0.5,
        "recipes.pt.freeze": ("meta_0/*", "*/norm1/*"),
        "recipes.pt.class_weights": "balanced",
    }
    config = apply(tiny_vmoe.get_config(), changes)
    summary = run(config, tmp_path)
    done = json.loads((tmp_path / "jobs/pt/done.json").read_text())
    assert done["metrics"]["eval_images"] == 143
    networks = json.loads((tmp_path / "jobs/eval/done.json").read_text())["networks"]
    assert networks["pt"]["eval_images"] == 360
    assert summary["results"]["meta"] == networks["pt"]["eval_accuracy"]
    assert "validation images" in summary["accuracy_of"]
    model = load(tmp_path / "jobs/pt/weights")
    assert model.channels == 1 and model.mean == [0.5]
    assert model(np.zeros((1, 16, 16, 1), np.float32)).shape == (1, 10)
    assert (tmp_path / "jobs/pt/images.png").is_file()
    # Fresh biases are 0 and fresh scales 1.
    trained = {n: t["params"] for n, t in open_weights(tmp_path / "jobs/pt/weights").trees.items()}
    assert not np.any(trained["meta_0"]["blocks"]["attn"]["qkv"]["bias"])
    assert np.all(trained["meta_1"]["blocks"]["norm1"]["scale"] == 1)
    assert np.any(trained["meta_1"]["blocks"]["attn"]["qkv"]["bias"])
    assert np.any(trained["meta_2"]["head"]["bias"])


def test_a_linear_probe_trains_the_head_alone():
    for family, job, head in (
        (tiny.get_config(), "e2e_scratch", "nac/pooling/to_logits/*"),
        (tiny_vmoe.get_config(), "e2e_scratch", "vmoe_2/head/*"),
        (tiny_vmoe.get_config(), "ft", "module_2/head/*"),
    ):
        name = job.partition("_")[0]
        config = apply(family, {f"recipes.{name}.linear_probe": True})
        assert build_phase(config, job).recipe.train_only == (head,)


def test_weights_of_classes_come_from_the_training_images():
    changes = {"recipes.pt.class_weights": "balanced", "data.train_images": 155}
    config = apply(tiny_vmoe.get_config(), changes)
    program = make_program(config, build_phase(config, "pt"))
    expected = sorted([155 / (10 * 15)] * 5 + [155 / (10 * 16)] * 5)
    np.testing.assert_allclose(sorted(program.class_weights), expected)
    config = tiny_vmoe.get_config()
    assert make_program(config, build_phase(config, "pt")).class_weights == ()


def test_training_goes_on_from_another_head_and_image_size(tmp_path, capsys):
    config = tiny_vmoe.get_config()
    given = {
        name: {"params": random_params(chain.abstract(spec.build).params, seed=7)}
        for name, spec in build_phase(config, "ft").stages.items()
    }
    describe = teacher(config).describe(teacher(config).depths)
    save_weights(tmp_path / "given", given, describe | {"job": "ft"})
    changes = {
        "data.image_size": 32,
        "data.classes": 7,
        "init.modules": str(tmp_path / "given"),
        "init.fresh_head": True,
    }
    config = apply(tiny_vmoe.get_config(), changes)
    assert not any(name.startswith("mt") for name in Plan(config).names)
    assert Plan(config).job("ft").inputs["config"]["init.fresh_head"] is True
    phase = build_phase(config, "ft")
    check_given(config, tmp_path, [phase])
    assert "positions interpolated from 2 x 2 to 4 x 4 patches" in capsys.readouterr().out
    stages, origin = load_stages(config, tmp_path, phase)
    first, last = (stages[name]["params"] for name in ("module_0", "module_2"))
    positions = np.asarray(given["module_0"]["params"]["pos_embed"])
    np.testing.assert_array_equal(first["pos_embed"], resize_positions(positions, 4))
    np.testing.assert_array_equal(
        last["norm"]["scale"], given["module_2"]["params"]["norm"]["scale"]
    )
    assert last["head"]["kernel"].shape == (16, 7) and not np.any(last["head"]["bias"])
    assert origin["module_2"].endswith("last layer fresh")
    config.init.fresh_head = False
    with pytest.raises(UserError, match=r"config.init.modules: .* shape"):
        check_given(config, tmp_path, [phase])


def grey(channels=1, **changes):
    """The changes of a config for images of so many channels."""
    values = {"data.channels": channels, "data.mean": (0.5,) * channels}
    return values | {"data.std": (0.25,) * channels} | changes


@pytest.mark.parametrize(("config", "channels"), [(tiny, 1), (tiny_vmoe, 4)])
def test_a_teacher_of_rgb_images_teaches_for_other_channels(config, channels, tmp_path, capsys):
    rgb = config.get_config()
    given = {
        name: {"params": random_params(chain.abstract(spec.build).params, seed=7)}
        for name, spec in build_phase(rgb, "ft").stages.items()
    }
    describe = teacher(rgb).describe(teacher(rgb).depths)
    normalisation = {"normalisation": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2]}}
    save_weights(tmp_path / "given", given, describe | {"job": "ft"} | normalisation)
    phases = ("m2mkd", "e2e_kd", "eval")
    changes = {"phases": phases, "init.teacher": str(tmp_path / "given")}
    wanted = apply(config.get_config(), grey(channels) | changes)
    with wanted.unlocked():
        wanted.data.name, wanted.data.root = "image_folder", "unread"
    plan = validate(wanted)  # all stages fit together
    phase = build_phase(wanted, "e2e_kd")
    check_given(wanted, tmp_path, [phase])
    how = "summed" if channels == 1 else "repeated, times 3 / 4,"
    said = f"config.init.teacher: patch embedding {how} from 3 channels to {channels}"
    assert said in capsys.readouterr().out
    check_normalisation(plan, tmp_path, ["e2e_kd"])
    params = load_stages(wanted, tmp_path, phase)[0]["module_0"]["params"]
    theirs, mine = (
        chain.merge(chain.abstract(spec.stages["module_0"].build).graph, tree, {})
        for spec, tree in (
            (build_phase(rgb, "ft"), given["module_0"]["params"]),
            (phase, params),
        )
    )
    # A grey image looks to the teacher as it did in RGB.
    image = np.random.default_rng(0).standard_normal((2, 16, 16, 1), np.float32)
    alike = np.repeat(image, 3, -1), np.repeat(image, channels, -1)
    if channels == 4:  # of which the first channel is repeated, and counts twice
        kernel = np.asarray(given["module_0"]["params"]["patch_embed"]["linear"]["kernel"])
        own = np.asarray(params["patch_embed"]["linear"]["kernel"]).reshape(64, 4, 16)
        np.testing.assert_allclose(own, kernel.reshape(64, 3, 16)[:, [0, 1, 2, 0]] * 0.75)
    else:
        outputs = [m(jnp.asarray(x)) for m, x in zip((theirs, mine), alike, strict=True)]
        np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (grey() | {"data.mean": (0.5, 0.5)}, "data.mean has 2 values and data.channels is 1"),
        (grey(4), "data.channels is 4: digits is grey"),
        (grey() | {"data.augment.color_jitter": 0.4}, r"data.augment.color_jitter=0.0"),
        (grey() | {"data.augment.rand_augment": "rand-m9"}, r"data.augment.rand_augment=''"),
        (
            grey()
            | {
                "teaching_data.name": "digits",
                "teaching_data.image_size": 16,
                "teaching_data.classes": 10,
            },
            "config.teaching_data.channels is 3",
        ),
        (
            grey() | {"phases": ("e2e_scratch", "fewshot"), "few_shot.network": "e2e_scratch"},
            "config.few_shot.data.channels is 3",
        ),
        ({"data.channels": 0}, "must be above 0"),
        ({"recipes.e2e.schedule": "one_cycle"}, "warmup_epochs; that is 0"),
        ({"recipes.m2mkd.linear_probe": True}, "only pt, ft and e2e"),
        ({"recipes.mt.layer_decay": 0.9}, "only pt, ft and e2e"),
        ({"recipes.e2e.layer_decay": 0.9}, "a NAC has none"),
        ({"recipes.ft.linear_probe": True, "recipes.ft.freeze": ("a",)}, "leave .*freeze empty"),
        ({"recipes.ft.class_weights": "balanced", "data.sampler": "balanced"}, "set one"),
        ({"recipes.ft.optimizer": "adam"}, 'did you mean "adamw"'),
        ({"recipes.ft.freeze": ("modul_0/*",)}, r"recipes.ft \(ft\): freeze: 'modul_0/\*' fits no"),
        ({"recipes.ft.class_weights": "inverse"}, "must be none or balanced"),
        ({"data.validation": 1.0}, "data.validation is 1.0"),
        ({"init.fresh_head": True}, "nothing to take the rest from"),
    ],
)
def test_what_cannot_work_is_refused_before_work(changes, words):
    with pytest.raises(UserError, match=words) as error:
        validate(apply(tiny.get_config(), changes))
    assert "\n" not in str(error.value)


def test_detectors_take_images_in_rgb():
    config = apply(tiny_vmoe.get_config(), grey() | {"phases": ("detect",)})
    with pytest.raises(UserError, match=r"config.data.channels is 1: detectors take scenes in RGB"):
        check_detection(config, 1)


def test_runs_of_earlier_versions_keep_their_inputs():
    inputs = Plan(tiny.get_config()).job("pt").inputs["config"]
    new = (
        "channels",
        "validation",
        "sampler",
        "orientation",
        "freeze",
        "layer_decay",
        "class_weights",
    )
    assert not [key for key in inputs if key.rpartition(".")[2] in new]
    held = Plan(apply(tiny.get_config(), {"data.validation": 0.1})).job("pt").inputs["config"]
    assert held["data.validation"] == 0.1
