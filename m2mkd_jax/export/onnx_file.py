"""A network as an ONNX model, converted by jax2onnx and run by onnxruntime."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from m2mkd_jax.errors import UserError

_ERRORS_ONLY = 3  # of onnxruntime's severities


class OnnxProgram:
    """A converted model.

    Args:
        function: to convert.
        shape: of its input; the first axis is 0 where it is free.
        dtype: of its input.
        platforms: unused; onnxruntime decides.

    Raises:
        UserError: the extra is missing, or jax2onnx cannot convert the function.
    """

    def __init__(
        self,
        function: Callable[[jax.Array], jax.Array],
        shape: Sequence[int],
        dtype: np.dtype,
        platforms: Sequence[str],
    ):
        del platforms
        jax2onnx, self._runtime = _package("jax2onnx"), _package("onnxruntime")
        self._version = importlib.metadata.version("jax2onnx")
        taken = jax.ShapeDtypeStruct((shape[0] or "B", *shape[1:]), dtype)
        # It raises whatever the conversion of an operation raises, onnxruntime errors of its own.
        try:
            with _quiet(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                model = jax2onnx.to_onnx(function, [taken])
            self._content: bytes = model.SerializeToString()
            self._session = self._open()
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            hint = "" if shape[0] else "; --batch=N fixes the batch, which it may be able to do"
            raise UserError(
                f"--format=onnx: jax2onnx {self._version} cannot convert this network "
                f"({reason[:200]}){hint}"
            ) from None
        self._opset = next(entry.version for entry in model.opset_import if not entry.domain)

    def _open(self) -> Any:
        options = self._runtime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        return self._runtime.InferenceSession(
            self._content, options, providers=["CPUExecutionProvider"]
        )

    def content(self) -> bytes:
        """The bytes of the file."""
        return self._content

    def call(self, x: np.ndarray) -> np.ndarray:
        """Runs the model in onnxruntime. Raises UserError where it fails."""
        try:
            return self._session.run(None, {self._session.get_inputs()[0].name: x})[0]
        except Exception as error:  # onnxruntime's own errors have no common class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--format=onnx: onnxruntime cannot run what jax2onnx {self._version} made of this "
                f"network for {len(x)} inputs ({reason[:200]})"
            ) from None

    def facts(self) -> dict[str, Any]:
        """What OUT.json says of the format."""
        return {
            "format": "onnx",
            "opset": self._opset,
            "input_name": self._session.get_inputs()[0].name,
            "output_name": self._session.get_outputs()[0].name,
            "jax2onnx": self._version,
        }


def _package(name: str) -> Any:
    """A package of the extra. Raises UserError where it is not installed."""
    try:
        with _quiet():
            return importlib.import_module(name)
    except ImportError:
        raise UserError(f"--format=onnx needs {name}: pip install 'm2mkd_jax[onnx]'") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """jax2onnx prints, logs and warns while it works, of plugins for other libraries too."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
