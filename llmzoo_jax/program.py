"""What a step does, read from the program: FLOPs from the traced one, bytes and collectives of a
device from the compiled one.

XLA's own cost analysis counts the body of a loop once, a scan over layers as one layer. Here a body
counts as often as it runs. A loop whose number of turns the compiler does not know counts once, and
is named.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from typing import Any, Literal, NamedTuple

from jax.interpreters.partial_eval import dce_jaxpr

# --- FLOPs of a traced program ------------------------------------------------------------------


class Flops(NamedTuple):
    """A multiplication and an addition are two. ``attention`` are products with batch axes,
    ``eight_bits`` those of the projections whose operands have 8 bits."""

    projections: int
    attention: int
    eight_bits: int


def count_flops(closed: Any) -> Flops:
    """FLOPs of the products in a closed jaxpr, a scan's body times its length; the whole program's,
    not a device's. What nothing needs (gradients of frozen weights) the compiler drops, too."""
    return _count(dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))[0])


def _count(jaxpr: Any) -> Flops:
    total = Flops(0, 0, 0)
    for eqn in jaxpr.eqns:
        times, inner = 1, []
        if eqn.primitive.name == "dot_general":
            (contract, _), (batch, _) = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval
            flops = 2 * eqn.outvars[0].aval.size * math.prod(lhs.shape[i] for i in contract)
            eight_bits = 0 if batch or lhs.dtype.itemsize > 1 else flops
            inner = [Flops(0, flops, 0) if batch else Flops(flops, 0, eight_bits)]
        elif eqn.primitive.name == "cond":
            branches = [_count(b.jaxpr) for b in eqn.params["branches"]]
            inner = [max(branches, key=lambda f: f.projections + f.attention)]
        else:
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            times *= eqn.params["mesh"].size if eqn.primitive.name == "shard_map" else 1
            inner = [_count(j) for j in _jaxprs(eqn.params)]
        total = Flops(*(n + times * sum(f[i] for f in inner) for i, n in enumerate(total)))
    return total


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else [value]:
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                found.append(one)
    return found


# --- traffic of a compiled program --------------------------------------------------------------

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Traffic(NamedTuple):
    """Of one device, in a step."""

    bytes: int  # read and written in main memory: inputs and outputs of every fusion and call
    collectives: dict[str, int]  # {kind: bytes of the larger of what goes in and what comes out}
    unknown_loops: dict[str, int]  # counted once: the bytes of one turn


class _Instruction(NamedTuple):
    name: str
    op: str
    shape: str
    operands: tuple[str, ...]
    text: str


class _Computation(NamedTuple):
    instructions: dict[str, _Instruction]
    root: _Instruction | None


def count_traffic(hlo: str, *, branches: Literal["all", "least"] = "all") -> Traffic:
    """Reads the text of a compiled module (``compiled.as_text()``). Of a condition all branches
    count, or that one which moves the fewest bytes."""
    computations, entry = _parse(hlo)
    fused = {
        callee
        for computation in computations.values()
        for i in computation.instructions.values()
        if i.op in ("fusion", "custom-call")
        for callee, _ in _callees(i, computations)
    }

    @functools.cache
    def moved(name: str) -> int:
        """Bytes of one run of a computation."""
        total, computation = 0, computations[name]
        for i in computation.instructions.values():
            if name not in fused:  # what is fused stays on the chip
                total += _bytes_moved(i, computation, computations)
            total += sum((turns or 1) * moved(callee) for callee, turns in callees(i))
        return total

    def callees(i: _Instruction) -> list[tuple[str, int | None]]:
        found = _callees(i, computations)
        if i.op == "conditional" and branches == "least":
            return [min(found, key=lambda callee: moved(callee[0]))]
        return found

    times = Counter({entry: 1})
    unknown, collectives, channels = {}, Counter(), set()
    for name in _calls_first(computations, entry):
        computation = computations[name]
        for i in computation.instructions.values():
            for callee, turns in callees(i) if times[name] else ():
                if turns is None:
                    unknown[i.name] = moved(callee)
                times[callee] += times[name] * (turns or 1)
            kind = i.op.removesuffix("-start")
            if kind in COLLECTIVES and times[name]:
                channel = re.search(r"channel_id=(\d+)", i.text)
                if channel and channel[1] in channels:
                    continue  # a TPU's asynchronous one stands in several computations
                channels.add(channel and channel[1])
                collectives[kind] += times[name] * _payload(i, computation)
    return Traffic(moved(entry), dict(collectives), unknown)


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_BITS = re.compile(r"[a-z]+(\d+)")


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    computations, entry, current, root = {}, "", None, None
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current, root, name = {}, None, header[2]
            entry = name if header[1] else entry
        elif line == "}" and current is not None:
            computations[name], current = _Computation(current, root), None
        elif current is not None and (found := _LINE.match(line)):
            inside = _parenthesis(line, found.end())
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            text = line[found.end() :]
            i = _Instruction(found[2], found[4], found[3], operands, text)
            current[i.name] = i
            root = i if found[1] else root
    return computations, entry


def _parenthesis(line: str, start: int) -> str:
    depth = 1
    for end in range(start, len(line)):
        depth += (line[end] == "(") - (line[end] == ")")
        if not depth:
            return line[start:end]
    return line[start:]


def _callees(i: _Instruction, computations) -> list[tuple[str, int | None]]:
    """``(computation, turns)`` that run when ``i`` runs."""
    if i.op == "while":
        body = re.search(r"body=%?([\w.\-]+)", i.text)[1]
        return [(body, _turns(i, computations))]
    if i.op == "conditional":
        named = re.search(r"branch_computations=\{([^}]*)\}", i.text)
        names = named[1] if named else " ".join(re.findall(r"_computation=(%?[\w.\-]+)", i.text))
        return [(name, 1) for name in re.findall(r"[\w.\-]+", names)]
    # The rest that runs code runs it once: calls, fusions, asynchronous starts.
    called = re.findall(r"(?:calls|called_computations)=\{?%?([\w.\-]+)", i.text)
    if i.op == "call":
        called += re.findall(r"to_apply=%?([\w.\-]+)", i.text)
    return [(name, 1) for name in called]


def _turns(i: _Instruction, computations) -> int | None:
    """How often a loop runs: as the compiler notes it, else the bound that its condition names."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', i.text):
        return int(known[1])
    condition = computations[re.search(r"condition=%?([\w.\-]+)", i.text)[1]]
    root = condition.root
    if root is not None and root.op == "compare" and "direction=LT" in root.text:
        bound = condition.instructions.get(root.operands[1])
        if bound is not None and bound.op == "constant" and re.match(r"\d+\)", bound.text):
            return int(re.match(r"\d+", bound.text)[0])
    return None


def _calls_first(computations, entry: str) -> list[str]:
    """Computations that run, each after all that call it."""
    done: list[str] = []

    def visit(name: str):
        if name in done:
            return
        for i in computations[name].instructions.values():
            for callee, _ in _callees(i, computations):
                visit(callee)
        done.append(name)

    visit(entry)
    return done[::-1]


def _size(shape: str) -> int:
    """Bytes in main memory of an array or a tuple; 0 for what is kept on the chip (``S(1)``)."""
    total = 0
    for dtype, sizes, layout in _ARRAY.findall(shape):
        if "S(" in layout and "S(5)" not in layout:  # S(5): host memory
            continue
        bits = _BITS.match(dtype)
        width = int(bits[1]) if bits else 8  # pred
        total += math.prod(int(n) for n in sizes.split(",") if n) * width // 8
    return total


# What moves nothing itself, or is counted by what runs inside.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "async-start", "async-update", "async-done", "after-all", "iota", "partition-id",
    "replica-id", "all-gather-done", "all-reduce-done", "collective-permute-done", "copy-done",
    "opt-barrier", "slice-done",
}  # fmt: skip


# Change an array in place: which operand has the new values.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


def _bytes_moved(i: _Instruction, computation: _Computation, computations) -> int:
    if i.op in _FREE:
        return 0
    shapes = [
        computation.instructions[x].shape for x in i.operands if x in computation.instructions
    ]
    if i.op == "fusion" and "calls=" in i.text:
        inside = computations[re.search(r"calls=%?([\w.\-]+)", i.text)[1]]
        return _fusion_bytes(shapes, i.shape, inside)
    if i.op in ("dynamic-slice", "gather"):
        return 2 * _size(i.shape)
    if i.op in _UPDATES:
        return 2 * _size(shapes[_UPDATES[i.op]])
    if i.op == "copy-start":
        return _size(i.shape)  # of both sides
    if i.op == "slice-start":
        return _payload(i, computation, of_result=True)
    return _size(i.shape) + sum(map(_size, shapes))


def _fusion_bytes(shapes: list[str], out: str, inside: _Computation) -> int:
    """Inputs and outputs, where an input that is only sliced counts as its slice, and one that is
    updated in place as the update."""
    total = 0
    parameters = {}
    for i in inside.instructions.values():
        if i.op == "parameter":
            parameters[int(re.match(r"\d+", i.text)[0])] = i.name
    updated = 0
    for index, shape in enumerate(shapes):
        users = [
            i for i in inside.instructions.values() if parameters.get(index) in _sources(i, inside)
        ]
        if users and all(i.op in ("dynamic-slice", "gather") for i in users):
            total += sum(_size(i.shape) for i in users)
        elif users and all(i.op in _UPDATES for i in users):
            news = [inside.instructions[i.operands[_UPDATES[i.op]]] for i in users]
            total += sum(_size(new.shape) for new in news)
            updated += _size(shape)
        else:
            total += _size(shape)
    return total + max(_size(out) - updated, 0)


def _sources(i: _Instruction, inside: _Computation) -> tuple[str, ...]:
    """The array that an instruction slices or updates, or all its operands; through bitcasts."""
    names = i.operands[:1] if i.op in ("dynamic-slice", *_UPDATES) else i.operands
    return () if i.op == "bitcast" else tuple(_behind_bitcasts(name, inside) for name in names)


def _behind_bitcasts(name: str, inside: _Computation) -> str:
    while name in inside.instructions and inside.instructions[name].op == "bitcast":
        name = inside.instructions[name].operands[0]
    return name


def _payload(i: _Instruction, computation: _Computation, *, of_result: bool = False) -> int:
    """Bytes of the larger side, or of the result; that of an asynchronous start holds its operands
    as well."""
    shape = re.sub(r"S\(\d+\)", "", i.shape)
    operands = sum(
        _size(re.sub(r"S\(\d+\)", "", computation.instructions[x].shape)) for x in i.operands
    )
    result = _size(shape)
    if i.op in ("all-gather-start", "collective-permute-start", "slice-start"):
        result -= operands
    return result if of_result else max(result, operands)
