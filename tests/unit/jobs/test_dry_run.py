"""What --dry_run says about devices that are not here."""

import re
import runpy

import jax
import numpy as np
import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs.checks import validate_jobs
from m2mkd_jax.jobs.data_checks import missing_data
from m2mkd_jax.jobs.dry_run import describe_costs, dry_run, job_costs, planned_mesh
from m2mkd_jax.jobs.plan import Plan
from m2mkd_jax.jobs.setup import abstract_stages, set_up
from m2mkd_jax.jobs.units import si
from m2mkd_jax.models.nac import circuit
from m2mkd_jax.parallel import backend, process
from m2mkd_jax.parallel.mesh import make_mesh
from m2mkd_jax.phases.build import build_phase
from tests.e2e import tiny, tiny_vmoe
from tests.e2e.command import ROOT


def planned(capsys, tmp_path, **mesh):
    config = tiny_vmoe.get_config()
    config.mesh.update(mesh)
    dry_run(config, tmp_path, "e2e_scratch")
    text = capsys.readouterr().out
    trained = re.search(r"memory per device: ([\d.]+) KiB trained", text)
    return text, float(trained[1])


def test_it_plans_for_a_mesh_that_is_not_here(capsys, tmp_path):
    text, whole = planned(capsys, tmp_path)
    assert "1 cpu device(s), compute type" in text
    assert re.search(r"\(data 1 x expert 1\); .*: [\d,]+ on every device\n", text)
    text, apart = planned(capsys, tmp_path, data=2, expert=4)
    assert "8 cpu device(s) (here 1), compute type" in text
    found = re.search(
        r"\(data 2 x expert 4\).*: ([\d,]+) on every device, ([\d,]+) over expert\n", text
    )
    rest, experts = (int(number.replace(",", "")) for number in found.groups())
    # Three blocks of four experts: two layers of 16 x 64, and their biases.
    assert experts == 3 * 4 * (2 * 16 * 64 + 64 + 16)
    assert whole == pytest.approx((rest + experts) / 256, rel=1e-3)
    assert apart == pytest.approx((rest + experts / 4) / 256, rel=1e-3)


@pytest.mark.parametrize(
    ("recipe", "copies"),
    [
        ({"optimizer": "lamb"}, 2),
        ({"optimizer": "adamw", "ema": 0.9}, 3),
        ({"optimizer": "lion", "accumulate": 2}, 2),
        ({"optimizer": "adafactor"}, None),
    ],
)
def test_memory_of_the_optimizer_is_that_of_a_training_state(recipe, copies):
    """Moments, accumulated gradients, moving average: as many bytes as the weights each."""
    config = tiny_vmoe.get_config()
    config.recipes.e2e.update(recipe)
    phase = build_phase(config, "e2e_scratch")
    costs = job_costs(config, phase, planned_mesh(config))
    shapes = set_up(config, phase, abstract_stages(phase))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes.params)
    state = shapes.begin(params, {})
    beside = jax.tree.leaves({k: state[k] for k in ("opt_state", "ema") if k in state})
    assert costs.optimizer == sum(leaf.nbytes for leaf in beside)
    if copies:
        assert costs.optimizer == pytest.approx(copies * costs.weights, rel=1e-3)
    assert costs.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(state["params"]))


@pytest.mark.parametrize("job", ["m2mkd/0", "m2mkd/1", "m2mkd/2"])
def test_kept_targets_are_counted_once_and_not_in_every_step(job):
    config = tiny_vmoe.get_config()
    mesh = planned_mesh(config)
    every = job_costs(config, build_phase(config, job), mesh)
    config.distillation.views = 2
    kept = job_costs(config, build_phase(config, job), mesh)
    assert every.targets == 0 < kept.targets
    assert kept.training + kept.targets == every.training
    assert kept.forward == every.forward and kept.frozen < every.frozen
    assert f"{si(kept.targets)} for each kept view, once" in describe_costs(kept)
    config.distillation.keep_targets = False
    assert job_costs(config, build_phase(config, job), mesh) == every


def test_counting_checks_no_kernels_on_the_device(monkeypatch):
    named = []
    monkeypatch.setattr(circuit, "is_fused", lambda *_: named.append(backend.is_named()) or False)
    config = tiny.get_config()
    job_costs(config, build_phase(config, "e2e_scratch"), planned_mesh(config))
    assert named and all(named)
    assert not backend.is_named()


def test_it_refuses_what_could_not_run_there(capsys, tmp_path):
    with pytest.raises(UserError, match="a multiple of 32"):
        planned(capsys, tmp_path, data=8, expert=4)


def test_missing_data_name_the_key_that_says_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("M2MKD_DATA", str(tmp_path / "here"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "there"))
    config = runpy.run_path(ROOT / "configs" / "nac_tinyimnet.py")["get_config"]()
    config.evaluation.renditions = ("tiny_imagenet_r",)
    lines = missing_data(Plan(config), Plan(config).names)
    wanted = [
        ("here/imagenet", "config.teaching_data.root"),
        ("here/tiny-imagenet-200", "config.data.root"),
        ("here/tiny-imagenet-r", "$M2MKD_DATA"),
    ]
    assert len(lines) == len(wanted)
    for line, (place, key) in zip(lines, wanted, strict=True):
        assert f"{tmp_path}/{place} ({key} says where" in line and "\n" not in line
    mesh = make_mesh()
    with pytest.raises(UserError, match=r"; no data in .*tiny-imagenet-200"):
        validate_jobs(Plan(config), tmp_path, mesh, ["pt", "e2e"])
    # One root for both, where there is one data set.
    config = runpy.run_path(ROOT / "configs" / "nac_imnet.py")["get_config"]()
    (line,) = missing_data(Plan(config), ["pt", "e2e"])
    assert "(config.data.root says where" in line


def test_only_the_main_process_prints_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "is_main", lambda: False)
    dry_run(tiny_vmoe.get_config(), tmp_path, "e2e_scratch")
    assert not capsys.readouterr().out


def test_a_token_of_the_dropless_dispatch_meets_all_experts_where_these_are_apart(capsys, tmp_path):
    """Values per image: FLOPs forward, bytes of activations."""

    def costs(**mesh):
        config = tiny_vmoe.get_config()
        config.vmoe.dispatch = "dropless"
        config.mesh.update(mesh)
        dry_run(config, tmp_path, "e2e_scratch")
        text = capsys.readouterr().out
        flops = re.search(r"FLOPs per image: ([\d.]+) k forward", text)
        kept = re.search(r"([\d.]+) (KiB|MiB) activations \((\d+) images\)", text)
        unit = {"KiB": 2**10, "MiB": 2**20}[kept[2]]
        return 1e3 * float(flops[1]), unit * float(kept[1]) / int(kept[3])

    (whole, kept), (apart, more) = costs(), costs(data=2, expert=4)
    # In each of three blocks 5 tokens go to 4 experts, not to 2: two layers of 16 x 64. The numbers
    # are rounded to three digits.
    assert apart - whole == pytest.approx(3 * 5 * 2 * 2 * (2 * 16 * 64), abs=0.01 * apart)
    # At least what goes into both layers, and out of the first.
    assert more - kept > 3 * 5 * 2 * 4 * (16 + 2 * 64)
