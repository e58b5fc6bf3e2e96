"""Tasks in plain English for any tokenizer: needles, variables, words and facts in a long text, logs and programs.

Every example is a pure function of its task's name, its number and what the tokenizer makes of English text. The kinds
of needles, variables and frequent words follow RULER (arXiv 2404.06654) in what is asked, not in wording; the answer is
scored as there, by the share of what is right that occurs in it.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count as count_from
from random import Random
from string import ascii_uppercase
from typing import Any
from uuid import UUID

from .grading import share_found
from .haystack import ADJECTIVES, FIRST_NAMES, NOUNS, SURNAMES, Haystack, scatter
from .sizing import Count, Draft, Drafting, TextTask, fit
from .steps import program_trace, state_recall
from .task import register_task

READ = "Read the text below with care. A question about it comes at its end.\n\n"


def _question(asked: str, form: str) -> str:
    return f"\n\nQuestion: {asked} Answer only with {form}.\nAnswer:"


def _recalled(context: str, question: str, answers: tuple[str, ...], stated: int | None) -> Draft:
    """A draft whose answers are scored by the share of them that occurs."""
    return Draft(context, question, answers, partial(share_found, answers=answers), f" {', '.join(answers)}", stated)


def _listed(things: list[str]) -> str:
    *others, last = things
    return f"{', '.join(others)} and {last}" if others else last


def needles(
    haystack: Haystack,
    *,
    keys: int,
    values: int = 1,
    queries: int = 1,
    kind: str = "number",
    depth: float | None = None,
) -> Drafting:
    """Access codes in a haystack, of which some are asked for.

    Args:
        haystack: what they are hidden in, a sentence a unit.
        keys: things that have codes.
        values: codes of each.
        queries: things whose codes are asked for.
        kind: "number", of seven digits, or "uuid".
        depth: where the codes stand, in per cent of the text; anywhere if None.
    """

    def plan(rng: Random, count: Count) -> Callable[[int], Draft]:
        pairs = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), keys)
        names = [f"the {ADJECTIVES[pair // len(NOUNS)]} {NOUNS[pair % len(NOUNS)]}" for pair in pairs]
        drawn = iter(rng.sample(range(1_000_000, 10_000_000), keys * values))
        codes = [[_code(rng, kind, next(drawn)) for _ in range(values)] for _ in names]
        answers = tuple(code for own in codes[:queries] for code in own)
        stated = [
            f"The access code of {name} is {code}." for name, own in zip(names, codes, strict=True) for code in own
        ]
        places = {needle: rng.random() if depth is None else depth / 100 for needle in stated}
        first, asked = min(stated[: len(answers)], key=places.__getitem__), names[:queries]
        if len(answers) == 1:
            question = _question(f"What is the access code of {asked[0]}?", "the code")
        elif values == 1:
            question = _question(f"What are the access codes of {_listed(asked)}?", "the codes, separated by commas")
        else:
            question = _question(
                f"What are all {len(answers)} access codes of {_listed(asked)}?", "the codes, separated by commas"
            )
        seed = rng.random()

        def draft(units: int) -> Draft:
            context = READ + scatter(haystack.sentences(Random(seed), units), places)
            return _recalled(context, question, answers, context.index(first))

        return draft

    return plan


def _code(rng: Random, kind: str, number: int) -> str:
    return str(number) if kind == "number" else str(UUID(int=rng.getrandbits(128), version=4))


def variable_tracking(haystack: Haystack, *, chains: int, hops: int) -> Drafting:
    """Chains of variables, each set to the one before it; all that hold the first chain's value are asked for."""

    def plan(rng: Random, count: Count) -> Callable[[int], Draft]:
        drawn = iter(_letters(rng, chains * (hops + 1)))
        numbers = rng.sample(range(10_000, 100_000), chains)
        places: dict[str, float] = {}
        answers: tuple[str, ...] = ()
        for number in numbers:
            names = [next(drawn) for _ in range(hops + 1)]
            answers = answers or tuple(names)
            held = [str(number), *(f"VAR {name}" for name in names)]
            shares = sorted(rng.random() for _ in names)
            places |= {f"VAR {name} = {was}.": share for name, was, share in zip(names, held, shares, strict=False)}
        question = _question(
            f"Which variables hold the value {numbers[0]}, directly or through other variables? There are "
            f"{len(answers)} of them.",
            "their names, separated by commas",
        )
        first, seed = next(iter(places)), rng.random()

        def draft(units: int) -> Draft:
            context = READ + scatter(haystack.sentences(Random(seed), units), places)
            return _recalled(context, question, answers, context.index(first))

        return draft

    return plan


def _letters(rng: Random, number: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < number:
        found["".join(rng.choices(ascii_uppercase, k=5))] = None
    return list(found)


def frequent_words(*, asked: int, alpha: float) -> Drafting:
    """Words in disorder, the k-th most frequent of them written in proportion to k to the power of minus `alpha`."""

    def plan(rng: Random, count: Count) -> Callable[[int], Draft]:
        words = rng.sample(NOUNS, len(NOUNS))
        weights = [(rank + 1) ** -alpha for rank in range(len(words))]
        answers = tuple(words[:asked])
        question = _question(
            f"Which {asked} words occur most often in the list above?"
            if asked > 1
            else "Which word occurs most often?",
            "the words, separated by commas" if asked > 1 else "the word",
        )
        seed = rng.random()

        def draft(units: int) -> Draft:
            times = Counter({word: int(units * w / sum(weights)) for word, w in zip(words, weights, strict=True)})
            rare = words[asked + 1 :]
            times.update(rare[at % len(rare)] for at in range(units - times.total()))
            listed = list(times.elements())
            Random(seed).shuffle(listed)
            text = "\n".join(" ".join(listed[at : at + 20]) for at in range(0, len(listed), 20))
            context = f"Read the list of words below. Some occur far more often than others.\n\n{text}"
            return _recalled(context, question, answers, None)

        return draft

    return plan


FACTS = (
    ("{name} keeps the spare key in drawer {number}.", "In which drawer does {name} keep the spare key?"),
    ("The train ticket of {name} has the number {number}.", "What is the number of {name}'s train ticket?"),
    ("{name} rents the workshop with the number {number}.", "What is the number of the workshop that {name} rents?"),
    ("On the register {name} signed on line {number}.", "On which line of the register did {name} sign?"),
    ("The parcel for {name} lies on shelf {number}.", "On which shelf does the parcel for {name} lie?"),
)


def stated_once(haystack: Haystack, *, distance: int, facts: int) -> Drafting:
    """Facts about people that are stated once in a text; the one that stands `distance` tokens before its end is asked.

    Units are sentences before it. The other facts stand anywhere.
    """

    def plan(rng: Random, count: Count) -> Callable[[int], Draft]:
        people = rng.sample(range(len(FIRST_NAMES) * len(SURNAMES)), facts)
        numbers = rng.sample(range(10_000, 100_000), facts)
        forms = [rng.choice(FACTS) for _ in people]
        names = [f"{FIRST_NAMES[at // len(SURNAMES)]} {SURNAMES[at % len(SURNAMES)]}" for at in people]
        fact, *others = [
            stated.format(name=name, number=number)
            for (stated, _), name, number in zip(forms, names, numbers, strict=True)
        ]
        question = _question(forms[0][1].format(name=names[0]), "the number")
        half = len(others) // 2
        behind, ahead = ({other: rng.random() for other in some} for some in (others[:half], others[half:]))
        seed = rng.random()

        def after(units: int) -> str:
            return f"{fact} {scatter(haystack.sentences(Random(f'after/{seed}'), units), behind)}"

        tail = after(fit(lambda units: count(after(units)), distance, 1, "distance"))

        def draft(units: int) -> Draft:
            head = READ + scatter(haystack.sentences(Random(seed), units), ahead) + "\n\n"
            return _recalled(head + tail, question, (str(numbers[0]),), len(head))

        return draft

    return plan


def table() -> Drafting:
    """Rows of a table of parcels, one a unit; on which shelf one of them lies is asked."""

    def plan(rng: Random, count: Count) -> Callable[[int], Draft]:
        number, shelf, place, seed = *rng.sample(range(10_000, 100_000), 2), rng.random(), rng.random()

        def row(order: int, shelf: int, words: Random) -> str:
            name, item = f"{words.choice(FIRST_NAMES)} {words.choice(SURNAMES)}", words.choice(NOUNS)
            return f"| {order} | {name} | {words.choice(ADJECTIVES)} {item} | {shelf} |"

        asked = row(number, shelf, rng)

        def draft(units: int) -> Draft:
            words = Random(seed)
            drawn = (words.randrange(10_000, 100_000) for _ in count_from(0))
            others = (other for other in drawn if other not in (number, shelf))
            rows = [row(next(others), next(others), words) for _ in range(units)]
            rows.insert(round(place * units), asked)
            head = "Read the table of parcels below with care. A question about it comes at its end.\n\n"
            context = head + "\n".join(["| order | customer | parcel | shelf |", "|---|---|---|---|", *rows])
            question = _question(f"On which shelf lies the parcel of order {number}?", "the number of the shelf")
            return _recalled(context, question, (str(shelf),), context.index(asked))

        return draft

    return plan


REPLIES = ("Is that so?", "I had not heard.", "Who told you?", "You don't say.", "I remember.", "And then?", "Really?")
SAID = (
    ("my locker at the station has the number {number}", "What number does {name}'s locker at the station have?"),
    ("I booked the table under the number {number}", "Under which number did {name} book the table?"),
    ("the code of my bicycle lock is {number}", "What is the code of {name}'s bicycle lock?"),
    ("the ferry that I take has the number {number}", "What is the number of the ferry that {name} takes?"),
)


def conversation(haystack: Haystack, *, facts: int) -> Drafting:
    """Two people talk, an exchange a unit; each fact is said once, and one of them is asked for."""

    def plan(rng: Random, count: Count) -> Callable[[int], Draft]:
        names, numbers = rng.sample(FIRST_NAMES, 2), rng.sample(range(10_000, 100_000), facts)
        pairs = rng.sample([(name, form) for name in names for form in SAID], facts)
        places, seed = [rng.random() for _ in pairs], rng.random()
        said = [
            f"{name}: Before I forget, {form[0].format(number=number)}."
            for (name, form), number in zip(pairs, numbers, strict=True)
        ]
        question = _question(pairs[0][1][1].format(name=pairs[0][0]), "the number")

        def draft(units: int) -> Draft:
            words = Random(seed)
            lines = [
                f"{names[at % 2]}: {sentence}\n{names[1 - at % 2]}: {words.choice(REPLIES)}"
                for at, sentence in enumerate(haystack.sentences(Random(seed), units))
            ]
            for place, fact in sorted(zip(places, said, strict=True), reverse=True):
                lines.insert(round(place * units), fact)
            head = (
                f"Read the conversation of {names[0]} and {names[1]} below. A question about it comes at its end.\n\n"
            )
            context = head + "\n".join(lines)
            return _recalled(context, question, (str(numbers[0]),), context.index(said[0]))

        return draft

    return plan


def _checked(task: TextTask) -> TextTask:
    """The task, of which the first example was made: errors come when it is asked for, not in the middle of a run."""
    task.example(0)
    return task


def _whole(name: str, **options: object) -> None:
    for option, value in options.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"task={name!r}: {option}={value!r} is not possible; give a whole number of at least 1")


@register_task("niah", files=("haystack",))
def _niah(
    name: str,
    tokenizer: Any,
    *,
    length: int = 4096,
    haystack: str = "",
    kind: str = "number",
    depth: float | None = None,
) -> TextTask:
    if depth is not None and not (isinstance(depth, (int, float)) and 0 <= depth <= 100):
        raise ValueError(f"task={name!r}: depth={depth!r} is not possible; give per cent of the text, 0 to 100")
    return _hidden(name, tokenizer, length, haystack, kind=kind, keys=1, depth=depth)


@register_task("niah-multikey", files=("haystack",))
def _multikey(
    name: str, tokenizer: Any, *, length: int = 4096, haystack: str = "", kind: str = "number", keys: int = 4
) -> TextTask:
    return _hidden(name, tokenizer, length, haystack, kind=kind, keys=keys)


@register_task("niah-multivalue", files=("haystack",))
def _multivalue(
    name: str, tokenizer: Any, *, length: int = 4096, haystack: str = "", kind: str = "number", values: int = 4
) -> TextTask:
    return _hidden(name, tokenizer, length, haystack, kind=kind, keys=1, values=values)


@register_task("niah-multiquery", files=("haystack",))
def _multiquery(
    name: str, tokenizer: Any, *, length: int = 4096, haystack: str = "", kind: str = "number", queries: int = 4
) -> TextTask:
    return _hidden(name, tokenizer, length, haystack, kind=kind, keys=queries, queries=queries)


def _hidden(name: str, tokenizer: Any, length: int, haystack: str, *, kind: str, keys: int, **options: Any) -> TextTask:
    if kind not in ("number", "uuid"):
        raise ValueError(f"task={name!r}: kind={kind!r} is not possible; choose number or uuid")
    _whole(name, length=length, keys=keys, **{key: value for key, value in options.items() if key != "depth"})
    if keys > len(ADJECTIVES) * len(NOUNS):
        raise ValueError(f"task={name!r}: there are names for {len(ADJECTIVES) * len(NOUNS)} keys; ask for fewer")
    hay = Haystack(str(haystack))
    drafting = needles(hay, keys=keys, kind=kind, **options)
    return _checked(TextTask(name, name.partition(":")[0], tokenizer, drafting, length, source=hay.source))


@register_task("variable-tracking", files=("haystack",))
def _variables(
    name: str, tokenizer: Any, *, length: int = 4096, haystack: str = "", chains: int = 2, hops: int = 4
) -> TextTask:
    _whole(name, length=length, chains=chains, hops=hops)
    hay = Haystack(str(haystack))
    drafting = variable_tracking(hay, chains=chains, hops=hops)
    return _checked(TextTask(name, "variable-tracking", tokenizer, drafting, length, source=hay.source))


@register_task("frequent-words")
def _frequent(name: str, tokenizer: Any, *, length: int = 4096, asked: int = 3, alpha: float = 2.0) -> TextTask:
    _whole(name, length=length, asked=asked)
    if not isinstance(alpha, (int, float)) or alpha < 1 or asked > 10:
        raise ValueError(f"task={name!r}: asked={asked}, alpha={alpha} is not possible; at most 10 words, alpha >= 1")
    drafting = frequent_words(asked=asked, alpha=alpha)
    return _checked(TextTask(name, "frequent-words", tokenizer, drafting, length, least=64))


@register_task("stated-once", files=("haystack",))
def _stated_once(
    name: str, tokenizer: Any, *, length: int = 4096, haystack: str = "", distance: int | None = None, facts: int = 8
) -> TextTask:
    distance = length // 2 if distance is None and isinstance(length, int) else distance
    _whole(name, length=length, distance=distance, facts=facts)
    assert distance is not None
    hay = Haystack(str(haystack))
    drafting = stated_once(hay, distance=distance, facts=facts)
    return _checked(TextTask(name, "stated-once", tokenizer, drafting, length, least=1, source=hay.source))


@register_task("table")
def _table(name: str, tokenizer: Any, *, length: int = 4096) -> TextTask:
    _whole(name, length=length)
    return _checked(TextTask(name, "table", tokenizer, table(), length))


@register_task("conversation", files=("haystack",))
def _conversation(name: str, tokenizer: Any, *, length: int = 4096, haystack: str = "", facts: int = 4) -> TextTask:
    _whole(name, length=length, facts=facts)
    if facts > 2 * len(SAID):
        raise ValueError(f"task={name!r}: facts={facts} is not possible; give at most {2 * len(SAID)}")
    hay = Haystack(str(haystack))
    drafting = conversation(hay, facts=facts)
    return _checked(TextTask(name, "conversation", tokenizer, drafting, length, source=hay.source))


@register_task("state-recall")
def _state_recall(name: str, tokenizer: Any, *, length: int = 4096, ask: str = "stack") -> TextTask:
    _whole(name, length=length)
    if ask not in ("stack", "visit"):
        raise ValueError(f"task={name!r}: ask={ask!r} is not possible; choose stack or visit")
    return _checked(TextTask(name, "state-recall", tokenizer, state_recall(stack=ask == "stack"), length, least=6))


@register_task("program-trace")
def _program_trace(name: str, tokenizer: Any, *, length: int | None = None, generated: int | None = None) -> TextTask:
    if length is not None and generated is not None:
        raise ValueError(f"task={name!r} has both length and generated; give one of them")
    length = 2048 if length is None and generated is None else length
    _whole(name, **({"length": length} if generated is None else {"generated": generated}))
    return _checked(TextTask(name, "program-trace", tokenizer, program_trace(), length, generated))
