"""A teacher that is a Python function from images to logits, for e2e_kd.

    config.teacher.family = "m2mkd_jax.phases.function_teacher:FunctionTeacher"
    config.teacher.options = {"function": "package.module:name"}

The function takes images (B, H, W, 3), float32 and normalised as the config says, and returns
logits (B, K) of the classes of the data. It is traced into the training step, made of jax's
operations; with {"callback": True} beside it it is called with NumPy arrays on the host, whatever
it does inside (another framework, a server).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import teaching_data
from m2mkd_jax.config.family_sections import import_class
from m2mkd_jax.errors import UserError, require
from m2mkd_jax.models import chain, registry
from m2mkd_jax.phases.families import Teacher
from m2mkd_jax.phases.phase import FRESH, StageSpec, WeightsFrom

FORBIDDEN = ("pt", "mt", "ft", "m2mkd", "e2e_upcycled")
Function = Callable[[Any], Any]


class FunctionStage(chain.Stage):
    """A function from images (B, H, W, 3) to logits (B, K), without parameters.

    Args:
        function: the function.
        classes: K.
        callback: whether it is called on the host.
        rngs: unused.
    """

    def __init__(self, function: Function, classes: int, callback: bool, *, rngs: nnx.Rngs):
        del rngs
        self.depth, self.function, self.classes, self.callback = 0, function, classes, callback

    def __call__(
        self,
        x: jax.Array,
        *,
        rates: chain.Rates = None,
        key: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Images (B, H, W, 3) -> logits (B, K), float32."""
        del rates, key, train
        images, shape = x.astype(jnp.float32), (x.shape[0], self.classes)
        if not self.callback:
            logits = self.function(images)
            if jnp.shape(logits) != shape:
                raise UserError(_wrong_shape(jnp.shape(logits), shape))
            return logits.astype(jnp.float32)
        given = jax.ShapeDtypeStruct(shape, jnp.float32)
        return jax.pure_callback(functools.partial(self._on_host, shape), given, images)

    def _on_host(self, shape: tuple[int, ...], images: jax.Array) -> np.ndarray:
        logits = np.asarray(self.function(np.asarray(images)), np.float32)
        if logits.shape != shape:
            raise UserError(_wrong_shape(logits.shape, shape))
        return logits


def _wrong_shape(found: Sequence[int], expected: Sequence[int]) -> str:
    return (
        f"config.teacher.options.function returned an array of shape {tuple(found)} where logits "
        f"{tuple(expected)} are expected"
    )


@functools.cache
def _builder(function: Function, classes: int, callback: bool) -> registry.Builder:
    return lambda rngs: FunctionStage(function, classes, callback, rngs=rngs)


class FunctionTeacher(Teacher):
    """config.teacher.options: function, and callback."""

    def __init__(self, config: ConfigDict):
        self._config = config
        self.modules, self.depths, self.meta_depths = 1, (0,), (0,)

    @property
    def width(self) -> int:
        """It has no tokens. Raises UserError."""
        raise UserError("config.teacher.family: a function has no modules, and no width of tokens")

    def check(self) -> None:
        """Raises UserError where there is no such function, or phases need modules."""
        wrong = [phase for phase in FORBIDDEN if phase in self._config.phases]
        require(
            not wrong,
            f'config.phases: "{next(iter(wrong), "")}" needs a teacher in modules; one that is a '
            "function teaches e2e_kd alone",
        )
        self._function()

    def _function(self) -> Function:
        options = self._config.teacher.options
        unknown = [key for key in options if key not in ("function", "callback")]
        require(not unknown, f"config.teacher.options: unknown {', '.join(unknown)}")
        name = options.get("function", "")
        require(
            isinstance(name, str) and ":" in name,
            'config.teacher.options.function: give "package.module:name"',
        )
        found = import_class(name, "teacher.options.function")
        require(callable(found), f"config.teacher.options.function: {name} is no function")
        return found

    def meta(self, index: int, weights: WeightsFrom) -> StageSpec:
        """There is no meta model. Raises UserError."""
        raise UserError("config.teacher.family: a function has no meta model")

    def module(self, index: int, weights: WeightsFrom) -> StageSpec:
        """The function as a stage; it needs no weights."""
        del index, weights
        classes = teaching_data(self._config).classes
        callback = bool(self._config.teacher.options.get("callback", False))
        return StageSpec(_builder(self._function(), classes, callback), FRESH, "a function")

    def describe(self, depths: Sequence[int]) -> dict[str, Any]:
        """A function is not saved."""
        return {"kind": "function", "spec": {}, "depths": list(depths)}
