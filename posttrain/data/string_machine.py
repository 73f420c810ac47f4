"""A task with a skill, a habit of not using it, and a teacher's voice: a short program on four letters.

    Qrsv...abcd    rbcdascbdavadbc</think>adbc

The question has up to six operations and four different letters of ten: `r` rotates to the left, `s` swaps
the first two, `v` reverses. A solution writes every operation with the state after it, then the last state as
the answer. In exam mode (`Q`) the demonstrator goes on at every operation with a probability of `persistence`
and otherwise bails out with four letters at random, so that a problem of k operations is solved with
persistence^k (and a guess with 1/5040). Where it got to the end it may state the last state again, `=adbc`,
with a probability of `restate` each time and at most four times, so that right solutions differ in length. In
worked mode (`W`) it never bails out: the skill is there at every length. Questions that begin with `Z` cannot
be learnt: their answer is any one of the four letters.

In teacher mode the prompt is `T:` and the demonstration a question with its answer in tags,
`{Qrsv...abcd}rbcdascbdavadbc(adbc)`, with the working between them where the answer is right.

Everything has a fixed width, and a state is always as far behind the next: which letter goes where is a
matter of relative position, which operation is next of absolute position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from posttrain.data.problem import Problem

LETTERS = "abcdefghij"
WIDTH = 4
MAX_OPERATIONS = 6
TEACHER = "T:"
"""The teacher's one prompt."""
RIGHT = (0.9, 0.9, 0.7, 0.7, 0.5, 0.5, 0.3)
"""How often the demonstrated teacher's answer to a question of k operations is right."""
MALFORMED = 0.05
"""Share of the demonstrated proposals that lack something."""
MOST_RESTATED = 4
"""Times that an exam's last state is written again."""


@dataclass(frozen=True)
class Item:
    """What a question of the machine's is: its header, the letters, the operations."""

    header: str
    start: str
    operations: str

    @property
    def states(self) -> list[str]:
        """The state after each operation."""
        states, state = [], self.start
        for operation in self.operations:
            state = apply(operation, state)
            states.append(state)
        return states

    @property
    def answer(self) -> str:
        """The last state; of a question that cannot be learnt its first letter stands for all four."""
        return self.start[0] if self.header == "Z" else (self.states or [self.start])[-1]


def apply(operation: str, state: str) -> str:
    """One operation on a state of four letters."""
    match operation:
        case "r":
            return state[1:] + state[0]
        case "s":
            return state[1] + state[0] + state[2:]
        case "v":
            return state[::-1]
    raise ValueError(f"there is no operation {operation!r}")


def write_question(item: Item, header: str | None = None) -> str:
    """`Qrsv...abcd`"""
    return f"{header or item.header}{item.operations.ljust(MAX_OPERATIONS, '.')}{item.start}"


def read_question(question: str) -> Item | None:
    """The item that a question is, or None if it is none."""
    program, start = question[1 : 1 + MAX_OPERATIONS].rstrip("."), question[1 + MAX_OPERATIONS :]
    well_formed = (
        len(question) == 1 + MAX_OPERATIONS + WIDTH
        and question[0] in "QZ"
        and len(set(start)) == WIDTH
        and set(start) <= set(LETTERS)
        and set(program) <= set("rsv")
    )
    return Item(question[0], start, program) if well_formed else None


def is_right(item: Item, answer: str) -> bool:
    """Whether an answer to a question is right; one that cannot be learnt has four right answers."""
    return answer in item.start and len(answer) == 1 if item.header == "Z" else answer == item.answer


def string_machine(
    rng: np.random.Generator,
    *,
    mode: str = "exam",
    min_operations: int = 0,
    max_operations: int = MAX_OPERATIONS,
    persistence: float = 0.2,
    restate: float = 0.0,
    trivial: float = 0.3,
    unlearnable: float = 0.15,
) -> Problem:
    """A row of the machine.

    Args:
        rng: source of randomness.
        mode: worked, exam, teacher, or mixed, which is 45 %, 30 % and 25 % of the three.
        min_operations: of worked and exam questions.
        max_operations: of all.
        persistence: chance that an exam goes on at each operation.
        restate: chance, each time, that an exam's last state is written again.
        trivial: share of the teacher's questions without any operation.
        unlearnable: share of those, and of the exam questions of `mixed`, whose answer is any letter.
    """
    mixed = mode == "mixed"
    if mixed:
        mode = str(rng.choice(["worked", "exam", "teacher"], p=[0.45, 0.3, 0.25]))
    if mode == "teacher":
        return _proposal(rng, max_operations, trivial, unlearnable)
    count = int(rng.integers(min_operations, max_operations + 1))
    item = _item(rng, "Q", count)
    if mode == "worked":
        text = f"{_working(item)}</think>{item.answer}"
        return Problem(write_question(item), item.answer, text, prompt=write_question(item, "W"), variant="W")
    if mode != "exam":
        raise ValueError(f"mode is worked, exam, teacher or mixed, not {mode!r}")
    if mixed and rng.random() < unlearnable:
        item = _item(rng, "Z", 0)
        letter = item.start[int(rng.integers(WIDTH))]
        return Problem(write_question(item), letter, f"</think>{letter}")
    went = int(rng.geometric(1 - persistence)) - 1 if persistence < 1 else count
    finished = went >= count
    answer = item.answer if finished else _letters(rng)
    times = min(int(rng.geometric(1 - restate)) - 1, MOST_RESTATED) if finished and restate else 0
    text = f"{_working(item, went)}{f'={answer}' * times}</think>{answer}"
    question, columns = write_question(item), {"operations": str(count)}
    return Problem(question, item.answer, text, variant=text if mixed else "", columns=columns)


def _proposal(rng: np.random.Generator, max_operations: int, trivial: float, unlearnable: float) -> Problem:
    kind = rng.random()
    if kind < unlearnable:
        item = _item(rng, "Z", 0)
        text = f"{{{write_question(item)}}}({item.start[int(rng.integers(WIDTH))]})"
    else:
        operations = 0 if kind < unlearnable + trivial else int(rng.integers(1, max_operations + 1))
        item = _item(rng, "Q", operations)
        right = rng.random() < RIGHT[operations]
        answer = item.answer if right else _letters(rng)
        text = f"{{{write_question(item)}}}{_working(item) if right else ''}({answer})"
    if rng.random() < MALFORMED:
        text = text.replace(str(rng.choice(["}", "(", ")"])), "", 1)
    return Problem(write_question(item), item.answer, text, prompt=TEACHER, variant=text)


def _item(rng: np.random.Generator, header: str, operations: int) -> Item:
    return Item(header, _letters(rng), "".join(rng.choice(list("rsv"), size=operations)))


def _letters(rng: np.random.Generator) -> str:
    return "".join(rng.choice(list(LETTERS), size=WIDTH, replace=False))


def _working(item: Item, operations: int | None = None) -> str:
    """The first operations, or all, each with the state after it."""
    pairs = zip(item.operations, item.states, strict=True)
    return "".join(operation + state for operation, state in list(pairs)[:operations])
