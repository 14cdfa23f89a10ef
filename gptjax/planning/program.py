"""A compiled program as a list of instructions, each with how often a step runs it.

In: optimised HLO (`compiled.as_text()`). Out: `Executed` instructions in the order of the text, the
loops around each multiplied out, which XLA's own cost analysis does not do.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """result: its shape, as text. operands: names. attributes: the text after the operands."""

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    arguments: str  # what stands between the parentheses
    attributes: str
    is_root: bool = False

    def attribute(self, name: str) -> str:
        """A name after `name=`, such as the body of a loop; "" where there is none."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else ""

    @property
    def called(self) -> list[str]:
        """The computations that it runs, but for the condition of a loop."""
        groups = [match[1] for match in _CALLED.finditer(self.attributes)]
        return re.findall(r"[\w.\-]+", " ".join(groups))


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction of a computation, and how often it runs.

    loops: names of the loops around it, outermost first. exact: whether the number of rounds of
    each is known; a loop that ends by its data counts as one round. fused: it is part of a fusion.
    """

    instruction: Instruction
    computation: Mapping[str, Instruction]  # that it stands in
    computation_name: str
    count: int
    loops: tuple[str, ...]
    exact: bool
    fused: bool


@dataclasses.dataclass(frozen=True)
class Program:
    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    def executed(self) -> Iterator[Executed]:
        """Every instruction that a run of the program reaches, fusions and calls entered."""
        return self._executed(self.entry, {}, 1, (), True)

    def _executed(
        self,
        name: str,
        known: Mapping[str, Numbers],
        count: int,
        loops: tuple[str, ...],
        exact: bool,
        fused: bool = False,
    ) -> Iterator[Executed]:
        instructions = self.computations.get(name, {})
        for instruction in instructions.values():
            yield Executed(instruction, instructions, name, count, loops, exact, fused)
            if instruction.opcode.endswith(("-done", "-update")):
                continue  # the computation is that of its start
            if instruction.opcode != "while":
                is_fusion = fused or instruction.opcode == "fusion"
                for called in instruction.called:
                    yield from self._executed(called, {}, count, loops, exact, is_fusion)
                continue
            state = self._state(instruction, instructions, known)
            trips = self._trips(instruction, state)
            body = instruction.attribute("body")
            yield from self._executed(
                body,
                {_parameter(self.computations.get(body, {})): state},
                count * (1 if trips is None else trips),
                (*loops, instruction.name),
                exact and trips is not None,
            )

    def _state(
        self,
        loop: Instruction,
        instructions: Mapping[str, Instruction],
        known: Mapping[str, Numbers],
    ) -> Numbers:
        """The elements of a loop's state that are known integers where it begins."""
        source = instructions.get(loop.operands[0])
        if source is None or source.opcode != "tuple":
            return known.get(loop.operands[0], {})
        numbers = (
            (i, _integer(name, instructions, known)) for i, name in enumerate(source.operands)
        )
        return {i: number for i, number in numbers if number is not None}

    def _trips(self, loop: Instruction, state: Numbers) -> int | None:
        """Rounds of a loop `for (i = start; i < end; i += step)`; None for any other."""
        if match := _TRIPS.search(loop.attributes):
            return int(match[1])
        condition = self.computations.get(loop.attribute("condition"), {})
        comparison = self._comparison(condition)
        if comparison is None:
            return None
        counter, end_name = comparison
        end = _integer(end_name, condition, {_parameter(condition): state})
        start = state.get(counter)
        if end is None or start is None:
            return None
        step = self._step(self.computations.get(loop.attribute("body"), {}), counter)
        return max(-((start - end) // step), 0)

    def _comparison(self, condition: Mapping[str, Instruction]) -> tuple[int, str] | None:
        """(index of the counter in the state, name of what it must be smaller than)."""
        root = next((i for i in condition.values() if i.is_root), None)
        if root is None:
            return None
        left, right = (root.operands + ("", ""))[:2]
        if root.opcode == "fusion":  # of one comparison
            inner = self.computations.get(root.attribute("calls"), {})
            compares = [i for i in inner.values() if i.opcode == "compare"]
            if len(compares) != 1 or "direction=LT" not in compares[0].attributes:
                return None
            places = [inner[name].arguments for name in compares[0].operands]
            if not all(place.isdigit() for place in places):
                return None
            left, right = (root.operands[int(place)] for place in places)
        elif root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        element = condition.get(left)
        if element is None or element.opcode != "get-tuple-element":
            return None
        return int(element.attribute("index")), right

    def _step(self, body: Mapping[str, Instruction], counter: int) -> int:
        """What a round adds to the counter: 1, unless the body says so in plain words."""
        root = next((i for i in body.values() if i.is_root and i.opcode == "tuple"), None)
        if root is None or counter >= len(root.operands):
            return 1
        new = body.get(root.operands[counter])
        while new is not None and new.opcode in ("copy", "bitcast"):
            new = body.get(new.operands[0])
        if new is None or new.opcode != "add":
            return 1
        steps = [_integer(name, body, {}) for name in new.operands]
        return next((step for step in steps if step), 1)


Numbers = Mapping[int, int]  # {index in a tuple: its value}


@functools.lru_cache(maxsize=4)
def parse(hlo: str) -> Program:
    """The program of an optimised module. Raises ValueError where the text has no entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ""
    current: dict[str, Instruction] | None = None
    for line in _lines(hlo):
        if current is None:
            if match := _COMPUTATION.match(line):
                current = computations.setdefault(match[1], {})
                if line.startswith("ENTRY"):
                    entry = match[1]
        elif line.startswith("}"):
            current = None
        elif match := _INSTRUCTION.match(line):
            instruction = _instruction(match[2], match[3], is_root=bool(match[1]))
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("no ENTRY computation: is this the text of a compiled program?")
    return Program(computations, entry)


def _lines(hlo: str) -> Iterator[str]:
    """Lines, where the attributes of a kernel, which have lines of their own, are one with it."""
    whole, is_open = "", False
    for line in hlo.splitlines():
        whole += line
        is_open = line.endswith("_metadata={") or (is_open and not line.startswith("}}"))
        if not is_open:
            yield whole
            whole = ""


def _instruction(name: str, text: str, *, is_root: bool) -> Instruction:
    """Of `RESULT opcode(operands), attributes`."""
    text = _COMMENT.sub("", text)
    space = _outside_brackets(text, " ")
    result, rest = text[:space], text[space + 1 :]
    opcode, _, rest = rest.partition("(")
    end = _outside_brackets("(" + rest, ")") - 1
    arguments, attributes = rest[:end], rest[end + 1 :]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(name, opcode, result, operands, arguments, attributes, is_root)


def _outside_brackets(text: str, wanted: str) -> int:
    """Where a character stands in no bracket, or closes the first; the length where nowhere."""
    depth = 0
    for i, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if character == wanted and depth == 0:
            return i
    return len(text)


def _parameter(computation: Mapping[str, Instruction]) -> str:
    """The name of a computation's only parameter."""
    return next((i.name for i in computation.values() if i.opcode == "parameter"), "")


def _integer(
    name: str, instructions: Mapping[str, Instruction], known: Mapping[str, Numbers]
) -> int | None:
    """The value of a scalar that follows from constants and the known elements of a tuple."""
    instruction = instructions.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast"):
        instruction = instructions.get(instruction.operands[0])
    if instruction is None:
        return None
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.arguments):
        return int(instruction.arguments)
    if instruction.opcode == "get-tuple-element":
        return known.get(instruction.operands[0], {}).get(int(instruction.attribute("index")))
    return None
