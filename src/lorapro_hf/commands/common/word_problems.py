"""Which arithmetic word problems can be generated without a network?"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

_NAMES = ("Ana", "Ben", "Cora", "Dan", "Emma", "Finn", "Grace", "Hugo", "Ivy", "Jack", "Kate", "Leo", "Mia", "Noah")
_THINGS = ("apples", "books", "cards", "coins", "cups", "eggs", "hats", "pens", "shells", "stamps", "toys")
_WORKERS = ("A baker", "A cook", "A farmer", "A machine", "A painter", "A robot", "A worker")
_VEHICLES = ("A boat", "A bus", "A car", "A cyclist", "A train", "A truck")
_TRIES = 1000  # how often a template may repeat earlier questions before it counts as exhausted
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@dataclass(frozen=True)
class Step:
    """One line of working, such as `3*4=12 dollars`; divisions come out even."""

    left: int
    op: str
    right: int
    unit: str

    @property
    def result(self) -> int:
        """The result of the step."""
        return int(_OPERATIONS[self.op](self.left, self.right))

    def __str__(self) -> str:
        return f"{self.left}{self.op}{self.right}={self.result} {self.unit}"


class Problem:
    """A question and its answer as GSM8K writes it: one step a line, then `#### result`."""

    def __init__(self, question: str, *steps: Step) -> None:
        self.question = question
        self.answer = "\n".join([*map(str, steps), f"#### {steps[-1].result}"])


def _draw(rng: random.Random, *choices: tuple[Any, ...]) -> list[Any]:
    """A word of each tuple of words, and a whole number between each two bounds."""
    return [rng.choice(each) if isinstance(each[0], str) else rng.randint(*each) for each in choices]


def _change(rng: random.Random) -> Problem:
    name, thing, count, price, change = _draw(rng, _NAMES, _THINGS, (2, 9), (2, 9), (1, 30))
    cost = Step(count, "*", price, "dollars")
    paid = cost.result + change
    question = f"{name} buys {count} {thing} for ${price} each and pays with ${paid}. How much change is due?"
    return Problem(question, cost, Step(paid, "-", cost.result, "dollars"))


def _tickets(rng: random.Random) -> Problem:
    adults, children, full, reduced = _draw(rng, (2, 6), (2, 9), (6, 12), (2, 5))
    first, second = Step(adults, "*", full, "dollars"), Step(children, "*", reduced, "dollars")
    question = f"Adults pay ${full} and children ${reduced}. What do {adults} adults and {children} children pay?"
    return Problem(question, first, second, Step(first.result, "+", second.result, "dollars"))


def _journey(rng: random.Random) -> Problem:
    vehicle, tens, hours, extra = _draw(rng, _VEHICLES, (2, 9), (2, 6), (3, 40))
    driven = Step(10 * tens, "*", hours, "km")
    question = f"{vehicle} goes {driven.left} km an hour for {hours} hours, then {extra} km more. How far is that?"
    return Problem(question, driven, Step(driven.result, "+", extra, "km"))


def _distance_left(rng: random.Random) -> Problem:
    name, speed, hours, left = _draw(rng, _NAMES, (3, 9), (2, 6), (2, 30))
    walked = Step(speed, "*", hours, "km")
    way = walked.result + left
    question = f"{name} has {way} km to go and covers {speed} km an hour. How far is left after {hours} hours?"
    return Problem(question, walked, Step(way, "-", walked.result, "km"))


def _sharing(rng: random.Random) -> Problem:
    name, thing, friends, each = _draw(rng, _NAMES, _THINGS, (2, 8), (3, 9))
    found = rng.randint(1, friends * each - 2)
    total = Step(friends * each - found, "+", found, thing)
    question = f"{name} has {total.left} {thing}, finds {found} more and shares them among {friends} friends. "
    return Problem(f"{question}How many does each get?", total, Step(total.result, "/", friends, thing))


def _boxes(rng: random.Random) -> Problem:
    name, thing, boxes, size = _draw(rng, _NAMES, _THINGS, (2, 6), (3, 9))
    given, bought = _draw(rng, (1, 2 * boxes), (2, 20))
    total = Step(boxes, "*", size, thing)
    kept = Step(total.result, "-", min(given, total.result - 1), thing)
    question = f"{name} has {boxes} boxes of {size} {thing}, gives away {kept.right} and buys {bought}. How many now?"
    return Problem(question, total, kept, Step(kept.result, "+", bought, thing))


def _ages(rng: random.Random) -> Problem:
    child, parent = rng.sample(_NAMES, 2)
    age, times, years = _draw(rng, (4, 15), (2, 4), (2, 20))
    now = Step(age, "*", times, "years")
    question = f"{child} is {age}. {parent} is {times} times as old. How old will {parent} be in {years} years?"
    return Problem(question, now, Step(now.result, "+", years, "years"))


def _together(rng: random.Random) -> Problem:
    one, other = rng.sample(_NAMES, 2)
    thing, count, times = _draw(rng, _THINGS, (3, 20), (2, 5))
    more = Step(count, "*", times, thing)
    question = f"{one} has {count} {thing}. {other} has {times} times as many. How many do they have together?"
    return Problem(question, more, Step(count, "+", more.result, thing))


def _production(rng: random.Random) -> Problem:
    worker, thing, rate, hours = _draw(rng, _WORKERS, _THINGS, (3, 12), (2, 8))
    made = Step(rate, "*", hours, thing)
    broken = rng.randint(1, made.result - 1)
    question = f"{worker} packs {rate} {thing} an hour for {hours} hours. Then {broken} break. How many are whole?"
    return Problem(question, made, Step(made.result, "-", broken, thing))


def _wages(rng: random.Random) -> Problem:
    name, pay, first, second = _draw(rng, _NAMES, (5, 12), (2, 8), (2, 8))
    hours = Step(first, "+", second, "hours")
    earned = Step(hours.result, "*", pay, "dollars")
    spent = rng.randint(1, earned.result - 1)
    question = f"{name} earns ${pay} an hour, works {first} hours, then {second} more, and spends ${spent}. "
    return Problem(f"{question}How much is left?", hours, earned, Step(earned.result, "-", spent, "dollars"))


def _reading(rng: random.Random) -> Problem:
    name, daily, days, read = _draw(rng, _NAMES, (4, 20), (2, 9), (5, 40))
    left = daily * days
    question = f"{name} has read {read} of {left + read} pages and reads {daily} a day. How many days for the rest?"
    return Problem(question, Step(left + read, "-", read, "pages"), Step(left, "/", daily, "days"))


def _garden(rng: random.Random) -> Problem:
    rows, trees, each, eaten = _draw(rng, (2, 6), (2, 6), (2, 9), (1, 7))
    planted = Step(rows, "*", trees, "trees")
    grown = Step(planted.result, "*", each, "pears")
    question = f"There are {rows} rows of {trees} trees with {each} pears each. Birds eat {eaten}. How many are left?"
    return Problem(question, planted, grown, Step(grown.result, "-", eaten, "pears"))


TEMPLATES: tuple[Callable[[random.Random], Problem], ...] = (
    *(_change, _tickets, _journey, _distance_left, _sharing, _boxes),
    *(_ages, _together, _production, _wages, _reading, _garden),
)


def generate_problems(count: int, seed: int) -> list[Problem]:
    """Return `count` different problems, the templates taken in turn; the same seed gives the same problems.

    Raises:
        ValueError: `count` is negative or more than the templates can tell apart.
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

    Their columns are `question` and `answer`. The held-out problems depend on `seed` alone, not on `train_size`.

    Raises:
        ValueError: a size is negative, or the templates cannot tell so many problems apart.
    """
    rows = [
        {"question": each.question, "answer": each.answer} for each in generate_problems(test_size + train_size, seed)
    ]
    return Dataset.from_list(rows[test_size:]), Dataset.from_list(rows[:test_size])


def held_out(seed: int = 0, size: int = 64, **_: Any) -> dict[str, Dataset]:
    """The held-out problems as lm-eval's task `word_problems` takes them, with its settings `seed` and `size`."""
    return {"test": word_problems(0, size, seed=seed)[1]}
