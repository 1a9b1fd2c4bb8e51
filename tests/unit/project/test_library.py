"""What is public of the package: names, docs/library.md, features and attention."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

import m2mkd_jax
from m2mkd_jax.models import inspection
from m2mkd_jax.models.vit import Attention
from m2mkd_jax.models.vit_spec import ViTSpec
from tests import tiny_nac

ROOT = Path(__file__).parents[3]
SPEC = ViTSpec(image_size=8, patch=4, width=8, heads=2, classes=3)


def test_every_public_name_is_there():
    assert all(getattr(m2mkd_jax, name) is not None for name in m2mkd_jax.__all__)


def test_the_package_loads_no_jax():
    code = "import sys, m2mkd_jax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_code_of_the_documentation_runs():
    text = (ROOT / "docs/library.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_names_and_fields_are_refused():
    with pytest.raises(m2mkd_jax.UserError, match="vit_large_patch16_224"):
        m2mkd_jax.build("vit_large_patch16_22")
    with pytest.raises(m2mkd_jax.UserError, match="has no field widht"):
        m2mkd_jax.build("vit_large_patch16_224", widht=8)


def test_attention_weights_times_values_are_the_output_of_the_layer():
    layer = Attention(SPEC, rngs=nnx.Rngs(0))
    layer.qkv.kernel[...] = 10 * layer.qkv.kernel[...]  # far from uniform attention
    x = jax.random.normal(jax.random.key(1), (2, 5, SPEC.width))
    weights = inspection.attention_weights(layer, x)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    v = rearrange(layer.qkv(x), "b n (i h c) -> i b n h c", i=3, h=SPEC.heads)[2]
    mixed = rearrange(jnp.einsum("bhnm,bmhc->bnhc", weights, v), "b n h c -> b n (h c)")
    np.testing.assert_allclose(layer.proj(mixed), layer(x), atol=1e-6)


def test_the_links_of_a_nac_are_probabilities_and_zero_beyond_the_truncation():
    nac = tiny_nac.network(tiny_nac.spec_with(truncation=0.5))
    maps = jax.jit(lambda x: inspection.attention([nac], x))(tiny_nac.images())
    signatures = [np.asarray(g.signatures[...]) for g in (nac.input_latents, nac.mediator_latents)]
    unit = [s / np.linalg.norm(s, axis=-1, keepdims=True) for s in signatures]
    distance = 1 - unit[1] @ np.concatenate(unit).T
    bandwidth = np.asarray(nac.propagators.attention.bandwidth[...])[:, None, None]
    expected = np.where(distance / bandwidth > 0.5 / bandwidth, 0, np.exp(-distance / bandwidth))
    np.testing.assert_allclose(maps["links"], np.clip(expected, 0, 1), atol=1e-5)
    np.testing.assert_allclose(maps["read_in"].sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(maps["read_out"].sum(-1), 1, atol=1e-5)


def test_read_out_weights_times_values_are_the_message_of_the_layer():
    nac, images = tiny_nac.network(tiny_nac.spec_with()), tiny_nac.images()
    compute = jax.jit(lambda x: (inspection.attention([nac], x), nac.forward(x, {})))
    maps, states = compute(images)
    layer, groups = nac.read_out.attention, (nac.input_latents, nac.mediator_latents)
    senders = jnp.concatenate([states["input"], states["mediator"]], axis=1)
    codes = jnp.concatenate([group.codes[...] for group in groups])
    v = layer.value((layer.sender_norm or layer.receiver_norm)(senders), codes)
    v = rearrange(v, "b v (h c) -> b h v c", h=layer.heads)
    message = rearrange(maps["read_out"] @ v, "b h u c -> b u (h c)")
    own = nac.output_latents.codes[...]
    expected = nac.read_out.ffn(layer.gamma[...][None, None] * layer.exit(message, own), own)
    np.testing.assert_allclose(states["output"], expected, atol=1e-5)
