"""A network as a serialised StableHLO program (jax.export)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import numpy as np

from m2mkd_jax.errors import UserError


class StableHLOProgram:
    """An exported program.

    Args:
        function: to export.
        shape: of its input; the first axis is 0 where it is free.
        dtype: of its input.
        platforms: that it can run on.

    Raises:
        UserError: jax cannot export it.
    """

    def __init__(
        self,
        function: Callable[[jax.Array], jax.Array],
        shape: Sequence[int],
        dtype: np.dtype,
        platforms: Sequence[str],
    ):
        batch = shape[0] or jax.export.symbolic_shape("B")[0]
        taken = jax.ShapeDtypeStruct((batch, *shape[1:]), dtype)
        try:
            self._exported = jax.export.export(jax.jit(function), platforms=platforms)(taken)
            self._content = bytes(self._exported.serialize())
        except (TypeError, ValueError, NotImplementedError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--format=stablehlo: jax cannot export this network: {reason}"
            ) from None

    def content(self) -> bytes:
        """The bytes of the file."""
        return self._content

    def call(self, x: np.ndarray) -> np.ndarray:
        """Runs what was serialised, if it is for this machine; else the function in StableHLO."""
        program = jax.export.deserialize(bytearray(self._content))
        return np.asarray(program.call(x))

    def facts(self) -> dict[str, Any]:
        """What OUT.json says of the format."""
        return {
            "format": "stablehlo",
            "platforms": list(self._exported.platforms),
            "calling_convention_version": self._exported.calling_convention_version,
            "jax": jax.__version__,
        }
