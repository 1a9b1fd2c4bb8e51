"""Finished weights as a function from images, or a middle stage's tokens, to logits or tokens.

Axes: B batch, H height, W width, N tokens, D channels, K classes; of a NAC student, R states, U
latents, S channels of a code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from m2mkd_jax.checkpoint.trees import match_tree
from m2mkd_jax.conversion.open_weights import Weights, description_errors, local_path, open_weights
from m2mkd_jax.detection.inference import DetectionModel, open_detection
from m2mkd_jax.errors import UserError
from m2mkd_jax.models import chain, inspection, registry
from m2mkd_jax.parallel import backend
from m2mkd_jax.phases import named
from m2mkd_jax.phases.joined import join_neighbours
from m2mkd_jax.phases.program import Program

PRECISIONS = ("float32", "bfloat16")


class Model:
    """A network, or one module of it, with its weights; made by `m2mkd_jax.load`.

    Args:
        weights: opened weights.
        names: of the trees to use, in the order of the network.
        precision: compute type of activations and parameters; logits are float32.

    Attributes:
        description: of the weights (models/registry.py).
        image_size: side of the images it takes; 0 if it takes tokens.
        channels: of the images it takes.
        width: channels of the tokens it takes; 0 if it takes images.
        classes: how many logits it gives; 0 if it gives tokens.
        class_names: of these, in their order; () where the weights have none.
        mean: per channel, of the normalisation it was trained with; pixels are 0 to 1.
        std: likewise.
        assumed_normalisation: whether mean and std are ImageNet's because nothing says what they
            are.
        oriented: whether it was trained on images turned as their EXIF tag says.
    """

    def __init__(self, weights: Weights, names: list[str], precision: str = "float32"):
        self.description, self.assumed_normalisation = (
            weights.description,
            weights.assumed_normalisation,
        )
        builds = {name: registry.builder(self.description, name) for name in names}
        self._parts = {name: chain.abstract(build) for name, build in builds.items()}
        single = {name: self._matched(name, weights.trees[name]) for name in names}
        self._dtype = jnp.dtype(precision)
        graphs = {n: part.graph for n, part in self._parts.items()}
        program = Program(graphs, tuple(names), (), dtype=self._dtype)
        self._joined = join_neighbours(program, single, trained=False)
        self._weights = self._joined.stages(single)
        self._run = backend.jit(self._forward)
        self._features = backend.jit(
            lambda w, x: inspection.features(self._merged(w), names, x.astype(self._dtype))
        )
        self._attention = backend.jit(
            lambda w, x: inspection.attention(self._merged(w), x.astype(self._dtype))
        )
        interface = registry.interface(self.description, names)
        self.image_size, self.width = interface.image_size, interface.width
        self.classes, self.channels = interface.classes, interface.channels
        self.class_names = registry.class_names(self.description)
        if not self.classes:  # names of logits that another module gives
            self.class_names = ()
        elif self.class_names and len(self.class_names) != self.classes:
            raise ValueError(f"{len(self.class_names)} class_names, {self.classes} classes")
        recorded = registry.normalisation(self.description)
        self.mean, self.std = list(recorded["mean"]), list(recorded["std"])
        if self.image_size and len(self.mean) != self.channels:
            raise ValueError(f"mean is {self.mean}, and images have {self.channels} channels")
        self.oriented = bool(self.description.get("orientation", False))

    def _matched(self, name: str, tree: Mapping[str, Any]) -> dict[str, Any]:
        parts = self._parts[name]
        params = match_tree(tree["params"], parts.params, f"weights {name}")
        return {"params": params, "fixed": tree.get("fixed", {})}

    def _merged(self, weights: dict[str, Any]) -> list[chain.Stage]:
        """The single stages."""
        single = self._joined.single_stages(weights)
        return [
            chain.merge(
                parts.graph,
                chain.cast_compute(single[name]["params"], self._dtype),
                single[name]["fixed"],
            )
            for name, parts in self._parts.items()
        ]

    def _forward(self, weights: dict[str, Any], x: jax.Array) -> jax.Array:
        program = self._joined.program
        y = program.run(program.student, {}, weights, x.astype(self._dtype))
        return y.astype(jnp.float32)

    @property
    def stages(self) -> dict[str, int]:
        """The parameter count of every stage, by name, in the order of the network."""
        return {n: chain.count_parameters(shapes) for n, shapes in self._joined.shapes.items()}

    @property
    def parameters(self) -> int:
        """The parameter count of the network."""
        return sum(self.stages.values())

    def period(self, fixed: Mapping[str, ArrayLike] | None = None) -> int:
        """How many inputs take different states: input b of a call takes state b modulo this.

        A batch that begins at a multiple of it gives what one call of all inputs gives.

        Args:
            fixed: as of a call.

        Returns:
            R of a single NAC student with states, 1 of other networks.

        Raises:
            UserError: as of a call, of `fixed`.
        """
        stages = list((self._with_fixed(fixed) if fixed else self._weights).values())
        states = stages[0].get("fixed", {}).get("states") if len(stages) == 1 else None
        return 1 if states is None else int(np.shape(states)[0])

    @property
    def trees(self) -> dict[str, Any]:
        """{"params", "fixed"} of every stage, by name: what `save_weights` takes."""
        single = self._joined.single_stages(self._weights)
        return {n: {k: v for k, v in single[n].items() if v} for n in self._parts}

    def features(self, x: ArrayLike) -> dict[str, jax.Array]:
        """Intermediate results by name for a model's input; see models/inspection.py."""
        return self._features(self._weights, self._checked(x))

    def attention(self, x: ArrayLike) -> dict[str, jax.Array]:
        """Attention maps by name for a model's input; see models/inspection.py."""
        return self._attention(self._weights, self._checked(x))

    def __call__(self, x: ArrayLike, fixed: Mapping[str, ArrayLike] | None = None) -> jax.Array:
        """Runs the network.

        Args:
            x: images (B, H, W, C), normalised, or tokens (B, N, D).
            fixed: a NAC student's 'codes' (U, S) and 'states' (R, U, D) instead of its own.

        Returns:
            Logits (B, K) or tokens (B, N, D), float32.

        Raises:
            UserError: the input has another shape, or there are no such fixed arrays.
        """
        x = self._checked(x)
        weights = self._weights if not fixed else self._with_fixed(fixed)
        return self._run(weights, x)

    def portable(self) -> Callable[[jax.Array], jax.Array]:
        """The network as a function of its input alone, for any platform and any size of batch.

        Its weights are constants in it, and it consists of plain operations, so that it can be
        exported; the forms that are fast on one platform are not in it.
        """

        def run(x: jax.Array) -> jax.Array:
            with backend.tracing_for(backend.ANY):
                return self._forward(self._weights, x)

        return run

    def _checked(self, x: ArrayLike) -> jax.Array:
        """The input as float32. Raises UserError if its shape is not the network's."""
        side, shape = self.image_size, tuple(jnp.shape(x))
        image = (side, side, self.channels)
        images = len(shape) == 4 and shape[1:] == image
        tokens = len(shape) == 3 and shape[2] == self.width
        if not (images if side else tokens):
            kind = (
                f"images (B, {', '.join(map(str, image))})"
                if side
                else f"tokens (B, N, {self.width})"
            )
            raise UserError(f"the network takes {kind}, not an array of shape {shape}")
        if not shape[0]:
            raise UserError("there are no inputs: the first axis has length 0")
        try:
            found = jnp.result_type(x)
        except TypeError:  # an array of another library, or of objects
            name = type(x).__name__
            raise UserError(f"inputs are floats of NumPy or jax, not this {name}") from None
        if not jnp.issubdtype(found, jnp.floating):
            hint = "; normalise pixels first: (x / 255 - mean) / std" if side else ""
            raise UserError(f"inputs are floats, not {found}{hint}")
        return jnp.asarray(x, jnp.float32)

    def _with_fixed(self, fixed: Mapping[str, ArrayLike]) -> dict[str, Any]:
        """The weights with other fixed arrays. Raises UserError if there are no such arrays."""
        (name, stage), *others = self._weights.items()
        for key, value in fixed.items():
            have = stage["fixed"].get(key)
            if others or have is None:
                raise UserError(f'the network has no "{key}"; only single NAC students have')
            shape, kind = np.shape(value), np.asarray(value).dtype
            if len(shape) != have.ndim or shape[-1] != have.shape[-1] or 0 in shape:
                raise UserError(f'"{key}" has shape {shape}, the stored ones {have.shape}')
            if kind.kind not in "fiu" and not jnp.issubdtype(kind, jnp.floating):
                raise UserError(f'"{key}" is {kind}, not numbers')
        arrays = {key: np.asarray(value, np.float32) for key, value in fixed.items()}
        return {name: {**stage, "fixed": {**stage["fixed"], **arrays}}}


def load(
    path: str | Path,
    module: int | None = None,
    *,
    arch: str = "",
    seed: int = 0,
    precision: str = "float32",
) -> Model | DetectionModel:
    """Loads a network with its weights; of a detector, or the backbone of one, a `DetectionModel`.

    Args:
        path: converted or trained weights (a directory, a job's, a run's), a torch or safetensors
            file, a directory of module files, or hf://OWNER/REPOSITORY[/FILE].
        module: only this stage of the network, counted from 0; None for all.
        arch: of torch weights, as `python -m m2mkd_jax.convert` takes it.
        seed: likewise.
        precision: compute type, "float32" or "bfloat16"; logits are float32.

    Raises:
        UserError: there are no weights, they cannot be read, or they are several NAC students and
            `module` is None.
    """
    path = local_path(path)
    detection = open_detection(path, arch, seed)
    if detection is None:
        return load_network(path, module, arch=arch, seed=seed, precision=precision)
    if module is not None:
        raise UserError(f"{path} is a detector, which is not in modules")
    return detection


def load_network(
    path: str | Path,
    module: int | None = None,
    *,
    arch: str = "",
    seed: int = 0,
    precision: str = "float32",
) -> Model:
    """`load` of a network that gives logits, or of a module; arguments and errors as there."""
    if precision not in PRECISIONS:
        raise UserError(f'precision: "{precision}" is none of {", ".join(PRECISIONS)}')
    weights = open_weights(path, arch, seed=seed)
    with description_errors(path):
        return Model(weights, _chosen_trees(weights, path, module), precision)


def build(name: str, *, seed: int = 0, **fields: Any) -> Model:
    """Builds a network by name, with fresh weights.

    Args:
        name: a published ViT, such as "vit_large_patch16_224", or a shipped config, such as
            "nac_digits" or "vmoe_digits", whose end-to-end network it is.
        seed: of the weights.
        fields: other values of the network's fields, such as classes, image_size, width, depth.

    Raises:
        UserError: no such name or field, or fields that do not fit together.
    """
    weights = Weights(*named.fresh_network(name, seed, fields))
    return Model(weights, registry.in_order(list(weights.trees)))


def _chosen_trees(weights: Weights, path: str | Path, module: int | None) -> list[str]:
    """The trees to use, in the order of the network. Raises UserError as `load` does."""
    names = registry.in_order(list(weights.trees))
    if module is not None:
        chosen = [name for name in names if registry.index_of(name) == module]
        if not chosen:
            raise UserError(f"{path} has no module {module}, only {', '.join(names)}")
        return chosen
    if weights.description.get("kind") == "nac_student" and len(names) > 1:
        raise UserError(
            f"{path} holds {len(names)} students, each made to work inside the meta model; choose "
            "one with --module=I, or assemble them with --arch of a NAC"
        )
    return names
