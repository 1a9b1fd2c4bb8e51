"""Teachers that are Python functions: of images to logits, for e2e_kd, or one for each module.

    config.teacher.family = "m2mkd_jax.phases.function_teacher:FunctionTeacher"
    config.teacher.options = {"function": "package.module:name"}

The function takes images (B, H, W, C), float32 and normalised as the config says, and returns
logits (B, K) of the classes of the data. It is traced into the training step, made of jax's
operations; with {"callback": True} beside it it is called with NumPy arrays on the host, whatever
it does inside (another framework, a server).

    config.teacher.family = "m2mkd_jax.phases.function_teacher:FunctionModules"
    config.teacher.options = {"functions": ("package.module:first", ..., "package.module:last")}

are the teacher's modules for m2mkd. Module i stands between modules of the meta model, which is the
vision transformer that config.teacher describes: the first function takes images and gives tokens
(B, N, D), those between take and give such tokens, the last gives logits. Nothing of them is
trained, so that there is neither mt nor ft.
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
from m2mkd_jax.config.networks import teacher_spec
from m2mkd_jax.errors import UserError, require
from m2mkd_jax.models import chain, registry
from m2mkd_jax.phases.families import Teacher
from m2mkd_jax.phases.phase import FRESH, StageSpec, WeightsFrom
from m2mkd_jax.phases.vit_teacher import ViTTeacher

FORBIDDEN = ("pt", "mt", "ft", "m2mkd", "e2e_upcycled")
UNTRAINED = ("mt", "ft", "e2e_upcycled")
Function = Callable[[Any], Any]
Output = tuple[int, ...]


class FunctionStage(chain.Stage):
    """A function of images (B, H, W, C) or tokens (B, N, D), without parameters.

    Args:
        function: the function.
        output: shape of what it gives for one image: (K,) logits, or (N, D) tokens.
        callback: whether it is called on the host.
        rngs: unused.
    """

    def __init__(self, function: Function, output: Output, callback: bool, *, rngs: nnx.Rngs):
        del rngs
        self.depth, self.function, self.output, self.callback = 0, function, output, callback

    def __call__(
        self,
        x: jax.Array,
        *,
        rates: chain.Rates = None,
        key: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Images or tokens -> (B, *output): tokens in the type of x, logits float32."""
        del rates, key, train
        inputs, shape = x.astype(jnp.float32), (x.shape[0], *self.output)
        dtype = x.dtype if len(self.output) > 1 else jnp.dtype(jnp.float32)
        if not self.callback:
            given = self.function(inputs)
            if jnp.shape(given) != shape:
                raise UserError(_wrong_shape(self.function, jnp.shape(given), shape))
            return given.astype(dtype)
        wanted = jax.ShapeDtypeStruct(shape, jnp.float32)
        on_host = functools.partial(self._on_host, shape)
        return jax.pure_callback(on_host, wanted, inputs).astype(dtype)

    def _on_host(self, shape: tuple[int, ...], inputs: jax.Array) -> np.ndarray:
        given = np.asarray(self.function(np.asarray(inputs)), np.float32)
        if given.shape != shape:
            raise UserError(_wrong_shape(self.function, given.shape, shape))
        return given


def _wrong_shape(function: Function, found: Sequence[int], expected: Sequence[int]) -> str:
    what = "logits" if len(expected) < 3 else "tokens"
    return (
        f"config.teacher.options: {getattr(function, '__name__', function)} returned an array of "
        f"shape {tuple(found)} where {what} {tuple(expected)} are expected"
    )


@functools.cache
def _builder(function: Function, output: Output, callback: bool) -> registry.Builder:
    return lambda rngs: FunctionStage(function, output, callback, rngs=rngs)


def _check_options(config: ConfigDict, key: str, type_: str, forbidden: Sequence[str]) -> None:
    """Refuses options of another name, and phases that such a teacher has no part in."""
    known = (key, "callback")
    unknown = [name for name in config.teacher.options if name not in known]
    require(not unknown, f"config.teacher.options: unknown {', '.join(unknown)}")
    wrong = next((phase for phase in forbidden if phase in config.phases), "")
    require(not wrong, f'config.phases: "{wrong}" {type_}')


def _named(name: object, key: str) -> Function:
    """The function that config.teacher.options.`key` names.

    Raises:
        UserError: it names none.
    """
    if not isinstance(name, str) or ":" not in name:
        raise UserError(f'config.teacher.options.{key}: give "package.module:name"')
    found = import_class(name, f"teacher.options.{key}")
    require(callable(found), f"config.teacher.options.{key}: {name} is no function")
    return found


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
        words = (
            "needs a teacher in modules; one that is a function teaches e2e_kd alone, a function "
            "for each module (FunctionModules) m2mkd too"
        )
        _check_options(self._config, "function", words, FORBIDDEN)
        self._function()

    def _function(self) -> Function:
        return _named(self._config.teacher.options.get("function", ""), "function")

    def meta(self, index: int, weights: WeightsFrom) -> StageSpec:
        """There is no meta model. Raises UserError."""
        raise UserError("config.teacher.family: a function has no meta model")

    def module(self, index: int, weights: WeightsFrom) -> StageSpec:
        """The function as a stage; it needs no weights."""
        del index, weights
        classes = teaching_data(self._config).classes
        callback = bool(self._config.teacher.options.get("callback", False))
        return StageSpec(_builder(self._function(), (classes,), callback), FRESH, "a function")

    def describe(self, depths: Sequence[int]) -> dict[str, Any]:
        """A function is not saved."""
        return {"kind": "function", "spec": {}, "depths": list(depths)}


class FunctionModules(ViTTeacher):
    """Functions as the teacher's modules: config.teacher.options has functions, and callback.

    The meta model is the vision transformer of config.teacher, of which `depths` is unused.
    """

    def __init__(self, config: ConfigDict):
        self._config, self._names = config, config.teacher.options.get("functions", ())
        self.modules = len(self._names) if isinstance(self._names, tuple | list) else 0
        self.depths = (0,) * self.modules
        self.meta_depths = tuple(config.teacher.meta_depths) or (1,) * self.modules

    def check(self) -> None:
        """Raises UserError where there are no such functions, or phases would train them."""
        words = (
            "trains the teacher's modules, and functions have nothing to train; m2mkd needs pt "
            "alone"
        )
        _check_options(self._config, "functions", words, UNTRAINED)
        require(
            self.modules >= 2,
            'config.teacher.options.functions: give two or more, ("package.module:name", ...)',
        )
        require(
            len(self.meta_depths) == self.modules,
            f"config.teacher.meta_depths has {len(self.meta_depths)} modules, "
            f"config.teacher.options.functions {self.modules}",
        )
        for name in self._names:
            _named(name, "functions")
        teacher_spec(self._config)

    def module(self, index: int, weights: WeightsFrom) -> StageSpec:
        """Function `index` as a stage; it needs no weights."""
        del weights
        spec, _ = teacher_spec(self._config)
        last = index == self.modules - 1
        output = (spec.classes,) if last else (spec.tokens, spec.width)
        callback = bool(self._config.teacher.options.get("callback", False))
        function = _named(self._names[index], "functions")
        return StageSpec(_builder(function, output, callback), FRESH, "a function")
