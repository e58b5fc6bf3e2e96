"""English tasks about things that happen step by step: a walk through a building, a program line by line."""

import re
from collections.abc import Callable
from functools import partial
from random import Random

from .grading import share_found
from .sizing import Count, Draft, Drafting


def state_recall(*, stack: bool) -> Drafting:
    """The log of a depth-first walk through a building; the state after a step in its middle is asked for.

    Units are rooms, two steps each. With `stack`, all rooms on the way from the entrance to the walker are asked for,
    and naming other rooms costs: the score is right ones over all that are right or named. Otherwise the one room that
    the walker came into at that step.
    """

    def plan(rng: Random, count: Count) -> Callable[[int], Draft]:
        seed = rng.random()

        def draft(units: int) -> Draft:
            rng = Random(seed)
            rooms = rng.sample(range(10_000, 100_000), units)
            doors: dict[int, list[int]] = {room: [] for room in rooms}
            for at in range(1, units):
                doors[rooms[rng.randrange(at)]].append(rooms[at])
            paths = _walk(rooms[0], doors)
            steps = [_step(*pair) for pair in zip(paths, paths[1:], strict=False)]
            number = _asked_step(rng, paths, stack)
            answers = tuple(str(room) for room in (paths[number] if stack else paths[number][-1:]))
            plans = [
                f"Room {room} leads to {'room' if len(further) == 1 else 'rooms'} {', '.join(map(str, further))}."
                for room, further in doors.items()
                if further
            ]
            log = [f"Step {at}: {step}" for at, step in enumerate(steps, 1)]
            head = (
                f"A walker goes through every room of a building, from its entrance, room {rooms[0]}. The rooms, then "
                "the walk, step by step.\n\n" + "\n".join(plans) + "\n\n" + "\n".join(log[: number - 1]) + "\n"
            )
            asked = (
                f"Which rooms are on the way from the entrance to the walker, both ends included, after step {number}?"
                if stack
                else f"Into which room did the walker come at step {number}?"
            )
            form = "the numbers of the rooms in order, separated by commas" if stack else "the number of the room"
            return Draft(
                context=head + "\n".join(log[number - 1 :]),
                question=f"\n\nQuestion: {asked} Answer only with {form}.\nAnswer:",
                answers=answers,
                score=partial(_rooms_named, answers=frozenset(answers), rooms=frozenset(map(str, rooms)))
                if stack
                else partial(share_found, answers=answers),
                reference=f" {', '.join(answers)}",
                stated=len(head),
            )

        return draft

    return plan


def _walk(entrance: int, doors: dict[int, list[int]]) -> list[list[int]]:
    """The rooms from the entrance to the walker, at first and after each step."""
    path, left = [entrance], {room: list(further) for room, further in doors.items()}
    paths = [list(path)]
    while len(path) > 1 or left[entrance]:
        if left[path[-1]]:
            path.append(left[path[-1]].pop(0))
        else:
            path.pop()
        paths.append(list(path))
    return paths


def _step(before: list[int], after: list[int]) -> str:
    if len(after) > len(before):
        return f"from room {before[-1]} into room {after[-1]}."
    return f"nothing new behind room {before[-1]}, back to room {after[-1]}."


def _asked_step(rng: Random, paths: list[list[int]], stack: bool) -> int:
    """A step in the middle third, of those that make a question of even difficulty, if there are any."""
    middle = range(len(paths) // 3, max(2 * len(paths) // 3, len(paths) // 3 + 1))
    if stack:
        fair = [at for at in middle if 3 <= len(paths[at]) <= 8]
    else:
        fair = [at for at in middle if len(paths[at]) > len(paths[at - 1])]
    return rng.choice(fair or middle)


def _rooms_named(text: str, *, answers: frozenset[str], rooms: frozenset[str]) -> float:
    named = rooms.intersection(re.findall(r"\d+", text))
    return len(named & answers) / len(named | answers)


def program_trace() -> Drafting:
    """A program without branches, which a model is to execute in writing; only the last value is graded.

    Every line needs a number of the prompt, the value just computed and one from anywhere before, so that one wrong
    value makes all that follow wrong. Units are lines.
    """

    def plan(rng: Random, count: Count) -> Callable[[int], Draft]:
        seed = rng.random()

        def draft(units: int) -> Draft:
            rng = Random(seed)
            values = [rng.randrange(10), rng.randrange(10)]
            lines = [f"v{at} = {value}" for at, value in enumerate(values)]
            trace = list(lines)
            for at in range(2, units):
                far, number = rng.randrange(at - 1), rng.randrange(10)
                values.append((values[-1] + values[far] + number) % 10)
                lines.append(f"v{at} = (v{at - 1} + v{far} + {number}) % 10")
                trace.append(f"{lines[-1]} = ({values[at - 1]} + {values[far]} + {number}) % 10 = {values[at]}")
            last = f"v{units - 1}"
            return Draft(
                context="Here is a program; % 10 keeps the last digit of a sum.\n\n" + "\n".join(lines),
                question=(
                    f"\n\nQuestion: What is the value of {last} in the end? Execute the program line by line: write "
                    "every line down with its values put in, like v2 = (v1 + v0 + 5) % 10 = (8 + 4 + 5) % 10 = 7. "
                    f"After the last line write Answer: and the value of {last}.\nExecution:\n"
                ),
                answers=(str(values[-1]),),
                score=partial(_last_answer, answer=values[-1]),
                reference="\n".join(trace) + f"\nAnswer: {values[-1]}",
                room=1.5,
            )

        return draft

    return plan


def _last_answer(text: str, *, answer: int) -> float:
    """Whether the first number behind the last "Answer:" is right."""
    _, *behind = re.split(r"answer\W*:", text, flags=re.IGNORECASE)
    found = re.search(r"(?<!\w)-?\d+", behind[-1]) if behind else None
    return float(found is not None and int(found[0]) == answer)
