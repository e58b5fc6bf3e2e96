"""Published sets from files of their columns, and how answers to them are graded."""

import json
import threading

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import kara_hf.tasks.published  # noqa: F401
from kara_hf.tasks import grading
from kara_hf.tasks.grading import gsm8k_answer, mathematics
from kara_hf.tasks.longbench import (
    DATASETS,
    classification,
    code_similarity,
    count,
    question_f1,
    question_f1_chinese,
    retrieval,
    rouge_l,
    rouge_l_chinese,
)
from kara_hf.tasks.published import cut_middle
from kara_hf.tasks.task import TASKS, make_task

GSM8K = [
    {"question": f"Ann has {n} nuts and eats one. How many are left?", "answer": f"{n} - 1 = {n - 1}\n#### {n - 1:,}"}
    for n in (12, 9, 1501, 3)
]
MATH500 = [
    {"problem": "Halve $x$.", "solution": "It is $\\boxed{\\frac{x}{2}}$.", "answer": "\\frac{x}{2}", "level": 1},
    {"problem": "Who?", "solution": "$\\boxed{\\text{Eve}}$", "answer": "\\text{Eve}", "level": 2},
]
AIME = [{"id": 1, "problem": "Add 20 and 13.", "solution": "So \\boxed{033}.", "answer": "033"}]
NOVEL = " ".join(f"chapter {n} tells of a king" for n in range(200))


def longbench_row(**changes):
    row = {"input": "Who?", "context": NOVEL, "answers": ["a king", "the queen"], "all_classes": None, "length": 9}
    return {**row, "dataset": "", "language": "en", "_id": "0", **changes}


def byte_tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Files that datasets makes stay in the test's folder, and it shows no progress."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def written(folder, rows, kind=".jsonl"):
    path = folder / f"rows{kind}"
    if kind == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if kind == ".jsonl" else json.dumps(rows))
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet"])
def test_gsm8k_keeps_the_order_of_its_file(tmp_path, kind):
    name = f"gsm8k:path={written(tmp_path, GSM8K, kind)}:max_new_tokens=77"
    task = make_task(name, None)
    examples = [task.example(number) for number in range(task.size)]
    assert [made.answers for made in examples] == [("11",), ("8",), ("1500",), ("2",)]
    assert all(row["question"] in made.context for row, made in zip(GSM8K, examples, strict=True))
    assert {(made.question, made.max_new_tokens, made.task) for made in examples} == {("", 77, name)}
    assert [made.score(made.reference) for made in examples] == [1] * 4
    assert [made.score(row["answer"]) for made, row in zip(examples, GSM8K[1:], strict=False)] == [0] * 3
    for number in (-1, 4):
        with pytest.raises(IndexError, match=f"has no example {number}; it has 0 to 3"):
            task.example(number)


def test_solved_problems_of_gsm8k_are_shown_and_not_asked(tmp_path):
    path = written(tmp_path, GSM8K)
    task, plain = make_task(f"gsm8k:path={path}:shots=2", None), make_task(f"gsm8k:path={path}", None)
    assert task.size == 2
    for number in range(2):
        made = task.example(number)
        shots, own = made.context[: -len(plain.example(number).context)], plain.example(number).context
        assert made.context.endswith(own) and all(row["question"] in shots for row in GSM8K[2:])
        assert [f"\\boxed{{{answer}}}" in shots for answer in ("1500", "2")] == [True] * 2
        assert not any(row["question"] in shots for row in GSM8K[:2]) and "<<" not in shots and "####" not in shots


def test_problems_of_gsm8k_are_solved_one_after_the_other_in_one_answer(tmp_path):
    name = f"gsm8k:path={written(tmp_path, GSM8K)}:problems=2"
    task = make_task(name, None)
    assert task.size == 2
    first, second = task.example(0), task.example(1)
    assert (first.answers, second.answers) == (("11", "8"), ("1500", "2")) and first.max_new_tokens == 2048
    assert all(row["question"] in first.context for row in GSM8K[:2])
    assert first.score(first.reference) == second.score(second.reference) == 1 and first.score("") == 0
    answer = "### Problem {}:\nIt is \\boxed{{{}}}.\n\n"
    right, wrong = answer.format(1, 11) + answer.format(2, 8), answer.format(1, 8) + answer.format(2, 8)
    assert first.score(right) == 1 and first.score(wrong) == 0.5 and first.score(answer.format(2, 8)) == 0.5
    assert first.score(right + answer.format(3, 9)) == 1, "what a base model goes on with does not count"


@pytest.mark.parametrize(("name", "rows"), [("math500", MATH500), ("aime24", AIME), ("aime25", AIME)])
def test_mathematics_sets(tmp_path, name, rows):
    task = make_task(f"{name}:path={written(tmp_path, rows)}", None)
    assert task.size == len(rows) and task.chat
    for number, row in enumerate(rows):
        made = task.example(number)
        assert row["problem"] in made.context and "\\boxed{}" in made.context
        assert made.answers == (row["answer"],) and made.reference == row["solution"]
        assert made.score(row["solution"]) == 1 and made.score("It is \\boxed{35}.") == made.score("") == 0
        further = f"{row['solution']}\n\nProblem: Add 30 and 5.\n\nSolution: \\boxed{{35}}"
        assert made.score(further) == 1, "what a base model goes on with does not count"


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("so it is \\boxed{\\frac12}", "0.5", 1),
        ("so it is \\boxed{\\frac12}", "We get \\boxed{\\frac{1}{2}}.", 1),
        ("We try \\boxed{3}.\nNo:\n\\[\n\\boxed{4}\n\\]\nThat is it, for $x = 7$.", "4", 1),
        ("We try \\boxed{4}.\nNo, it is \\boxed{3}", "4", 0),
        ("Thus \\boxed{3} and \\boxed{4}.", "3, 4", 1),
        (
            "Thus\n\\[\\boxed{\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}}\\]",
            "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
            1,
        ),
        ("The answer is 1,200.", "1200", 1),
        ("The answer is $(3, \\frac{\\pi}{2})$.", "\\left( 3, \\frac{\\pi}{2} \\right)", 1),
        ("\\boxed{q - p}", "p - q", 0),
        ("\\boxed{-q + p}", "p - q", 1),
        ("\\boxed{\\frac{}{}}", "42", 0),
        ("no number at all", "42", 0),
        ("", "42", 0),
    ],
)
def test_mathematics_is_compared_by_value(text, gold, right):
    assert mathematics(text, gold) == right


def test_mathematics_works_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend([mathematics("\\boxed{2}", "2"), mathematics("3", "2")]))
    thread.start()
    thread.join()
    assert found == [1, 0]


def test_what_takes_too_long_is_wrong(monkeypatch):
    monkeypatch.setattr(grading, "SECONDS", 1)
    assert mathematics("\\boxed{9^{9^{9^9}}}", "9^{9^{9^8}}") == 0


@given(st.text(max_size=80), st.integers(-999, 9999))
def test_any_text_can_be_graded(text, gold):
    assert mathematics(text, str(gold)) in (0, 1)
    assert mathematics(f"{text} \\boxed{{{gold}}}", str(gold)) == 1 or "\\" in text or "$" in text or "{" in text


def test_the_answer_of_gsm8k_stands_behind_its_mark():
    assert gsm8k_answer("a\n#### 1,234 ") == "1234"
    assert gsm8k_answer("#### Step 1\n\\boxed{5}") == "#### Step 1\n\\boxed{5}"
    assert gsm8k_answer("It is 7.") == "It is 7."


@pytest.mark.parametrize("key", DATASETS)
def test_every_longbench_set_asks_behind_its_context(tmp_path, key):
    answers = {"retrieval": ["Paragraph 7"], "count": ["7"]}.get(DATASETS[key].score.__name__, ["a king", "the queen"])
    row = longbench_row(answers=answers, all_classes=["a king", "a cook"])
    task = make_task(f"longbench-{key}:path={written(tmp_path, [row])}", None)
    made = task.example(0)
    assert made.context.endswith(NOVEL) and NOVEL not in made.question and made.question
    assert ("Who?" in made.question) == (key not in ("gov_report", "multi_news", "vcsum", "passage_count", "lcc"))
    assert "{" not in made.question and made.answers == tuple(answers)
    assert made.score(answers[0]) == pytest.approx(1) and made.score("") == made.score("unknown") * 0 == 0
    assert made.max_new_tokens in (32, 64, 128, 512)
    assert task.chat == (key not in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"))


def test_the_best_answer_counts_and_of_some_sets_the_first_line(tmp_path):
    path = written(tmp_path, [longbench_row(all_classes=[])])
    whole, first = (make_task(f"longbench-{key}:path={path}", None).example(0) for key in ("hotpotqa", "triviaqa"))
    assert whole.score("queen") == first.score("queen") == 1
    assert whole.score("\nqueen\nof Spain") == 0.5 and first.score("\nqueen\nof Spain") == 1


@pytest.mark.parametrize(
    ("score", "text", "answer", "classes", "expected"),
    [
        (question_f1, "The King, of a land!", "king", (), 0.5),
        (question_f1, "an old king", "King old", (), 1),
        (question_f1, "nobody", "king", (), 0),
        (question_f1, "", "the", (), 0),
        (question_f1_chinese, "北京。", "北京", (), 1),
        (question_f1_chinese, "上海", "北京", (), 0),
        (rouge_l, "the cat sat", "the cat sat", (), 1),
        (rouge_l, "the cat", "the cat sat on", (), 2 / 3),
        (rouge_l, "", "the cat", (), 0),
        (rouge_l, ".", "the cat", (), 0),
        (rouge_l_chinese, "我们讨论预算", "我们讨论预算", (), 1),
        (classification, "It is a City or a Country", "City", ("City", "Country", "State"), 0.5),
        (classification, "Other number", "Other number", ("number", "Other number", "State"), 1),
        (classification, "State", "City", ("City", "State"), 0),
        (classification, "", "City", ("City", "State"), 0),
        (count, "7 or 8", "7", (), 0.5),
        (count, "17", "7", (), 0),
        (count, "none", "7", (), 0),
        (retrieval, "Paragraph 12", "Paragraph 12", (), 1),
        (retrieval, "段落3，段落4", "段落3", (), 0.5),
        (code_similarity, "# first\n\nx", "", (), 1),
        (code_similarity, "\n# set x\nx = 1\ny = 2", "x = 1", (), 1),
        (code_similarity, "// none", "x", (), 0),
        (code_similarity, "x = 12", "x = 1", (), 0.91),
    ],
)
def test_longbench_scores(score, text, answer, classes, expected):
    assert score(text, answer, classes) == pytest.approx(expected, abs=1e-6)


def test_an_answer_of_another_set_is_named():
    with pytest.raises(ValueError, match="'a king' has no number"):
        retrieval("1", "a king")


@given(st.text("ab é字", max_size=60), st.text("xy", max_size=30), st.integers(2, 80))
def test_the_middle_is_cut_by_tokens(context, question, most):
    tokenizer = byte_tokenizer()
    asked, whole = len(question), len(context.encode())
    if asked > most:
        with pytest.raises(ValueError, match=f"max_length={most} is too short for a question of {asked} tokens"):
            cut_middle(context, question, most, tokenizer)
        return
    cut = cut_middle(context, question, most, tokenizer)
    if whole + asked <= most:
        assert cut == context
    elif context.isascii():
        assert len(cut) + asked in (most, most - 1)
        assert (cut + question)[: most // 2] == (context + question)[: most // 2]
        assert asked > most // 2 or (cut + question)[-(most // 2) :] == (context + question)[-(most // 2) :]


def test_max_length_cuts_the_context_only(tmp_path):
    path = written(tmp_path, [longbench_row()])
    whole, cut = (
        make_task(f"longbench-narrativeqa:path={path}{option}", byte_tokenizer()).example(0)
        for option in ("", ":max_length=1000")
    )
    assert cut.question == whole.question and len(cut.context) + len(cut.question) == 1000
    assert whole.context.startswith(cut.context[:400]) and whole.context.endswith(cut.context[-100:])
    with pytest.raises(ValueError, match="max_length=20 is too short for a question"):
        make_task(f"longbench-narrativeqa:path={path}:max_length=20", byte_tokenizer()).example(0)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "gsm8k:path=nowhere.jsonl",
            None,
            "path='nowhere.jsonl' is no file; give a .jsonl, .json or .parquet of openai",
        ),
        ("gsm8k:path={}", MATH500, "has no question; its columns are problem, solution, answer, level"),
        ("math500:path={}:max_new_tokens=0", MATH500, "max_new_tokens=0 is not possible"),
        ("gsm8k:path={}:problems=0", GSM8K, "problems=0 is not possible; give at least 1"),
        ("gsm8k:path={}:shots=-1", GSM8K, "shots=-1 is not possible; give 0, or more with problems=1"),
        ("gsm8k:path={}:shots=2:problems=2", GSM8K, "shots=2 is not possible; give 0, or more with problems=1"),
        ("gsm8k:path={}:shots=4", GSM8K, "shots=4 is not possible; the set has 4 problems in all"),
        ("math500:path={}:shots=4", MATH500, "has no option 'shots'; options of math500, .*path, max_new_tokens"),
        ("longbench-trec:path={}:max_length=1", [longbench_row()], "max_length=1 is not possible"),
        ("longbench-trec:path={}", AIME, "has no input and no context and no answers"),
        ("longbench-nq", None, "task='longbench-nq' is not there; choose one of .*longbench-trec"),
    ],
)
def test_bad_options_are_named(tmp_path, name, rows, message):
    with pytest.raises(ValueError, match=message):
        make_task(name.format(written(tmp_path, rows) if rows else ""), None)


@pytest.mark.parametrize(
    ("file", "message"), [("a.csv", "ends in none of .jsonl, .json, .parquet"), ("a.jsonl", "cannot be read: ")]
)
def test_files_that_cannot_be_read_are_named(tmp_path, file, message):
    (tmp_path / file).write_text("{neither\nnor")
    with pytest.raises(ValueError, match=message):
        make_task(f"gsm8k:path={tmp_path / file}", None)


def test_without_network_the_error_names_set_and_option(monkeypatch):
    import datasets

    def fail(*arguments, **options):
        raise ConnectionError(f"no route to {arguments} {options}")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"openai/gsm8k could not be loaded .*'main'.*'test'.* gsm8k:path=FILE"):
        make_task("gsm8k", None)
    with pytest.raises(
        ValueError, match=r"LongBench could not be loaded .*'qmsum'.* longbench-qmsum:max_length=100:path=FILE"
    ):
        make_task("longbench-qmsum:max_length=100", None)


@pytest.mark.parametrize("library", ["math_verify", "rouge", "jieba", "rapidfuzz", "datasets"])
def test_a_missing_library_is_named(monkeypatch, library):
    def missing(name):
        if name.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
        return __import__(name)

    monkeypatch.setattr(grading, "import_module", missing)
    calls = {
        "math_verify": lambda: mathematics("1", "1"),
        "rouge": lambda: rouge_l("a", "a"),
        "jieba": lambda: question_f1_chinese("a", "a"),
        "rapidfuzz": lambda: code_similarity("a", "a"),
        "datasets": lambda: make_task("gsm8k", None),
    }
    with pytest.raises(ImportError, match=rf"needs {library}; install it with: pip install 'kara_hf\[evaluate\]'"):
        calls[library]()


def test_all_sets_are_there():
    assert {"gsm8k", "math500", "aime24", "aime25"} <= set(TASKS)
    assert sum(name.startswith("longbench-") for name in TASKS) == 21
