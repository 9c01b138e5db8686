"""Does communication hide behind compute? Read from a compiled program's schedule.

Experimental: it reads the text of scheduled HLO, which XLA may change. A schedule proves the
order of events, not their duration: that every move *can* hide, not that the compute is longer.
No accelerator is needed, a program compiled ahead of time for a TPU or GPU will do.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import jax
import numpy as np

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_BITS = {"pred": 8, "bf16": 16}
# Work that can hide a move: matrix products and kernels, wherever they are nested.
_KERNELS = ("tpu_custom_call", "mosaic_gpu", "triton", "cudnn", "cublas", "__gpu$")
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) "
    r"(?P<op>[a-z][\w\-]*)\((?P<rest>.*)$"
)
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Move:
    """One collective, and what is computed between its start and its end."""

    kind: str
    name: str
    bytes: int
    synchronous: bool
    hidden_by: tuple[str, ...]
    times: int = 1  # runs per call: more than one in the body of a loop of known length
    devices: tuple[int, ...] = ()  # one group of members, or one pair of source and target

    @property
    def exposed(self) -> bool:
        """Whether nothing is computed while it runs."""
        return not self.hidden_by


@dataclasses.dataclass(frozen=True)
class Overlap:
    """What `verify_overlap` found."""

    moves: tuple[Move, ...]
    copies: tuple[tuple[str, int], ...]

    @property
    def exposed(self) -> tuple[Move, ...]:
        """The moves behind which nothing is computed."""
        return tuple(move for move in self.moves if move.exposed)

    def of(self, kind: str) -> tuple[Move, ...]:
        """The collectives of one kind, such as "collective-permute"."""
        return tuple(move for move in self.moves if move.kind == kind)

    def __str__(self) -> str:
        def line(move: Move) -> str:
            how = "synchronous" if move.synchronous else "EXPOSED" if move.exposed else "behind"
            return f"{move.kind} {move.name} {move.bytes:,} B {how} {' '.join(move.hidden_by)}"

        copies = [f"copy {name} {size:,} B" for name, size in self.copies]
        return "\n".join([*map(line, self.moves), *copies])


def verify_overlap(compiled: jax.stages.Compiled | str, *, copies_of: int | None = None) -> Overlap:
    """Every collective of a compiled program, with the compute scheduled while it runs.

    Args:
      compiled: `jit(f).lower(...).compile()`, or its text.
      copies_of: report copies of arrays of exactly this many bytes too, such as a rank's keys.

    Raises:
      ValueError: the program is not scheduled, so that its text says nothing about order.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    if text is None or "is_scheduled=true" not in text.partition("\n")[0]:
        raise ValueError("verify_overlap needs a scheduled program (is_scheduled=true)")
    program = _Program(text)
    moves, copies = [], []
    for times, instructions in program.reachable():
        moves += _moves(program, times, instructions)
        for i in instructions:
            if i.op in ("copy", "copy-start") and i.bytes == copies_of:
                copies.append((i.name, i.bytes))
    return Overlap(tuple(moves), tuple(copies))


def _moves(program: "_Program", times: int, instructions: list["_Instruction"]) -> list[Move]:
    """The collectives of one computation, in the order in which they end."""
    found = []
    # What has started, by every name under which it is handed on until it is done.
    running: dict[str, tuple[_Instruction, list[str]]] = {}

    for i in instructions:
        source = next((running[n] for n in i.operands if n in running), None)
        if i.op in _COLLECTIVES:
            found.append(program.move(i, i.moved, times, synchronous=True))
        elif program.fused_scatter(i):
            scatter = dataclasses.replace(i, op="reduce-scatter")
            found.append(program.move(scatter, i.bytes, times, synchronous=True))
        elif source is not None and (i.op.endswith("-done") or "collective-done" in i.name):
            start, hidden_by = source
            running = {name: what for name, what in running.items() if what[0] is not start}
            found.append(program.move(start, i.moved, times, hidden_by=hidden_by))
        elif (kind := program.started(i)) is not None:
            running[i.name] = (dataclasses.replace(i, op=kind), [])
        else:
            if program.computes(i) and (source is None or program.weaves(i)):
                for hidden_by in {id(what[1]): what[1] for what in running.values()}.values():
                    hidden_by.append(i.name)
            if source is not None and (
                i.op.endswith("-update") or i.op == "get-tuple-element" or program.weaves(i)
            ):
                running[i.name] = source
    return found


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    op: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])

    @property
    def called(self) -> list[str]:
        found = []
        for one, many in _CALLED.findall(self.rest):
            found += [one] if one else re.findall(r"[\w.\-]+", many)
        return found

    @property
    def bytes(self) -> int:
        """Size of the result; of a tuple, its largest member."""
        return max(self._sizes, default=0)

    @property
    def moved(self) -> int:
        """Size of what a collective brings: of several that XLA has combined, all together."""
        whole = self.op in _COLLECTIVES or self.op.endswith("-done")
        return sum(self._sizes) if whole else self.bytes

    @property
    def _sizes(self) -> list[int]:
        sizes = []
        for dtype, shape in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", self.type):
            bits = _BITS.get(dtype) or int((re.findall(r"\d+", dtype) or ["0"])[0])
            sizes.append(bits * math.prod(int(n) for n in shape.split(",") if n) // 8)
        return sizes


class _Program:
    """The computations of a module: lists of instructions in the order of the schedule."""

    def __init__(self, text: str):
        self.computations: dict[str, list[_Instruction]] = {}
        self.entry = ""
        self._heavy: dict[str, bool] = {}
        body: list[_Instruction] = []
        for line in text.splitlines():
            if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
                body = self.computations[head[2]] = []
                self.entry = head[2] if head[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                body.append(_Instruction(**found.groupdict()))

    def reachable(self) -> Iterator[tuple[int, list[_Instruction]]]:
        """The computations that run as their own sequence, and how often; not fusions' bodies."""
        seen, waiting = set(), [(1, self.entry)]
        while waiting:
            times, name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            yield times, self.computations[name]
            for i in self.computations[name]:
                if i.op in ("while", "conditional", "call"):
                    waiting += [(times * self.trips(i), called) for called in i.called]

    def trips(self, i: _Instruction) -> int:
        """How often a loop runs: as XLA notes it, or up to the one number it compares with."""
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', i.rest):
            return int(noted[1])
        condition = re.search(r"condition=%?([\w.\-]+)", i.rest)
        tests = self.computations.get(condition[1], []) if condition else []
        bounds = [int(j.rest.partition(")")[0]) for j in tests
                  if j.op == "constant" and j.type.startswith("s32[]")]  # fmt: skip
        counted = any(j.op == "compare" and "direction=LT" in j.rest for j in tests)
        return bounds[0] if counted and len(bounds) == 1 else 1

    def fused_scatter(self, i: _Instruction) -> bool:
        """Whether `i` is a reduce-scatter as TPUs write it: an all-reduce fused with its slice."""
        return i.op == "fusion" and any("all-reduce-scatter" in name for name in i.called)

    def weaves(self, i: _Instruction) -> bool:
        """Whether `i` computes and moves on a collective that has started (TPU v5e)."""
        return i.op == "fusion" and any("async_collective_fusion" in name for name in i.called)

    def move(
        self,
        i: _Instruction,
        size: int,
        times: int,
        *,
        hidden_by: Sequence[str] = (),
        synchronous: bool = False,
    ) -> Move:
        """The collective that `i` is or starts, and whose result has `size` bytes."""
        members = self.group(i)
        if i.op == "reduce-scatter":  # of which every member keeps a part only
            size *= len(members)
        synchronous |= '"is_sync":true' in i.rest or "is_sync=true" in i.rest
        return Move(i.op, i.name, size, synchronous, tuple(hidden_by), times, members)

    def group(self, i: _Instruction) -> tuple[int, ...]:
        """The first group of devices that a collective joins, or its first pair."""
        if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", i.rest):
            return tuple(map(int, found[1].split(",")))
        iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.rest)
        if iota:
            shape, counted = (tuple(map(int, part.split(","))) for part in iota.group(1, 2))
            order = tuple(map(int, iota[3].split(","))) if iota[3] else None
            ids = np.arange(math.prod(counted)).reshape(counted)
            return tuple(ids.transpose(order).reshape(shape)[0].tolist())
        if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", i.rest):
            sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
            joined = re.findall(r"'(\w+)'", named[2])
            ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
            return tuple(
                ids[tuple(slice(None) if a in joined else 0 for a in sizes)].ravel().tolist()
            )
        inner = (j for name in i.called for j in self.computations.get(name, []))
        return next((g for j in inner if (g := self.group(j))), ())

    def started(self, i: _Instruction) -> str | None:
        """The kind of the collective that `i` starts, if it starts one."""
        if i.op.removesuffix("-start") in _COLLECTIVES:
            return i.op.removesuffix("-start")
        fused = i.op == "fusion" and "async" in i.name and "done" not in i.name
        if fused or i.op in ("async-start", "call-start"):  # the latter: on another core
            inner = (j for name in i.called for j in self.computations.get(name, []))
            kinds = (j.op.removesuffix("-start") for j in inner)
            return next((kind for kind in kinds if kind in _COLLECTIVES), None)
        return None

    def computes(self, i: _Instruction) -> bool:
        """Whether `i` is, or contains, a matrix product or a kernel."""
        if i.op in ("dot", "convolution"):
            return True
        if i.op == "custom-call":
            return any(kernel in i.rest for kernel in _KERNELS)
        return any(map(self._computes, i.called))

    def _computes(self, name: str) -> bool:
        if name not in self._heavy:
            self._heavy[name] = any(map(self.computes, self.computations.get(name, [])))
        return self._heavy[name]
