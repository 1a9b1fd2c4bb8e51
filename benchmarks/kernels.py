"""Kernels of a program that XLA has compiled for a GPU, and what they read, write and compute.

Counted from the text of the optimised program, where every instruction outside of a fusion is a
kernel, or several by a library:

    read        the operands; of one that is only sliced or gathered from, what is taken
    written     the results; of a buffer that is updated in place, what is written (it is not read)
    FLOPs       of matrix products, convolutions and fused attention; a multiply-add counts as two

A loop counts as often as it runs, one of unknown length once; of a conditional the branch counts
that moves least, which in the programs of this package is the usual one. Scratch memory of
libraries does not count. What lies in the cache does: small arrays cost less than their bytes, and
an operand that a kernel reads several times costs more.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

from benchmarks.kernel_flops import OWN_PRODUCTS, attention_flops, convolution_flops

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
# Instructions that name memory and move none.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"} | {
    *("opt-barrier", "add-dependency", "partition-id", "replica-id"),
}
CALLS = {"while", "call", "conditional", "async-start"}


@dataclasses.dataclass
class Instruction:
    """One line of a program.

    Attributes:
        name: its name, unique in the program.
        result: the text of its type.
        opcode: what it does.
        operands: names, in order.
        line: the whole line.
    """

    name: str
    result: str
    opcode: str
    operands: list[str]
    line: str

    def attribute(self, pattern: str) -> str:
        """The group of a pattern in the line; empty where there is none."""
        found = re.search(pattern, self.line)
        return found[1] if found else ""

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from."""
        return self.attribute(r'op_name="([^"]*)"')


@dataclasses.dataclass
class Kernel:
    """What one instruction costs in all its runs.

    Attributes:
        name, opcode, op_name: of the instruction.
        kind: its group.
        times: how often it runs.
        read, written: bytes of all runs.
        flops: of all runs.
        dtype: of its first result.
        shapes: types of the operands and of the result.
        sources: lines of code, see `Module.sources`.
    """

    name: str
    opcode: str
    op_name: str
    kind: str
    times: int
    read: int
    written: int
    flops: int
    dtype: str
    shapes: str
    sources: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return self.read + self.written


def arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Types and shapes of the arrays in the text of a type."""
    return [
        (dtype, tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n))
        for dtype, sizes in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", text)
    ]


def array_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array; 4-bit numbers are taken for whole bytes, tokens for nothing."""
    if dtype in ("token", "opaque"):
        return 0
    width = BYTES.get(dtype) or max(int(re.search(r"\d+", dtype)[0]) // 8, 1)
    return width * math.prod(shape)


def size(text: str) -> int:
    """Bytes of all arrays in the text of a type."""
    return sum(array_bytes(*array) for array in arrays(text))


def _closing(text: str, start: int) -> int:
    """Where the bracket at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if not depth:
            return i
    raise ValueError(f"a bracket does not close: {text[:200]}")


def parse_instruction(line: str) -> Instruction | None:
    """The instruction of a line; None where the line holds none."""
    head = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    at = head.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    call = re.compile(r"\s*([\w\-]+)\(").match(line, end)
    if not call:
        return None
    start = call.end() - 1
    inside = line[start + 1 : _closing(line, start)]
    operands = [] if call[1] in ("parameter", "constant") else _names(inside)
    return Instruction(head[1], line[at:end], call[1], operands, line)


def _names(text: str) -> list[str]:
    """Names of operands, which may stand behind their types."""
    text = re.sub(r"/\*.*?\*/", "", text)
    found = re.findall(r"%([\w.\-]+)", text)
    return found or [word.split()[-1] for word in text.split(",") if word.strip()]


class Module:
    """The text of a compiled program, by computation."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = name = ""
        self.frames = _frames(text)
        for line in text.splitlines():
            start = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
            if start:
                name = start[2]
                self.entry = name if start[1] else self.entry
                self.computations[name] = []
            elif name and (found := parse_instruction(line)):
                self.computations[name].append(found)

    def sources(self, instruction: Instruction, package: str = "m2mkd_jax") -> tuple[str, ...]:
        """Lines of a package that an instruction comes from, most frequent first.

        Args:
            instruction: of a fusion, what is inside counts.
            package: the innermost frame in a folder of that name counts.
        """
        found = Counter(
            self._source(i.attribute(r"stack_frame_id=(\d+)"), package)
            for i in self._all_of(instruction)
        )
        return tuple(source for source, _ in found.most_common() if source)

    def _source(self, frame: str, package: str) -> str:
        while frame:
            file, line, parent = self.frames[frame]
            if f"/{package}/" in file:
                return f"{file.rpartition(f'/{package}/')[2]}:{line}"
            frame = "" if parent == frame else parent
        return ""

    def kernels(self) -> list[Kernel]:
        """Every kernel, with the loops around it."""
        return list(self._kernels(self.entry, 1))

    def _kernels(self, computation: str, times: int) -> Iterator[Kernel]:
        by_name = {i.name: i for i in self.computations[computation]}
        for instruction in self.computations[computation]:
            opcode = instruction.opcode
            if opcode in FREE or opcode.endswith(("-done", "-update")):
                continue
            if opcode in CALLS:
                yield from self._called(instruction, times)
                continue
            read, written = self._traffic(instruction, by_name)
            shapes = ", ".join(by_name[o].result for o in instruction.operands)
            yield Kernel(
                name=instruction.name,
                opcode=opcode,
                op_name=instruction.op_name,
                kind=self._kind(instruction),
                times=times,
                read=times * read,
                written=times * written,
                flops=times * self._flops(instruction, by_name),
                dtype=(arrays(instruction.result) or [("", ())])[0][0],
                shapes=f"{shapes} -> {instruction.result}",
                sources=self.sources(instruction),
            )

    def _called(self, instruction: Instruction, times: int) -> Iterator[Kernel]:
        """Kernels of the computations that a loop, a call or a conditional runs."""
        counted = instruction.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        inner = times * int(counted) if counted else times
        called = [list(self._kernels(name, inner)) for name in self._computations_of(instruction)]
        if instruction.opcode == "conditional":
            called = [min(called, key=lambda branch: sum(kernel.bytes for kernel in branch))]
        for kernels in called:
            yield from kernels

    @staticmethod
    def _computations_of(instruction: Instruction) -> list[str]:
        line = instruction.line
        found = re.findall(
            r"(?:body|condition|calls|to_apply|(?:true|false)_computation)=%?([\w.\-]+)", line
        )
        for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
            found += branches.replace("%", "").replace(" ", "").split(",")
        return found

    def _body(self, instruction: Instruction) -> list[Instruction]:
        """What a fusion computes; an instruction alone is its own body."""
        called = instruction.attribute(r"calls=%?([\w.\-]+)")
        return self.computations[called] if called else [instruction]

    def _traffic(
        self, instruction: Instruction, by_name: dict[str, Instruction]
    ) -> tuple[int, int]:
        """Bytes read and written in one run."""
        sizes = [size(by_name[o].result) for o in instruction.operands]
        if instruction.opcode == "fusion":
            return self._fusion_traffic(instruction, sizes)
        if instruction.opcode == "custom-call":
            return sum(sizes), _library_results(instruction)
        if instruction.opcode in _TAKING:
            taken = size(instruction.result)
            return min(taken, sizes[0]) + sum(sizes[1:]), taken
        if instruction.opcode in _UPDATING:
            update = sizes[_UPDATING[instruction.opcode]]
            return sum(sizes[1:]), update
        written = size(instruction.result)
        if instruction.opcode.endswith("-start"):  # its result names the operand too
            written = max(written - sum(sizes), 0)
        return sum(sizes), written

    def _fusion_traffic(self, instruction: Instruction, sizes: list[int]) -> tuple[int, int]:
        body = self._body(instruction)
        by_name = {i.name: i for i in body}
        users: dict[str, list[tuple[Instruction, int]]] = {}
        for user in body:
            for place, operand in enumerate(user.operands):
                users.setdefault(operand, []).append((user, place))

        def taken(name: str, whole: int) -> int:
            """Bytes that are read of an array."""
            total = 0
            for user, place in users.get(name, ()):
                if user.opcode in ("bitcast", "get-tuple-element"):
                    total += taken(user.name, whole)
                elif user.opcode in _TAKING and place == 0:
                    total += size(user.result)
                elif user.opcode in _UPDATING and place == 0:
                    continue
                elif user.opcode != "tuple":
                    return whole
            return min(total, whole)

        read = 0
        for parameter in body:
            if parameter.opcode == "parameter":
                number = int(re.search(r"parameter\((\d+)\)", parameter.line)[1])
                read += taken(parameter.name, sizes[number])
        root = next(i for i in body if i.line.lstrip().startswith("ROOT"))
        roots = [by_name[o] for o in root.operands] if root.opcode == "tuple" else [root]
        if len(roots) > 1 and any(i.opcode == "custom-call" for i in body):
            roots = roots[:-1] if _is_scratch(roots[-1].result) else roots
        return read, sum(self._written(r, by_name) for r in roots)

    @staticmethod
    def _written(root: Instruction, by_name: dict[str, Instruction]) -> int:
        """Bytes that one result of a fusion writes."""
        inner = root
        while inner.opcode == "bitcast":
            inner = by_name[inner.operands[0]]
        if inner.opcode in _UPDATING:
            return size(by_name[inner.operands[_UPDATING[inner.opcode]]].result)
        if inner.opcode == "custom-call":
            return _library_results(inner)
        return 0 if inner.opcode == "parameter" else size(root.result)

    def _kind(self, instruction: Instruction) -> str:
        """The group of kernels that an instruction belongs to."""
        target = instruction.attribute(r'custom_call_target="([^"]*)"')
        if "fmha" in target:
            return "attention"
        if "conv" in target:
            return "convolution"
        if target.endswith("triton"):
            return "kernel of models/nac/fused"
        if target:
            return "matrix product" if "cublas" in target else f"custom call {target}"
        if instruction.opcode != "fusion":
            return {"dot": "matrix product"}.get(instruction.opcode, instruction.opcode)
        opcodes = {i.opcode for i in self._all_of(instruction)}
        kinds = (kind for opcode, kind in _FUSIONS.items() if opcode in opcodes)
        return next(kinds, "fusion, elementwise")

    def _all_of(self, instruction: Instruction) -> Iterator[Instruction]:
        """Instructions of a fusion and of the fusions inside it."""
        for inner in self._body(instruction):
            yield inner
            if inner is not instruction and inner.opcode == "fusion":
                yield from self._all_of(inner)

    def _flops(self, instruction: Instruction, by_name: dict[str, Instruction]) -> int:
        """FLOPs in one run."""
        if instruction.opcode == "fusion":
            body = self._body(instruction)
            inside = {i.name: i for i in body}
            return sum(self._flops(i, inside) for i in body)
        typed = [arrays(by_name[o].result) for o in instruction.operands]
        operands = [shapes[0][1] if shapes else () for shapes in typed]
        result = (arrays(instruction.result) or [("", ())])[0][1]
        target = instruction.attribute(r'custom_call_target="([^"]*)"')
        if "fmha" in target:
            return attention_flops(5 if target.endswith("Backward") else 2, operands)
        if target.endswith("triton"):
            products = OWN_PRODUCTS.get(instruction.attribute(r'\bname = "(\w+)"'), 0)
            return attention_flops(products, operands) if products else 0
        if labels := instruction.attribute(r"dim_labels=([\w>-]+)"):
            return convolution_flops(target, labels, operands, result)
        if target:
            axes = instruction.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
        else:
            axes = instruction.attribute(r"lhs_contracting_dims=\{([^}]*)\}")
        if not axes:
            return 0
        contracted = (operands[0][int(axis)] for axis in re.findall(r"\d+", axes))
        return 2 * math.prod(result) * math.prod(contracted)


def _is_scratch(result: str) -> bool:
    """Whether the last of a library's results, by its type, is its scratch memory."""
    return result.startswith(("s8", "u8"))


def _library_results(call: Instruction) -> int:
    """Bytes of a library's results, but for its scratch memory."""
    results = arrays(call.result)
    if len(results) > 1 and _is_scratch(results[-1][0]):
        results = results[:-1]
    return sum(array_bytes(*array) for array in results)


_TAKING = {"dynamic-slice", "slice", "gather"}
_UPDATING = {"dynamic-update-slice": 1, "scatter": 2}  # and which operand is written
# Kinds of fusions by an instruction inside, the first that fits.
_FUSIONS = {
    "dot": "matrix product",
    "convolution": "convolution",
    "custom-call": "matrix product",
    "scatter": "fusion, scatter",
    "gather": "fusion, gather",
    "reduce": "fusion, reduction",
    "dynamic-update-slice": "fusion, into a stack",
    "transpose": "fusion, transposition",
    "concatenate": "fusion, concatenation",
}


def _frames(text: str) -> dict[str, tuple[str, str, str]]:
    """File, line and calling frame of every stack frame that the program names."""
    names = dict(re.findall(r'^(\d+) "(.*)"$', text.partition("FunctionNames")[0], re.MULTILINE))
    places = dict(
        (number, (names.get(file, ""), line))
        for number, file, line in re.findall(
            r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", text, re.MULTILINE
        )
    )
    return {
        number: (*places[place], parent)
        for number, place, parent in re.findall(
            r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}", text, re.MULTILINE
        )
    }
