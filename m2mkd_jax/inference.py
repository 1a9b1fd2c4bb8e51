"""Finished weights as a function: images, or a middle stage's tokens, in; logits or tokens out.

Axes: B batch, H height, W width, N tokens, D channels, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax.checkpoint.trees import match_tree
from m2mkd_jax.conversion.open_weights import Weights, open_weights, validate
from m2mkd_jax.errors import UserError
from m2mkd_jax.models import chain, registry


class Model:
    """A network, or one module of it, with its weights; made by `m2mkd_jax.load`.

    Attributes:
        description: what the weights say about themselves.
        image_size: side of the images it takes; 0 if it takes tokens.
        width: channels of the tokens it takes; 0 if it takes images.
        classes: how many logits it gives; 0 if it gives tokens.
        mean, std: of the images it was taught on, per channel, pixels being 0 to 1.
    """

    def __init__(self, weights: Weights, names: list[str]):
        self.description = weights.description
        builds = {name: registry.builder(self.description, name) for name in names}
        self._parts = {name: chain.abstract(build) for name, build in builds.items()}
        self._weights = {name: self._matched(name, weights.trees[name]) for name in names}
        self._run = jax.jit(self._forward)
        interface = registry.interface(self.description, names)
        self._group = interface.group
        self.image_size, self.width = interface.image_size, interface.width
        self.classes = interface.classes
        normalisation = self.description["normalisation"]
        self.mean, self.std = normalisation["mean"], normalisation["std"]

    def _matched(self, name: str, tree: Mapping[str, Any]) -> dict[str, Any]:
        parts = self._parts[name]
        params = match_tree(tree["params"], parts.params, f"weights {name}")
        return {"params": params, "fixed": tree.get("fixed", {})}

    def _forward(self, weights: dict, x: jax.Array) -> jax.Array:
        stages = [
            chain.merge(parts.graph, weights[name]["params"], weights[name]["fixed"])
            for name, parts in self._parts.items()
        ]
        return chain.run(chain.join(stages, None)[0], x)

    def __call__(self, x: jax.Array, fixed: Mapping[str, jax.Array] | None = None) -> jax.Array:
        """Images (B, H, W, 3), normalised, or tokens (B, N, D) -> logits (B, K) or tokens.

        Args:
            x: float32.
            fixed: a NAC student's 'codes' (U, S) and 'states' (R, U, D) instead of the stored ones.

        Raises:
            UserError: the input has another shape, or there are no such fixed arrays.
        """
        side = self.image_size
        wanted = (side, side, 3) if side else (None, self.width)
        shape = tuple(jnp.shape(x))
        if len(shape) != 1 + len(wanted) or any(
            w is not None and w != n for w, n in zip(wanted, shape[1:], strict=True)
        ):
            kind = f"images (B, {side}, {side}, 3)" if side else f"tokens (B, N, {self.width})"
            raise UserError(f"the network takes {kind}, not an array of shape {shape}")
        weights = self._weights if not fixed else self._with_fixed(fixed)
        x = jnp.asarray(x, jnp.float32)
        # Groups are of equal size: what is left over is one by itself.
        rest = len(x) % self._group if self._group else 0
        if not 0 < rest < len(x):
            return self._run(weights, x)
        return jnp.concatenate([self._run(weights, part) for part in (x[:-rest], x[-rest:])])

    def _with_fixed(self, fixed: Mapping[str, Any]) -> dict[str, Any]:
        (name, stage), *others = self._weights.items()
        for key, value in fixed.items():
            have = stage["fixed"].get(key)
            if others or have is None:
                raise UserError(f'the network has no "{key}"; only single NAC students have')
            if np.ndim(value) != have.ndim or np.shape(value)[-1] != have.shape[-1]:
                raise UserError(
                    f'"{key}" has shape {np.shape(value)}, the stored ones {have.shape}'
                )
        arrays = {key: np.asarray(value, np.float32) for key, value in fixed.items()}
        return {name: {**stage, "fixed": {**stage["fixed"], **arrays}}}


def load(path: str | Path, module: int | None = None, *, arch: str = "", seed: int = 0) -> Model:
    """A network with its weights, ready to be called.

    Args:
        path: weights converted or trained (a directory, a job's, a run's), a torch or safetensors
            file, a directory of module files, or hf://OWNER/REPOSITORY/FILE.
        module: only this stage of the network, counted from 0.
        arch, seed: for torch weights, as `python -m m2mkd_jax.convert` takes them.

    Raises:
        UserError: nothing there, it cannot be read, or several NAC students without `module`.
    """
    weights = open_weights(path, arch, seed=seed)
    return validate(path, lambda: _model(weights, path, module))


def _model(weights: Weights, path: str | Path, module: int | None) -> Model:
    names = registry.in_order(list(weights.trees))
    if module is not None:
        chosen = [name for name in names if registry.index_of(name) == module]
        if not chosen:
            raise UserError(f"{path} has no module {module}, only {', '.join(names)}")
        names = chosen
    elif weights.description.get("kind") == "nac_student" and len(names) > 1:
        raise UserError(
            f"{path} holds {len(names)} students, each made to work inside the meta model; choose "
            "one with --module=I, or assemble them with --arch of a NAC"
        )
    return Model(weights, names)
