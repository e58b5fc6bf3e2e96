"""The tasks in English: of the length asked for by any tokenizer, the same every time, with answers that are right."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.marks import most_examples
from support.tokenizing import tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import kara_hf.tasks.english  # noqa: F401
from kara_hf.tasks.grading import share_found
from kara_hf.tasks.haystack import NOUNS, Haystack, prose, scatter
from kara_hf.tasks.sizing import fit
from kara_hf.tasks.task import make_task

NEEDLES = ["niah", "niah-multikey", "niah-multivalue", "niah-multiquery"]
TASKS = [
    *NEEDLES,
    "niah:kind=uuid",
    "niah-multikey:keys=9:kind=uuid",
    "variable-tracking",
    "variable-tracking:chains=1:hops=7",
    "frequent-words",
    "stated-once",
    "stated-once:distance=300:facts=1",
    "table",
    "conversation",
    "state-recall",
    "state-recall:ask=visit",
    "program-trace",
]
numbers = st.integers(0, 2**32)


def words_only(words):
    """A tokenizer of whole words."""
    vocabulary = {word: at for at, word in enumerate(dict.fromkeys([*words, "<unk>"]))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def letters_only(letters):
    """A tokenizer of single characters, which makes nothing of others."""
    vocabulary = {letter: at for at, letter in enumerate(letters)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [])))


def count(kind, text, special=False):
    return len(tokenizer(kind)(text, add_special_tokens=special)["input_ids"])


@cache
def task(name, kind):
    return make_task(name, tokenizer(kind))


def example(name, number, kind="bpe", **options):
    parts = [name, *(f"{option}={value}" for option, value in options.items())]
    return task(":".join(parts), kind).example(number)


class Counting:
    """A tokenizer that notes what it reads."""

    def __init__(self, kind):
        self.kind, self.unk_token_id, self.read = kind, None, []

    def __call__(self, text, **options):
        self.read.append(len(text))
        return tokenizer(self.kind)(text, **options)


@pytest.mark.parametrize("kind", ["bpe", "bytes", "unigram"])
@pytest.mark.parametrize("name", TASKS)
def test_length_is_met_by_any_tokenizer(name, kind):
    for length in (3000, 9000):
        made = example(name, 1, kind, length=length)
        prompt = count(kind, made.context, special=True) + count(kind, made.question)
        assert prompt + made.max_new_tokens == length
        assert count(kind, made.context + made.question, special=True) <= prompt
        assert made.context == made.context.strip() and made.question.startswith("\n\nQuestion: ")
        spare = made.max_new_tokens - count(kind, made.reference) - 16
        unit = {"bytes": 260, "bpe": 90, "unigram": 90}[kind]
        assert 0 <= spare <= unit or name.startswith("program-trace") and spare < length / 2


@given(st.sampled_from(TASKS), st.integers(1500, 4000), numbers)
@most_examples(25)
def test_an_example_is_a_pure_function_of_task_and_number(name, length, number):
    first = example(name, number, length=length)
    again = make_task(f"{name}:length={length}", tokenizer("bpe")).example(number)
    assert replace(first, score=len) == replace(again, score=len)
    assert first.context != example(name, number + 1, length=length).context
    assert first.task == f"{name}:length={length}" and first.number == number
    if not name.startswith(("state-recall", "program-trace")):
        longer = example(name, number, length=2 * length)
        assert (longer.question, longer.answers) == (first.question, first.answers)


@given(st.sampled_from(TASKS), numbers)
def test_the_right_answer_scores_one_and_another_examples_zero(name, number):
    made = example(name, number, length=2500)
    assert made.score(made.reference) == made.score(f"It is {made.reference}.".upper()) == 1
    assert made.score("") == made.score("I do not know 1 of them, sorry.") == 0
    other = example(name, number + 1, length=2500)
    if not set(made.answers) & set(other.answers):
        assert made.score(other.reference) == 0


@given(st.sampled_from([*NEEDLES, "niah-multiquery:kind=uuid", "stated-once"]), numbers)
def test_needles_stand_once_in_the_context_and_not_in_the_question(name, number):
    made = example(name, number, length=2500)
    for answer in made.answers:
        assert made.context.count(answer) == 1
        assert answer not in made.question
    assert len(made.answers) == (4 if name.startswith(("niah-multivalue", "niah-multiquery")) else 1)
    half = made.answers[: len(made.answers) // 2]
    assert made.score(", ".join(half)) == len(half) / len(made.answers)
    told = [sentence for sentence in re.split(r"(?<=\.)\s", made.context) if made.answers[0] in sentence]
    asked = re.findall(
        r"[A-Z]\w+ [A-Z]\w+" if name == "stated-once" else r"access codes? of (the \w+ \w+)", made.question
    )
    assert len(told) == 1 and asked[-1] in told[0], "the needle is about what is asked"


def test_distance_runs_from_the_oldest_answer_to_the_question():
    made = example("niah-multikey", 3, length=3000)
    start = made.context.index("The access code of " + re.search(r"the \w+ \w+\?", made.question)[0][:-1])
    assert made.distance == count("bpe", made.context[start:])
    made = example("niah-multivalue", 3, length=3000)
    assert made.distance == count("bpe", made.context[made.context.index("The access code of") :])
    ends = [example("niah", 3, length=3000, depth=depth).distance for depth in (100, 50, 0)]
    assert ends[0] < 40 and abs(ends[1] - 1450) < 100 and ends[2] > 2880


@given(numbers)
def test_the_parcel_that_is_asked_for_lies_in_one_row(number):
    made = example("table", number, length=2500)
    (order,) = re.findall(r"order (\d+)", made.question)
    rows = [row.split(" | ") for row in made.context.splitlines() if row.startswith("| ") and row[2].isdigit()]
    assert len(rows) > 40 and [row[-1].rstrip(" |") for row in rows if row[0] == f"| {order}"] == list(made.answers)
    assert made.context.count(made.answers[0]) == 1 and made.answers[0] not in made.question


@given(numbers, st.integers(1, 8))
def test_what_is_asked_of_a_conversation_was_said_once(number, facts):
    made = example("conversation", number, length=2500, facts=facts)
    said = re.findall(r"(\w+): Before I forget, .*?(\d{5})", made.context)
    assert len(said) == facts and made.context.count(made.answers[0]) == 1 and made.answers[0] not in made.question
    assert [name for name, answer in said if answer == made.answers[0] and name in made.question]


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
@pytest.mark.parametrize("distance", [400, 1000, 2900])
def test_a_fact_is_stated_once_at_its_distance(distance, kind):
    made = example("stated-once", 5, kind, length=4000, distance=distance)
    name = re.search(r"[A-Z]\w+ [A-Z]\w+(?=\W)", made.question.removeprefix("\n\nQuestion: ").split(" ", 1)[1])[0]
    assert made.context.count(name) == 1
    assert distance - {"bpe": 60, "bytes": 250}[kind] < made.distance <= distance
    at = made.context.index(name)
    assert count(kind, made.context[at:]) <= made.distance <= count(kind, made.context[at - 60 :])


@given(numbers, st.integers(1, 3), st.integers(1, 6))
def test_variables_lead_back_to_the_value(number, chains, hops):
    made = example("variable-tracking", number, length=2500, chains=chains, hops=hops)
    held = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", made.context):
        held[name] = held.get(source, source)
    asked = re.search(r"\d+", made.question)[0]
    assert {name for name, value in held.items() if value == asked} == set(made.answers)
    assert len(held) == chains * (hops + 1) and len(made.answers) == hops + 1


@given(numbers, st.integers(1, 5), st.sampled_from([1.5, 2, 3]))
def test_frequent_words_are_the_most_frequent(number, asked, alpha):
    made = example("frequent-words", number, length=2000, asked=asked, alpha=alpha)
    times = Counter(made.context.split("\n\n", 1)[1].split()).most_common()
    assert {word for word, _ in times[:asked]} == set(made.answers) <= set(NOUNS)
    assert times[asked - 1][1] > times[asked][1], "no tie"


def walked(context, step):
    """The rooms on the way to the walker after a step, from the log alone."""
    path = [re.search(r"entrance, room (\d+)", context)[1]]
    for at, kind, room in re.findall(r"Step (\d+): (from|nothing).* room (\d+)\.", context):
        path = [*path, room] if kind == "from" else path[:-1]
        assert path[-1] == room
        if int(at) == step:
            return path
    raise AssertionError("the log ends before that step")


@given(numbers, st.integers(1500, 6000))
def test_the_state_in_the_middle_follows_from_the_log(number, length):
    made = example("state-recall", number, length=length)
    step, steps = int(re.search(r"after step (\d+)", made.question)[1]), made.context.count("Step ")
    path = walked(made.context, step)
    assert list(made.answers) == path and steps // 3 - 1 <= step <= 2 * steps // 3 + 1
    everything = " ".join(re.findall(r"Step \d+: .*", made.context))
    assert made.score(everything) < 1, "naming all rooms does not pay"
    assert made.score(path[0]) == 1 / len(path)
    room = example("state-recall", number, length=length, ask="visit")
    assert room.answers[0] == walked(room.context, int(re.search(r"step (\d+)", room.question)[1]))[-1]


@given(numbers, st.integers(400, 2000))
def test_a_program_gives_what_is_asked_for(number, generated):
    made = example("program-trace", number, generated=generated)
    scope = {}
    exec(made.context.split("\n\n", 1)[1], scope)
    asked = re.search(r"value of (\w+)", made.question)[1]
    assert made.answers == (str(scope[asked]),)
    for line in made.reference.split("\n")[:-1]:
        name, *sides = line.split(" = ")
        assert {eval(side, dict(scope)) for side in sides} == {scope[name]}
    assert generated <= count("bpe", made.reference) <= generated + 60
    assert made.max_new_tokens > 1.4 * generated


def test_only_the_final_value_of_a_program_is_graded():
    made = example("program-trace", 0)
    right, wrong = made.answers[0], str((int(made.answers[0]) + 1) % 10)
    trace = made.reference.rpartition("\n")[0]
    assert made.score(trace) == made.score("") == made.score(f"Answer {right}") == 0, "an answer is marked as such"
    assert made.score(f"{trace}\n**Answer:** The value of v77 is {right}.") == 1
    assert made.score(f"Answer: {right}\nNo.\nAnswer: {wrong}") == 0


@given(st.text("ab1 ,.é", max_size=30), st.lists(st.sampled_from(["a", "b1", "11", "é."]), min_size=1, max_size=4))
def test_share_found_counts_whole_words(text, answers):
    words = f" {text} "
    expected = [re.search(rf"(?:^|[^\w]){re.escape(answer)}(?:$|[^\w])", words) is not None for answer in answers]
    assert share_found(text, answers) == sum(expected) / len(answers)
    assert share_found(f"{text} {' '.join(answers)}", answers) == 1
    with pytest.raises(ValueError, match="no answer to look for"):
        share_found(text, [])


@given(st.data(), st.integers(1, 400), st.integers(0, 20))
def test_fit_finds_the_most_that_may_be_spent(data, limit, slack):
    costs = data.draw(st.lists(st.integers(1, 9), min_size=500, max_size=500))
    asked = []

    def cost(units):
        asked.append(units)
        return sum(costs[i % 500] for i in range(units))

    least = data.draw(st.integers(0, 3))
    if cost(least) > limit:
        with pytest.raises(ValueError, match=f"size={limit} is too short .* at least {cost(least)} tokens"):
            fit(cost, limit, least, "size")
        return
    units = fit(cost, limit, least, "size", slack=slack)
    assert units >= least and cost(units) <= limit
    assert limit - cost(units) <= slack or cost(units + 1) > limit


@pytest.mark.parametrize("name", TASKS)
def test_little_is_read_to_meet_a_length(name):
    counting = Counting("bpe")
    task = make_task(f"{name}:length=16000", counting)
    counting.read.clear()
    made = task.example(1)
    whole = len(made.context) + len(made.question) + len(made.reference)
    assert sum(counting.read) < 8 * whole and len(counting.read) < 40


def test_prose_is_varied_and_has_no_digits():
    sentences = list(islice(prose(Random(1)), 2000))
    assert len(set(sentences)) > 1800
    assert all(re.fullmatch(r"[A-Z][A-Za-z,; ]+\.", sentence) for sentence in sentences)


@given(st.integers(0, 40), st.lists(st.floats(0, 1), max_size=6))
def test_scatter_keeps_every_sentence_in_order(size, shares):
    sentences, needles = [f"S{at}." for at in range(size)], {f"N{at}.": share for at, share in enumerate(shares)}
    words = scatter(sentences, needles).split()
    assert [word for word in words if word[0] == "S"] == sentences
    order = [shares[int(word[1:-1])] for word in words if word[0] == "N"]
    assert len(order) == len(shares) and order == sorted(order)


def test_a_haystack_of_files_starts_again_at_its_end(tmp_path):
    for name, letter in (("b.txt", "B"), ("a.txt", "A"), ("c.md", "C")):
        (tmp_path / name).write_text("".join(f"{letter} sentence {at} stands here.\n\n" for at in range(30)))
    hay = Haystack(str(tmp_path))
    assert [sentence[0] for sentence in hay.own] == ["A"] * 30 + ["B"] * 30
    drawn = hay.sentences(Random(0), 100)
    assert drawn[:40] == drawn[60:] == hay.sentences(Random(0), 40)
    made = example("niah", 0, haystack=tmp_path, length=2000)
    assert "sentence 7 stands here." in made.context and made.score(made.reference) == 1


def test_a_long_sentence_of_a_file_is_cut(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 4000)
    assert {len(sentence.split()) for sentence in Haystack(str(tmp_path / "a.txt")).own} == {40}


ENGLISH = sorted(set(re.findall(r"\w+|[^\w\s]+", " ".join(islice(prose(Random(0)), 3000)))))
KNOWN = "Read the text below with care A question about it comes at its end The access code of is" + " ".join(NOUNS)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (partial(words_only, ["trace", "w01"]), r"\d\d% of its tokens are unknown to this tokenizer"),
        (partial(words_only, [*ENGLISH, *KNOWN.split()]), "tokens of its answers are unknown to this tokenizer"),
        (partial(letters_only, "."), "most of it is lost in this tokenizer"),
        (partial(letters_only, "~"), "makes no tokens of English words"),
    ],
    ids=["unknown", "no numbers", "lost", "nothing"],
)
def test_a_tokenizer_without_english_is_refused(made, message):
    with pytest.raises(ValueError, match=f"{message}.*choose a"):
        make_task("niah:length=900", made())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("niah:length=60", r"length=60 is too short for this task and tokenizer; give at least \d+ tokens"),
        ("niah:length=some", "length='some' is not possible; give a whole number of at least 1"),
        ("niah:depth=101", "depth=101 is not possible; give per cent"),
        ("niah:kind=word", "kind='word' is not possible; choose number or uuid"),
        ("niah-multikey:keys=0", "keys=0 is not possible"),
        ("niah-multikey:keys=99999", "names for .* keys"),
        ("niah:haystack=nowhere", "haystack='nowhere' is no text file and no folder"),
        ("niah:haystack=7", "haystack='7' is no text file"),
        ("frequent-words:asked=11", "asked=11, alpha=2.0 is not possible"),
        ("frequent-words:alpha=x", "alpha=x is not possible"),
        ("conversation:facts=9", "facts=9 is not possible; give at most 8"),
        ("stated-once:distance=9", "distance=9 is too short"),
        ("stated-once:length=1000:distance=990", "length=1000 is too short"),
        ("state-recall:ask=door", "ask='door' is not possible; choose stack or visit"),
        ("program-trace:length=900:generated=900", "both length and generated"),
        ("variable-tracking:steps=3", "has no option 'steps'; options of variable-tracking, .*chains, hops"),
    ],
)
def test_bad_options_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, tokenizer("bpe"))


def test_a_short_haystack_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("Too short. By far.")
    with pytest.raises(ValueError, match="has 2 sentences; give a text of at least 50"):
        Haystack(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no folder of .txt files"):
        Haystack(str(tmp_path / "empty"))


def test_numbers_begin_at_zero():
    with pytest.raises(IndexError, match="has no example -1; numbers begin at 0"):
        example("niah", -1)


def test_import_is_cheap():
    code = (
        "import sys, kara_hf.tasks.english, kara_hf.tasks.published; heavy = {'torch', 'transformers', "
        "'datasets', 'pandas', 'math_verify', 'sympy', 'jieba', 'rouge', 'rapidfuzz'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
