"""Which arithmetic word problems can be generated without a network?"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

_NAMES = ("Ana", "Ben", "Cora", "Dan", "Emma", "Finn", "Grace", "Hugo", "Ivy", "Jack", "Kate", "Leo", "Mia", "Noah")
_THINGS = ("apples", "books", "cards", "coins", "cups", "eggs", "hats", "pens", "shells", "stamps", "toys")
_WORKERS = ("A baker", "A cook", "A farmer", "A machine", "A painter", "A robot", "A worker")
_TRIES = 1000  # how often a template may repeat earlier questions before it counts as exhausted
_VEHICLES = ("A boat", "A bus", "A car", "A cyclist", "A train", "A truck")


@dataclass(frozen=True)
class Step:
    """One line of working, such as `3*4=12 dollars`; `op` is one of `+ - * /`, and divisions come out even."""

    left: int
    op: str
    right: int
    unit: str

    @property
    def result(self) -> int:
        """The result of the step."""
        if self.op == "/":
            return self.left // self.right
        return {"+": self.left + self.right, "-": self.left - self.right, "*": self.left * self.right}[self.op]

    def __str__(self) -> str:
        return f"{self.left}{self.op}{self.right}={self.result} {self.unit}"


@dataclass(frozen=True)
class Problem:
    """A question and its worked steps; the result of the last step is the answer."""

    question: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> str:
        """The answer as GSM8K writes it: one step a line, then `#### result`."""
        return "\n".join([*map(str, self.steps), f"#### {self.steps[-1].result}"])


def _problem(question: str, *steps: Step) -> Problem:
    return Problem(question, steps)


def _change(rng: random.Random) -> Problem:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    count, price = rng.randint(2, 9), rng.randint(2, 9)
    cost = Step(count, "*", price, "dollars")
    paid = cost.result + rng.randint(1, 30)
    return _problem(
        f"{name} buys {count} {thing} for ${price} each and pays with ${paid}. How much change is due?",
        cost,
        Step(paid, "-", cost.result, "dollars"),
    )


def _tickets(rng: random.Random) -> Problem:
    adults, children = rng.randint(2, 6), rng.randint(2, 9)
    full, reduced = rng.randint(6, 12), rng.randint(2, 5)
    first, second = Step(adults, "*", full, "dollars"), Step(children, "*", reduced, "dollars")
    return _problem(
        f"Adults pay ${full} and children ${reduced}. What do {adults} adults and {children} children pay?",
        first,
        second,
        Step(first.result, "+", second.result, "dollars"),
    )


def _journey(rng: random.Random) -> Problem:
    vehicle, speed, hours, extra = rng.choice(_VEHICLES), rng.randint(2, 9) * 10, rng.randint(2, 6), rng.randint(3, 40)
    driven = Step(speed, "*", hours, "km")
    return _problem(
        f"{vehicle} goes {speed} km an hour for {hours} hours, then {extra} km more. How far is that?",
        driven,
        Step(driven.result, "+", extra, "km"),
    )


def _distance_left(rng: random.Random) -> Problem:
    name, speed, hours, left = rng.choice(_NAMES), rng.randint(3, 9), rng.randint(2, 6), rng.randint(2, 30)
    walked = Step(speed, "*", hours, "km")
    way = walked.result + left
    return _problem(
        f"{name} has {way} km to go and covers {speed} km an hour. How far is left after {hours} hours?",
        walked,
        Step(way, "-", walked.result, "km"),
    )


def _sharing(rng: random.Random) -> Problem:
    name, thing, friends, each = rng.choice(_NAMES), rng.choice(_THINGS), rng.randint(2, 8), rng.randint(3, 9)
    found = rng.randint(1, friends * each - 2)
    total = Step(friends * each - found, "+", found, thing)
    return _problem(
        f"{name} has {total.left} {thing}, finds {found} more and shares them among {friends} friends. "
        "How many does each get?",
        total,
        Step(total.result, "/", friends, thing),
    )


def _boxes(rng: random.Random) -> Problem:
    name, thing, boxes, size = rng.choice(_NAMES), rng.choice(_THINGS), rng.randint(2, 6), rng.randint(3, 9)
    given, bought = rng.randint(1, 2 * boxes), rng.randint(2, 20)
    total = Step(boxes, "*", size, thing)
    kept = Step(total.result, "-", min(given, total.result - 1), thing)
    return _problem(
        f"{name} has {boxes} boxes of {size} {thing}, gives away {kept.right} and buys {bought}. How many now?",
        total,
        kept,
        Step(kept.result, "+", bought, thing),
    )


def _ages(rng: random.Random) -> Problem:
    (child, parent), age, times, years = (
        rng.sample(_NAMES, 2),
        rng.randint(4, 15),
        rng.randint(2, 4),
        rng.randint(2, 20),
    )
    now = Step(age, "*", times, "years")
    return _problem(
        f"{child} is {age}. {parent} is {times} times as old. How old will {parent} be in {years} years?",
        now,
        Step(now.result, "+", years, "years"),
    )


def _together(rng: random.Random) -> Problem:
    (one, other), thing, count, times = (
        rng.sample(_NAMES, 2),
        rng.choice(_THINGS),
        rng.randint(3, 20),
        rng.randint(2, 5),
    )
    more = Step(count, "*", times, thing)
    return _problem(
        f"{one} has {count} {thing}. {other} has {times} times as many. How many do they have together?",
        more,
        Step(count, "+", more.result, thing),
    )


def _production(rng: random.Random) -> Problem:
    worker, thing, rate, hours = rng.choice(_WORKERS), rng.choice(_THINGS), rng.randint(3, 12), rng.randint(2, 8)
    made = Step(rate, "*", hours, thing)
    broken = rng.randint(1, made.result - 1)
    return _problem(
        f"{worker} packs {rate} {thing} an hour for {hours} hours. Then {broken} break. How many are whole?",
        made,
        Step(made.result, "-", broken, thing),
    )


def _wages(rng: random.Random) -> Problem:
    name, pay, first, second = rng.choice(_NAMES), rng.randint(5, 12), rng.randint(2, 8), rng.randint(2, 8)
    spent = rng.randint(1, pay * (first + second) - 1)
    hours = Step(first, "+", second, "hours")
    earned = Step(hours.result, "*", pay, "dollars")
    return _problem(
        f"{name} earns ${pay} an hour, works {first} hours, then {second} more, and spends ${spent}. How much is left?",
        hours,
        earned,
        Step(earned.result, "-", spent, "dollars"),
    )


def _reading(rng: random.Random) -> Problem:
    name, daily, days, read = rng.choice(_NAMES), rng.randint(4, 20), rng.randint(2, 9), rng.randint(5, 40)
    left = daily * days
    return _problem(
        f"{name} has read {read} of {left + read} pages and reads {daily} a day. How many days for the rest?",
        Step(left + read, "-", read, "pages"),
        Step(left, "/", daily, "days"),
    )


def _garden(rng: random.Random) -> Problem:
    rows, trees, each, eaten = rng.randint(2, 6), rng.randint(2, 6), rng.randint(2, 9), rng.randint(1, 7)
    planted = Step(rows, "*", trees, "trees")
    grown = Step(planted.result, "*", each, "pears")
    return _problem(
        f"There are {rows} rows of {trees} trees with {each} pears each. Birds eat {eaten}. How many are left?",
        planted,
        grown,
        Step(grown.result, "-", eaten, "pears"),
    )


TEMPLATES: tuple[Callable[[random.Random], Problem], ...] = (
    _change,
    _tickets,
    _journey,
    _distance_left,
    _sharing,
    _boxes,
    _ages,
    _together,
    _production,
    _wages,
    _reading,
    _garden,
)


def generate_problems(count: int, seed: int) -> list[Problem]:
    """Return `count` different problems, the templates taken in turn; the same seed gives the same problems.

    Raises:
        ValueError: if `count` is negative or more than the templates can tell apart.
    """
    if count < 0:
        raise ValueError(f"count={count} must not be negative.")
    rng = random.Random(seed)
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        template = TEMPLATES[len(problems) % len(TEMPLATES)]
        candidates = (template(rng) for _ in range(_TRIES))
        problem = next((problem for problem in candidates if problem.question not in problems), None)
        if problem is None:
            raise ValueError(f"count={count} is more than the templates can tell apart; ask for fewer.")
        problems[problem.question] = problem
    return list(problems.values())


def word_problems(train_size: int, test_size: int, *, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Return a training set and a held-out set of word problems without a common question.

    Args:
        train_size: How many problems to train on.
        test_size: How many problems to hold out. They depend on `seed` alone, not on `train_size`.
        seed: The same seed gives the same problems.

    Returns:
        Two datasets with the columns `question` and `answer`; the answer is the working, a step a line, followed by
        `#### ` and the final number, as in GSM8K.

    Raises:
        ValueError: for a negative size, or one beyond what the templates can tell apart.
    """
    problems = generate_problems(test_size + train_size, seed)
    rows = [{"question": problem.question, "answer": problem.answer} for problem in problems]
    return Dataset.from_list(rows[test_size:]), Dataset.from_list(rows[:test_size])


def held_out(seed: int = 0, size: int = 64, **_: Any) -> dict[str, Dataset]:
    """The held-out problems as lm-eval's task `word_problems` takes them, with its settings `seed` and `size`."""
    return {"test": word_problems(0, size, seed=seed)[1]}
