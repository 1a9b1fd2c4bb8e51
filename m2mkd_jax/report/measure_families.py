"""What the parts of finished networks do: a NAC's latents, a V-MoE's experts.

Axes: N images, K classes, U output latents, M mediators, V senders (input latents, mediators),
I iterations, L layers with experts, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax.models import chain, inspection
from m2mkd_jax.models.nac import kernels, priors
from m2mkd_jax.models.nac.circuit import NAC
from m2mkd_jax.parallel import backend
from m2mkd_jax.report.measure import Images, LoadedStage

SHOWN = 4  # images whose attention is shown
CLASSES, PER_CLASS = 20, 16  # of the classes that are sent through the experts

Arrays = dict[str, np.ndarray]


def measure_nac(stage: LoadedStage, images: Images) -> Arrays:
    """A finished NAC's links and attention.

    Returns:
        links: (I, M, V), probabilities; output_links: (U, V'), of the read-out's senders;
        signatures: (M, C), of the mediators; read_in: (SHOWN, U', T), what each input latent reads,
        heads averaged; use: (K, V'), what the read-out reads of each sender, by class, averaged
        over heads, output latents and images.
    """
    nac = stage.merged
    assert isinstance(nac, NAC)

    def maps(params: dict, fixed: dict, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        found = inspection.attention([chain.merge(stage.graph, params, fixed)], x)
        return found["read_in"].mean(2), found["links"], found["read_out"].mean((1, 2))

    compiled, x = backend.jit(maps), images.normalised
    size = min(stage.batch, len(x))
    reads, uses, links = [], [], np.zeros(0)
    for start in range(0, len(x), size):
        part = x[start : start + size]
        padded = np.concatenate([part, x[: size - len(part)]])
        read, links, use = jax.device_get(compiled(stage.params, stage.fixed, padded))
        reads += list(read[: len(part)]) if start == 0 else []
        uses.append(use[: len(part)])
    use = np.concatenate(uses)
    return {
        "links": np.asarray(links, np.float16),
        "output_links": _output_links(nac),
        "signatures": np.asarray(nac.mediator_latents.signatures[...]),
        "read_in": np.asarray(reads[:SHOWN], np.float16),
        "read_in_images": images.pixels[:SHOWN],
        "use": by_class(use, images.labels, len(images.class_names)).astype(np.float32),
    }


def by_class(values: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Means of values (N, ...) over the images of each class, (K, ...); 0 for absent ones."""
    found = np.zeros((classes, *values.shape[1:]))
    for label in np.unique(labels):
        found[label] = values[labels == label].mean(0)
    return found


def _output_links(nac: NAC) -> np.ndarray:
    """exp(-distance / bandwidth) of output latents and their senders, clipped to 1."""
    groups = (nac.input_latents, nac.mediator_latents)[0 if nac.spec.input_output else 1 :]
    heard = jnp.concatenate([group.signatures[...] for group in groups])
    distance = kernels.distance(nac.output_latents.signatures[...], heard)
    bandwidth = nac.read_out.attention.bandwidth[...]
    log = kernels.log_kernel(distance, bandwidth, None)
    return np.clip(np.exp(np.asarray(log)), 0, 1).astype(np.float16)


def links_of(stage: LoadedStage) -> Arrays:
    """Of a NAC before training: links (I, M, V), output_links (U, V') and signatures (M, C)."""
    nac = stage.merged
    image = jnp.zeros((1, nac.spec.image_size, nac.spec.image_size, nac.spec.channels))
    maps = jax.device_get(backend.jit(lambda x: inspection.attention([nac], x)["links"])(image))
    return {
        "links": np.asarray(maps, np.float16),
        "output_links": _output_links(nac),
        "signatures": np.asarray(nac.mediator_latents.signatures[...]),
    }


def prior_graph(prior: str, latents: int, options: dict[str, Any], seed: int) -> np.ndarray:
    """The adjacency (M, M) that the mediators' signatures were fitted to at the start."""
    return priors.build_graph(prior, latents, options, seed).astype(np.uint8)


def measure_experts(stages: Sequence[LoadedStage], images: Images) -> Arrays:
    """Where the tokens of each class go.

    Args:
        stages: of a finished V-MoE.
        images: of the test split.

    Returns:
        class_load: (k, L, E), the share of the tokens' choices by expert for some classes;
        classes: (k,), which; {} for a network without experts.
    """
    chosen = np.unique(images.labels)
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(CLASSES, len(chosen))).astype(int)]
    # In batches of their own, none of which is filled up: each image counts equally.
    stages = [dataclasses.replace(stage, batch=PER_CLASS) for stage in stages]
    x, loads = images.normalised, []
    for label in chosen:
        own = x[images.labels == label][:PER_CLASS]
        # One shape for all classes, in which a power of two of images come equally often.
        own = own[: 2 ** (len(own).bit_length() - 1)]
        y = own[np.arange(PER_CLASS) % len(own)]
        seen = []
        for stage in stages:
            y, aux = stage.outputs(y)
            if "load" in aux:
                seen.append(aux["load"])
        if not seen:
            return {}
        loads.append(np.concatenate(seen))
    return {"class_load": np.array(loads, np.float32), "classes": chosen}
