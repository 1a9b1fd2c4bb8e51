"""Reads the pickles of the CIFAR archives without executing code from them.

A pickle is a program: Python's own reader calls any function it names. This reader interprets only
the instructions that plain values and numpy arrays consist of.
"""

import pickletools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.errors import UserError

_MARK = object()
_ARRAY = ("numpy", "ndarray")
_DTYPE = ("numpy", "dtype")
_RECONSTRUCT = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
}
# What Python 3 writes instead: protocol 5 for an array, protocols 0 to 2 for bytes.
_FROM_BUFFER = {("numpy.core.numeric", "_frombuffer"), ("numpy._core.numeric", "_frombuffer")}
_ENCODE = ("_codecs", "encode")
_BYTES = {"u1": np.uint8, "i8": np.int64, "i4": np.int32}
_VALUES = {
    "BININT",
    "BININT1",
    "BININT2",
    "INT",
    "LONG",
    "LONG1",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BYTEARRAY8",
    "BINFLOAT",
}
_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}  # Python 2's bytes; genops gives text
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Array:
    """An array whose contents may come later, in a BUILD instruction."""

    def __init__(self, value: np.ndarray | None = None) -> None:
        self.value = value


def read_pickle(path: str | Path) -> Any:
    """Reads a pickle file.

    Returns:
        An array, or a dict of arrays, lists, numbers, text and bytes (also Python 2's strings).

    Raises:
        UserError: the file is broken or holds anything else.
    """
    try:
        # From memory: a file that announces a string of 2^60 bytes is then just too short.
        return _plain(_run(pickletools.genops(Path(path).read_bytes())))
    except UserError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"cannot read the pickle {path} ({error}): download it again") from error


def _run(instructions: Iterable[tuple[pickletools.OpcodeInfo, Any, int | None]]) -> Any:
    """Interprets the instructions and returns the pickled value, arrays wrapped in `_Array`."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in instructions:
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _STRINGS:
            stack.append(argument.encode("latin-1"))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("DICT", "LIST", "TUPLE"):
            items = _marked(stack)
            stack.append({"LIST": list, "TUPLE": tuple}.get(name, _pairs)(items))
        elif name in _TUPLES:
            items = stack[-_TUPLES[name] :]
            stack[-_TUPLES[name] :] = [tuple(items)]
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else _marked(stack)
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else _marked(stack)
            stack[-1].update(_pairs(items))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_known(tuple(argument.split(" "))))
        elif name == "STACK_GLOBAL":
            second, first = stack.pop(), stack.pop()
            stack.append(_known((first, second)))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_make(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], _Array):
                stack[-1].value = _filled(state)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise UserError(f"the pickle's instruction {name} is not one that arrays need")
    raise ValueError("it ends too early")


def _marked(stack: list[Any]) -> list[Any]:
    """Pops the items above the last mark, and the mark."""
    place = len(stack) - 1 - stack[::-1].index(_MARK)
    items = stack[place + 1 :]
    del stack[place:]
    return items


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


def _known(function: tuple[str, str]) -> tuple[str, str]:
    """The function, if it is one that arrays need; else raises UserError."""
    if function not in {_ARRAY, _DTYPE, _ENCODE} | _RECONSTRUCT | _FROM_BUFFER:
        raise UserError(f"the pickle calls {'.'.join(map(str, function))}: it is not CIFAR's")
    return function


def _make(function: tuple[str, str], arguments: Any) -> Any:
    """The result of calling a known function."""
    if function in _RECONSTRUCT and arguments[0] == _ARRAY:
        return _Array()
    if function == _DTYPE:
        text = arguments[0]
        return np.dtype(_BYTES[text.decode() if isinstance(text, bytes) else text])
    if function in _FROM_BUFFER:
        content, dtype, shape, order = arguments
        return _Array(np.frombuffer(content, dtype).reshape(shape, order=order))
    if function == _ENCODE and arguments[1] == "latin1":
        return arguments[0].encode("latin-1")
    raise UserError("the pickle calls something that no array needs: it is not CIFAR's")


def _filled(state: Any) -> np.ndarray:
    """The array of a BUILD instruction's state."""
    _, shape, dtype, fortran, content = state
    content = content.encode("latin-1") if isinstance(content, str) else content
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _plain(value: Any) -> Any:
    """The value, its `_Array`s (or those in its dict) unwrapped."""
    if isinstance(value, dict):
        return {k: v.value if isinstance(v, _Array) else v for k, v in value.items()}
    return value.value if isinstance(value, _Array) else value
