"""examples/own_data.sh: a handful of images, a teacher with timm's names, a hub on loopback."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from m2mkd_jax.checkpoint.store import load_weights
from tests import foreign_networks as foreign
from tests import hub_server
from tests.e2e.command import ROOT, environment

CLASSES = ("ant", "bee", "cow", "dog", "elk")
TINY = {
    "phases": "('pt', 'm2mkd', 'e2e')",
    "data.image_size": foreign.SIDE,
    "data.workers": 0,
    "data.orientation": True,
    "teacher.patch": foreign.PATCH,
    "teacher.width": foreign.WIDTH,
    "teacher.heads": foreign.HEADS,
    "teacher.depths": "(1, 1)",
    "vmoe.patch": foreign.PATCH,
    "vmoe.width": 8,
    "vmoe.heads": 2,
    "vmoe.depths": "(1, 1)",
    "vmoe.moe_pos": "(1,)",
    "vmoe.experts": 2,
    "evaluation.batch": 5,
    "evaluation.every": 0.0,
}
# Drawing from Beta takes long to compile.
TINY |= {
    f"recipes.{phase}.{key}": value
    for phase in ("pt", "m2mkd", "e2e")
    for key, value in (("epochs", 1.0), ("batch", 5), ("mixup", 0.0), ("cutmix", 0.0))
}


def write_images(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (20, 24, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


def test_from_a_folder_to_the_hub(tmp_path, tmp_path_factory):
    data, teacher, run = tmp_path / "photos", tmp_path / "teacher.safetensors", tmp_path / "run"
    write_images(data)
    save_file(foreign.timm_vit(layer_scale=True), teacher)
    flags = [f"--config.{key}={value}" for key, value in TINY.items()]
    with hub_server.running() as hub:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {"PATH": path, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub")}
        command = ["bash", "examples/own_data.sh", data, teacher, "me/photos", run, *flags]
        done = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=environment(tmp_path_factory) | env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == f"equal logits; classes: {', '.join(CLASSES)}"
        assert "`image_folder`, 5 classes" in hub.files["me/photos"]["README.md"].decode()
    with (run / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["image"]).parent.name for row in rows] == list(CLASSES)
    assert {row["name_1"] for row in rows} <= set(CLASSES)
    assert (run / "report" / "index.html").is_file()
    assert (run / "network.stablehlo.json").is_file()
    _, description = load_weights(run / "jobs/e2e/weights", [])
    assert description["orientation"] is True  # which predict needs
