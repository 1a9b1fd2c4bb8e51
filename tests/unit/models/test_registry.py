"""From a description to stages, and kinds of network of one's own."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import m2mkd_jax
from m2mkd_jax.checkpoint.store import save_weights
from m2mkd_jax.errors import UserError
from m2mkd_jax.models import chain, registry, variants
from m2mkd_jax.models.moe.spec import VMoESpec, student_spec
from m2mkd_jax.models.vit_spec import ViTSpec
from tests.tiny_nac import SPEC as NAC_SPEC

VIT = ViTSpec(image_size=16, patch=8, width=12, heads=2, classes=5)
MOE = VMoESpec(VIT, (0, 1), experts=2)
STUDENTS = student_spec(MOE, (1, 1, 1), stitch_dim=8)


def described(kind, spec, **fields):
    return {"kind": kind, "spec": dataclasses.asdict(spec), **fields}


@pytest.mark.parametrize(
    "description, names, expected",
    [
        (described("vit", VIT, depths=[1, 1, 1]), ["meta_0", "meta_1", "meta_2"], (16, 0, 5)),
        (described("vit", VIT, depths=[1, 1, 1]), ["module_1"], (0, 12, 0)),
        (described("vit", VIT, depths=[1, 1, 1]), ["module_1", "module_2"], (0, 12, 5)),
        (described("vmoe", MOE, depths=[1, 1, 1]), ["vmoe_0"], (16, 0, 0)),
        (described("vmoe", MOE, depths=[1, 1, 1]), ["vmoe_1"], (0, 12, 0)),
        (described("vmoe", STUDENTS, depths=[1, 1, 1]), ["student_1"], (0, 8, 0)),
        (
            described("vmoe", VMoESpec(VIT, (0,), experts=2), depths=[1], first=True, last=False),
            ["student_0"],
            (16, 0, 0),
        ),
        (described("nac", NAC_SPEC), ["nac"], (16, 0, 5)),
        (
            described("nac_student", NAC_SPEC, modules=4, stitch_dim=9, states=2),
            ["student_2"],
            (0, 9, 0),
        ),
        (
            described("nac_student", NAC_SPEC, modules=4, stitch_dim=9, states=2),
            ["student_3"],
            (0, 9, 5),
        ),
    ],
)
def test_interface(description, names, expected):
    assert registry.interface(description, names) == registry.Interface(*expected)


def test_mediators_are_built_by_one_builder():
    description = described("nac_student", NAC_SPEC, modules=4, stitch_dim=9, states=2)
    build = [registry.builder(description, f"student_{i}") for i in range(4)]
    assert build[1] is build[2] and len(set(build)) == 3


class Scale(chain.Stage):
    """A kind of its own: tokens (B, N, D) times a vector, and D logits in the last stage."""

    def __init__(self, width: int, last: bool, *, rngs: nnx.Rngs):
        del rngs
        self.factor, self.last = nnx.Param(jnp.ones((width,))), last

    def __call__(self, x, *, rates=None, key=None, train=False):
        x = x * self.factor[...][None, None]
        return x.mean(1) if self.last else x


def scale_builder(description, index):
    last = index == description["count"] - 1
    return lambda rngs: Scale(description["width"], last, rngs=rngs)


def scale_interface(description, index):
    last, width = index == description["count"] - 1, description["width"]
    return registry.Interface(width=width, classes=width if last else 0)


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    registry.register_kind("scale", scale_builder, scale_interface)


def test_a_registered_kind_is_loaded_from_its_weights(scale, tmp_path):
    factors = [np.array([1.0, 2.0, 3.0], np.float32), np.array([-1.0, 0.5, 2.0], np.float32)]
    save_weights(
        tmp_path / "weights",
        {f"scale_{i}": {"params": {"factor": f}, "fixed": {}} for i, f in enumerate(factors)},
        {"kind": "scale", "width": 3, "count": 2, "normalisation": {"mean": [0.0], "std": [1.0]}},
    )
    x = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    model = m2mkd_jax.load(tmp_path / "weights")
    assert (model.image_size, model.width, model.classes) == (0, 3, 3)
    np.testing.assert_allclose(model(x), (x * factors[0] * factors[1]).mean(1), rtol=1e-6)
    first = m2mkd_jax.load(tmp_path / "weights", 0)
    assert (first.width, first.classes) == (3, 0)
    np.testing.assert_allclose(first(x), x * factors[0], rtol=1e-6)


def test_a_kind_is_registered_once(scale):
    registry.register_kind("scale", scale_builder, scale_interface)  # the same again: no harm
    with pytest.raises(ValueError, match="a kind of network 'scale' already"):
        registry.register_kind("scale", scale_builder, lambda description, index: None)
    with pytest.raises(ValueError, match="'vit' already"):
        registry.register_kind("vit", scale_builder, scale_interface)


def test_an_unknown_kind():
    with pytest.raises(UserError, match=r'no kind "nac_studnet".* did you mean "nac_student"'):
        registry.builder({"kind": "nac_studnet"}, "student_0")
    with pytest.raises(UserError, match=r"do not describe their network.*spec"):
        registry.builder({"kind": "vit"}, "module_0")


def test_an_unknown_variant():
    with pytest.raises(UserError, match='no variant "vit_large_patch16"; did you mean "vit_large'):
        variants.vit_variant("vit_large_patch16", 10)


def test_every_variant_is_found_by_its_fields():
    # deit_base and vit_base are one architecture.
    found = {n: variants.name_of(variants.vit_variant(n, 7)[0]) for n in variants.NAMES}
    assert found.pop("vit_base_patch16_224") == "deit_base_patch16_224"
    assert all(name == same for name, same in found.items())
