"""Mixup and cutmix for given draws against the published code's numbers (m_mixup)."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.train.mixing import apply, cut_box, smooth_one_hot

FOLDER = Path(__file__).parents[1] / "fixtures/m_mixup"
IO = np.load(FOLDER / "io.npz")
META = json.loads((FOLDER / "meta.json").read_text())


def nhwc(images):
    return jnp.asarray(images.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("case", META)
def test_given_draw(case):
    draw = META[case]
    box = jnp.asarray(draw["bbox_yl_yh_xl_xh"] or [0, 0, 0, 0])
    targets = smooth_one_hot(jnp.asarray(IO["target"]), 10, 0.1)
    images, targets = apply(
        nhwc(IO["image"]), targets, jnp.asarray(draw["lam_used"]), draw["use_cutmix"], box
    )
    # Pixels mixed to nearly nothing are compared on the images' scale, which is about 1.
    np.testing.assert_allclose(images, nhwc(IO[f"{case}.image"]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(targets, IO[f"{case}.target"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", [c for c in META if META[c].get("centre_cy_cx")])
def test_box_and_true_share(case):
    draw = META[case]
    box = cut_box(jnp.asarray(draw["lam_drawn"]), jnp.asarray(draw["centre_cy_cx"]), (6, 32, 32, 3))
    assert box.tolist() == draw["bbox_yl_yh_xl_xh"]
    yl, yh, xl, xh = box.tolist()
    assert 1 - (yh - yl) * (xh - xl) / 32**2 == pytest.approx(draw["lam_used"], rel=1e-6)
