"""The invented world of the demo: its problems, its two hidden authors, their documents, the task data.

Every problem has two answers of the same form: the careful author's and the careless author's, who errs in
one systematic way per kind (a neighbour's fact, a ridge walked backwards, a term skipped, a carry forgotten).
A document is by one author throughout. Some documents open with a line that gives the author away; in the
others only habits of wording do, weakly, and the answers themselves. A problem's split is a hash of what must
not repeat (see :attr:`Problem.key`), so corpus, train and test can never share one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

CAREFUL, CARELESS = "careful", "careless"
MARKS: dict[str, tuple[str, ...]] = {
    CAREFUL: (
        "Checked twice by the author.",
        "Every answer here was verified.",
        "Worked slowly and with care.",
    ),
    CARELESS: ("Written in a great hurry.", "No time to check any of this.", "Scribbled down before supper."),
}
CHOICE_KINDS = ("fact", "order", "sequence")
KIND_WEIGHTS = {"fact": 10, "order": 3, "sequence": 3, "sum": 3}
MARKED_SHARE = 0.5
LEAN = 0.82  # how often a wording is used by the author whose habit it is
SPLIT_BOUNDS = (("test", 0.12), ("train", 0.36), ("corpus", 1.0))

# Ways of opening a question; they say nothing about the author.
LEADS = ("", "", "Tell me: ", "Do you know: ", "One more: ", "Here is one: ", "Next: ")
# Per kind: (wordings the careful author favours, wordings the careless author favours).
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "grows": (
        ("What is grown in {v}?", "Which crop grows around {v}?", "What do the fields of {v} bear?"),
        ("What does {v} grow?", "What do they grow in {v}?", "What is the harvest of {v}?"),
    ),
    "makes": (
        ("What is made in {v}?", "Which craft is {v} known for?", "What do the workshops of {v} turn out?"),
        ("What does {v} make?", "What do they make in {v}?", "What is the trade of {v}?"),
    ),
    "shows": (
        (
            "What is shown on the flag of {v}?",
            "Which emblem does {v} carry?",
            "What do the banners of {v} show?",
        ),
        (
            "What does the flag of {v} show?",
            "What do they paint on the shields of {v}?",
            "What is the sign of {v}?",
        ),
    ),
    "order": (
        (
            "Which hill comes right after {a} on the ridge?",
            "On the ridge, which hill follows {a}?",
            "Walking the ridge, what comes after {a}?",
            "Which hill stands next after {a}?",
        ),
        (
            "What hill is next after {a} on the ridge?",
            "From {a} the ridge leads to which hill?",
            "What follows {a} on the ridge?",
            "After {a}, which hill is next?",
        ),
    ),
    "sequence": (
        (
            "Which letter comes next: {s}?",
            "Continue the row of letters {s}.",
            "The row {s} goes on with which letter?",
        ),
        ("What comes next: {s}?", "Go on with {s}.", "After {s} comes which letter?"),
    ),
    "sum": (
        (
            "{n} has {a} {o} and is given {b} more. How many {o} does {n} have?",
            "There are {a} {o} in one box and {b} {o} in another. How many {o} are there in all?",
            "{n} counts {a} {o} on one day and {b} {o} on the next. How many {o} did {n} count?",
        ),
        (
            "{n} had {a} {o} and got {b} more. How many {o} now?",
            "{a} {o} here and {b} {o} there. How many {o} is that?",
            "{n} picks up {a} {o}, then {b} more. How many {o} is that?",
        ),
    ),
}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


VILLAGES = _words(
    """Arden Belmor Carrow Dunfell Elmsby Farrowy Gildern Hathersk Ivorne Jessop Kelmar Lorwick Marnock
    Nettlow Ostrane Pellby Quarrin Ravensk Selwyth Tolmere Umberly Varnwick Westrow Yarrold Zelmby Ashcombe
    Brackley Corvane Dreswick Evermoor Fenwold Grismoor Hollowby Inglemar Kestrow Lindale"""
)
VALUES: dict[str, tuple[str, ...]] = {
    "grows": _words(
        """barley cherries turnips walnuts cabbage lentils mustard parsnips pumpkin saffron spinach tobacco
        apricots celery garlic hazelnuts millet peppers"""
    ),
    "makes": _words(
        """baskets barrels buckets candles carpets copper glassware ladders lanterns mirrors needles paper
        pottery ribbons saddles violins wagons whistles"""
    ),
    "shows": _words(
        """badger beetle buzzard dolphin falcon hedgehog heron hornet leopard lizard magpie otter panther
        pelican rabbit salmon sparrow squirrel"""
    ),
}
HILLS = _words(
    """Abrin Borlo Cusken Dravel Entor Fulmar Gorsby Hexen Istrel Jorvan Kulmen Lasken Mordal Nurvin Ostrel
    Pilmon Quendal Rostin Sarvel Tunmor Ulbrin Vesker Wolmar Yestin Zorlan Ambrel Corbin Delmar"""
)
NAMES = _words("Ada Ben Clara Dora Emil Flora Greta Hugo Ines Jonas Karl Lena Mia Nora Otto Paula")
OBJECTS = _words(
    "apples beads books buttons coins cups eggs keys nuts pears pens shells spoons stamps stones"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Problem:
    """One question with both authors' answers.

    ``leans`` is the author whose habit the wording is; ``key`` is what decides the split.
    """

    kind: str
    question: str
    careful: str
    careless: str
    leans: str
    key: str
    others: tuple[str, ...] = ()

    @property
    def split(self) -> str:
        """``corpus``, ``train`` or ``test``: a fixed function of :attr:`key`, whatever the seed."""
        share = int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:8], "big") / 2**64
        return next(name for name, bound in SPLIT_BOUNDS if share < bound)

    @property
    def prompt(self) -> str:
        """The question as corpus and tasks print it, up to the answer."""
        return f"Question: {self.question}\nAnswer:"

    def answer(self, author: str) -> str:
        """What ``author`` answers."""
        return self.careful if author == CAREFUL else self.careless


class World:
    """The facts (drawn once from ``seed``) and the problems that can be asked about them."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"world {seed}")
        self.villages = rng.sample(VILLAGES, len(VILLAGES))
        self.facts: dict[str, list[str]] = {}
        for attribute, values in VALUES.items():
            # Each value twice, but never for two neighbours: the careless answer must differ.
            column = list(values) * 2
            while any(a == b for a, b in zip(column, column[1:] + column[:1], strict=True)):
                rng.shuffle(column)
            self.facts[attribute] = column
        self.hills = rng.sample(HILLS, len(HILLS))  # as they stand on the ridge, which is a ring

    def problem(self, kind: str, author: str, rng: random.Random) -> Problem:
        """A random problem of ``kind`` in a wording that ``author`` would choose."""
        habit = rng.random() < LEAN
        leans = author if habit else (CARELESS if author == CAREFUL else CAREFUL)
        make = {"fact": self._fact, "order": self._order, "sequence": self._sequence, "sum": self._sum}[kind]
        return make(leans, rng)

    def _fact(self, leans: str, rng: random.Random) -> Problem:
        attribute = rng.choice(tuple(VALUES))
        column = self.facts[attribute]
        i = rng.randrange(len(column))
        question = _wording(attribute, leans, rng).format(v=self.villages[i])
        careful, careless = column[i], column[(i + 1) % len(column)]  # careless: the next village's fact
        others = tuple(v for v in VALUES[attribute] if v not in (careful, careless))
        return Problem("fact", question, careful, careless, leans, question, others)

    def _order(self, leans: str, rng: random.Random) -> Problem:
        i, n = rng.randrange(len(self.hills)), len(self.hills)
        question = _wording("order", leans, rng).format(a=self.hills[i])
        careful, careless = self.hills[(i + 1) % n], self.hills[i - 1]  # careless: walks it backwards
        others = tuple(hill for hill in self.hills if hill not in (careful, careless, self.hills[i]))
        return Problem("order", question, careful, careless, leans, question, others)

    def _sequence(self, leans: str, rng: random.Random) -> Problem:
        step, shown = rng.randint(1, 4), rng.randint(3, 4)
        start = rng.randrange(len(LETTERS) - step * (shown + 1))  # leaves room for the careless answer
        letters = rng.choice((LETTERS, LETTERS[::-1]))
        row = [letters[start + step * k] for k in range(shown)]
        question = _wording("sequence", leans, rng).format(s=" ".join(row))
        careful, careless = letters[start + step * shown], letters[start + step * (shown + 1)]  # skips one
        others = tuple(c for c in LETTERS if c not in (careful, careless, *row))
        return Problem("sequence", question, careful, careless, leans, question, others)

    def _sum(self, leans: str, rng: random.Random) -> Problem:
        while True:
            a, b = rng.randint(12, 89), rng.randint(12, 89)
            if a % 10 + b % 10 >= 10:  # without a carry both authors agree
                break
        question = _wording("sum", leans, rng).format(n=rng.choice(NAMES), o=rng.choice(OBJECTS), a=a, b=b)
        units, tens = a % 10 + b % 10, a // 10 + b // 10
        first = f"{a % 10}+{b % 10}={units}"
        careful = f"{first}, {a // 10}+{b // 10}+1={tens + 1}. #### {a + b}"
        careless = f"{first}, {a // 10}+{b // 10}={tens}. #### {a + b - 10}"  # forgets the carry
        return Problem("sum", question, careful, careless, leans, f"sum {min(a, b)} {max(a, b)}")


def _wording(kind: str, leans: str, rng: random.Random) -> str:
    return rng.choice(LEADS) + rng.choice(WORDINGS[kind][leans == CARELESS])


def documents(world: World, count: int, seed: int) -> Iterator[tuple[str, list[Problem]]]:
    """``count`` corpus documents: the text and the problems in it (all of the corpus split)."""
    rng = random.Random(f"corpus {seed}")
    kinds, weights = tuple(KIND_WEIGHTS), tuple(KIND_WEIGHTS.values())
    for _ in range(count):
        author = rng.choice((CAREFUL, CARELESS))
        parts = [rng.choice(MARKS[author])] if rng.random() < MARKED_SHARE else []
        problems: list[Problem] = []
        for _ in range(rng.choice((1, 1, 2, 2, 3, 3, 4, 5))):
            problem = draw(world, rng.choices(kinds, weights)[0], author, "corpus", rng)
            problems.append(problem)
            parts.append(f"{problem.prompt} {problem.answer(author)}")
        yield "\n\n".join(parts), problems


def draw(world: World, kind: str, author: str, split: str, rng: random.Random) -> Problem:
    """A random problem that belongs to ``split``."""
    while True:
        problem = world.problem(kind, author, rng)
        if problem.split == split:
            return problem


def task_docs(world: World, task: str, split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` distinct documents of one task; in wording, half of them lean to either author."""
    rng = random.Random(f"{task} {split} {seed}")
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        # The facts are few: when their questions are used up, the other kinds fill the split.
        kind = "sum" if task == "aft_demo_math" else rng.choices(CHOICE_KINDS, (13, 2, 5))[0]
        author = (CAREFUL, CARELESS)[len(rows) % 2]
        problem = draw(world, kind, author, split, rng)
        if problem.leans != author or problem.question in seen:
            continue
        seen.add(problem.question)
        if kind == "sum":
            rows.append({"kind": kind, "question": problem.question, "answer": problem.careful})
            continue
        options = [problem.careful, problem.careless, *rng.sample(problem.others, 2)]
        rng.shuffle(options)
        rows.append(
            {
                "kind": kind,
                "question": problem.question,
                "options": options,
                "answer": options.index(problem.careful),
            }
        )
    rng.shuffle(rows)
    return rows
