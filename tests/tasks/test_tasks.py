"""The synthetic problems: pure, disjoint between splits, of the length asked for, with answers that are right."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kara_hf.tasks.reasoner import TASKS, VOCABULARY, make_problem, split_of, task

LONG = [name for name, spec in TASKS.items() if spec.length_for]
tasks = st.sampled_from(sorted(TASKS))
lengths = st.integers(96, 1200)
seeds = st.integers(0, 2**48)
splits = st.sampled_from(["train", "test"])


def lines(words):
    """Split words at each ";" into lines without it."""
    line, result = [], []
    for word in words:
        if word == ";":
            result.append(line)
            line = []
        else:
            line.append(word)
    return result, line


def evaluate_trace(prompt):
    """Values of all variables and the two asked names, from the prompt alone."""
    definitions, question = lines(prompt.split())
    values = {}
    for name, _, *expression in definitions:
        operands = expression[::2]
        values[name] = int(operands[0]) if len(operands) == 1 else sum(values[operand] for operand in operands) % 10
    return values, question[1:3]


@given(tasks, splits, lengths, seeds)
@settings(deadline=None)
def test_a_problem_is_a_pure_function_of_its_arguments(name, split, length, seed):
    problem = make_problem(name, length=length, seed=seed, split=split)
    assert problem == make_problem(name, length=length, seed=seed, split=split)
    assert problem.prompt != make_problem(name, length=length, seed=seed + 1, split=split).prompt


@given(tasks, splits, lengths, seeds)
@settings(deadline=None)
def test_every_prompt_carries_its_split(name, split, length, seed):
    """The split is decided by the prompt, so no prompt of one split can come up in the other, for any two seeds."""
    assert split_of(make_problem(name, length=length, seed=seed, split=split).prompt) == split


def test_splits_share_no_prompt_where_the_space_is_small():
    prompts = {
        split: {make_problem("trace", length=72, seed=seed, split=split).prompt for seed in range(500)}
        for split in ("train", "test")
    }
    assert not prompts["train"] & prompts["test"]


@given(tasks, lengths, seeds)
@settings(deadline=None)
def test_length_counts_prompt_and_completion(name, length, seed):
    problem = make_problem(name, length=length, seed=seed)
    total = len(problem.prompt.split()) + len(problem.completion.split())
    assert length - 17 < total <= length


@given(st.sampled_from(LONG), st.integers(48, 1300), seeds)
@settings(deadline=None)
def test_generated_is_a_floor_that_is_nearly_met(name, generated, seed):
    actual = len(make_problem(name, generated=generated, seed=seed).completion.split())
    assert generated <= actual <= 1.05 * generated + 20


@given(tasks, lengths, seeds)
@settings(deadline=None)
def test_every_word_is_one_token(name, length, seed):
    problem = make_problem(name, length=length, seed=seed)
    text = f"{problem.prompt} {problem.completion}"
    assert set(text.split(" ")) <= set(VOCABULARY)


def test_vocabulary_has_no_duplicates():
    assert len(set(VOCABULARY)) == len(VOCABULARY)


@given(st.sampled_from(LONG), lengths, seeds)
@settings(deadline=None)
def test_trace_answers_follow_from_the_prompt(name, length, seed):
    problem = make_problem(name, length=length, seed=seed)
    values, asked = evaluate_trace(problem.prompt)
    assert problem.answer == " ".join(f"{variable} {values[variable]}" for variable in asked)
    steps, _ = lines(problem.completion.split())
    for step in steps:
        for variable, value in zip(step[2:], step[3:], strict=False):
            if variable in values and value.isdigit():
                assert values[variable] == int(value)
        assert step[-2:] == [step[0], str(values[step[0]])]
    assert [step[0] for step in steps] == list(values)


@given(st.integers(96, 2000), seeds)
@settings(deadline=None)
def test_a_fact_is_written_once_early_and_asked_at_the_end(length, seed):
    problem = make_problem("fact", length=length, seed=seed)
    _, asked = evaluate_trace(problem.prompt)
    words = problem.completion.split()
    for variable in asked:
        stated = [at for at, word in enumerate(words[:-5]) if word == variable and words[at + 1].isdigit()]
        assert len(stated) == 1
        assert stated[0] <= max(0.45 * len(words), 80)
        assert problem.prompt.split().count(variable) == 2, "defined once, asked for once, never an operand"


@given(st.sampled_from(["recall", "survey"]), lengths, seeds)
@settings(deadline=None)
def test_recall_answers_stand_in_the_prompt(name, length, seed):
    problem = make_problem(name, length=length, seed=seed)
    words = problem.prompt.split()
    asked = words[words.index("recall") + 1 : -1]
    facts = [" ".join(words[words.index(key) : words.index(key) + 5]) for key in asked]
    assert all(fact.endswith(" ;") for fact in facts)
    assert problem.answer == " ".join(facts)


@given(lengths, seeds)
@settings(deadline=None)
def test_copy_answers_stand_in_the_prompt(length, seed):
    problem = make_problem("copy", length=length, seed=seed)
    span = problem.prompt.split(f"[ {problem.prompt.split()[-2]} ")[1].split(" ]")[0]
    assert 8 <= len(span.split()) <= 16
    assert problem.answer == f"{problem.prompt.split()[-2]} {span} ]"


@given(tasks, lengths, seeds, st.data())
@settings(deadline=None)
def test_the_grader_accepts_the_reference_and_rejects_any_other_answer(name, length, seed, data):
    problem = make_problem(name, length=length, seed=seed)
    assert problem.grade(problem.completion) and problem.exact(problem.completion)
    assert problem.grade(f"{problem.completion} <eos> <pad> ans")
    words, answer = problem.completion.split(), problem.answer.split()
    at = len(words) - 1 - data.draw(st.integers(0, len(answer) - 1))
    other = data.draw(st.sampled_from([word for word in VOCABULARY if word not in (words[at], "ans")]))
    wrong = " ".join([*words[:at], other, *words[at + 1 :]])
    assert not problem.grade(wrong) and not problem.exact(wrong)
    assert not problem.grade("") and not problem.grade(" ".join(words[:-1]))
    assert problem.grade(f"ans {problem.answer}"), "only the final answer is graded"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "sums", "length": 128}, "unknown task 'sums'; choose one of"),
        ({"split": "dev", "length": 128}, "unknown split 'dev'"),
        ({"length": 8}, "length 8 is out of range for task 'trace'; choose 72 to 2400"),
        ({"length": 9999}, "length 9999 is out of range"),
        ({"length": 128, "seed": -1}, "seed is -1"),
        ({}, "give exactly one"),
        ({"length": 128, "generated": 64}, "give exactly one"),
        ({"task": "copy", "generated": 64}, "generated=64 cannot be met; use one of"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) or "none" if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_problem(**{"task": "trace", "seed": 0, **arguments})


def test_a_new_task_is_one_decorated_function(monkeypatch):
    monkeypatch.setattr("kara_hf.tasks.reasoner.TASKS", dict(TASKS))

    @task("echo", min_length=16)
    def echo(rng, length):
        words = rng.choices(VOCABULARY, k=length // 2)
        return words, ["ans", *words]

    problem = make_problem("echo", length=32, seed=0)
    assert problem.answer == problem.prompt
    with pytest.raises(ValueError, match="'echo' is already registered"):
        task("echo", min_length=16)(echo)
