"""Networks by name, with fresh weights: published ViTs, and those of the shipped configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from m2mkd_jax.config.files import find_config, read_config, shipped_configs
from m2mkd_jax.conversion.converted import IMAGENET
from m2mkd_jax.errors import UserError, did_you_mean
from m2mkd_jax.models import chain, registry, variants
from m2mkd_jax.phases.families import students
from m2mkd_jax.phases.initial_weights import fresh_stage
from m2mkd_jax.phases.phase import FRESH

DATA_FIELDS = ("image_size", "classes")


def fresh_network(
    name: str, seed: int, fields: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The description and the weights of a network.

    Args:
        name: of a ViT variant or a shipped config.
        seed: of the weights.
        fields: values that replace the named network's.

    Raises:
        UserError: no such name or field, or fields that do not fit together.
    """
    if name in variants.NAMES:
        return _vit(name, seed, fields)
    if name not in shipped_configs():
        known = (*variants.NAMES, *shipped_configs())
        raise UserError(f'build: no network "{name}"; {did_you_mean(name, known)}')
    config = read_config(find_config(name))
    section = config[students(config).section]
    for key, value in fields.items():
        target = config.data if key in DATA_FIELDS else section
        _check(name, key, (*section, *DATA_FIELDS))
        try:
            target[key] = value
        except TypeError:
            kind = type(target[key]).__name__
            raise UserError(f"build: {key} must be {kind}, not {value!r}") from None
    network = students(config).network(FRESH)
    normalisation = {"mean": list(config.data.mean), "std": list(config.data.std)}
    trees = {
        stage: fresh_stage(config, spec, stage, seed) for stage, spec in network.stages.items()
    }
    return {**network.describe, "normalisation": normalisation}, trees


def _of_channels(count: int) -> dict[str, list[float]]:
    return {"mean": [0.5] * count, "std": [0.5] * count}


def _vit(name: str, seed: int, fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """See `fresh_network`; one stage of `depth` blocks, or stages of `depths`."""
    spec, depth = variants.vit_variant(name, 1000)
    known = [field.name for field in dataclasses.fields(spec)]
    for key in fields:
        _check(name, key, (*known, "depth", "depths"))
    spec = dataclasses.replace(spec, **{k: v for k, v in fields.items() if k in known})
    depths = tuple(fields.get("depths", (fields.get("depth", depth),)))
    description = {
        "kind": "vit",
        "spec": dataclasses.asdict(spec),
        "depths": depths,
        # Of other images than ImageNet's nothing is known: to -1 to 1.
        "normalisation": IMAGENET if spec.channels == 3 else _of_channels(spec.channels),
    }
    trees = {}
    for stage, key in zip(
        registry.tree_names(description),
        jax.random.split(jax.random.key(seed), len(depths)),
        strict=True,
    ):
        parts = chain.initialise(registry.builder(description, stage), key)
        trees[stage] = {"params": parts.params, "fixed": parts.fixed}
    return description, trees


def _check(name: str, key: str, known: tuple[str, ...]) -> None:
    if key not in known:
        raise UserError(f'build: "{name}" has no field {key}; {did_you_mean(key, known)}')
