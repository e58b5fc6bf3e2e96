"""The datasets of LongBench v1 (arXiv 2308.14508): how each asks, how much it lets generate and how it scores.

Scores, room for answers, what is cut off an answer and which prompts go without a chat template are the benchmark's;
the words of the prompts are our own. Two details differ: code is compared by rapidfuzz, where the benchmark's result
depends on which of two libraries is installed, and in classification *every* class that is a part of the right class's
name is forgiven, where the benchmark's loop may skip the second of two neighbours.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ..needs import Package, extra
from .grading import optional

CHINESE_PUNCTUATION = (
    "，。、；：？！“”‘’（）【】《》〈〉「」『』〔〕［"
    "］｛｝〖〗〘〙〚〛｢｣〝〞〟〰〃＂＃＄％＆＇＊＋－／＜＝＞＠＼＾＿｀｜～｟｠｡､‛„‟…‧–—﹏〾〿"
)

Score = Callable[[str, str, Sequence[str]], float]  # text, one right answer, all classes


@dataclass(frozen=True)
class Dataset:
    """One of LongBench's datasets.

    Attributes:
        before: what stands before the context.
        question: what stands behind it, with {input} for the dataset's own question.
        max_new_tokens: room for an answer.
        score: from a text, one of the right answers and the names of all classes to a score in [0, 1].
        chat: whether the benchmark uses a chat template.
        first_line: whether only the first line of an answer counts.
    """

    before: str
    question: str
    max_new_tokens: int
    score: Score
    chat: bool = True
    first_line: bool = False

    @property
    def packages(self) -> tuple[Package, ...]:
        """What its score needs."""
        return PACKAGES.get(self.score, ())

    def best(self, text: str, *, answers: Sequence[str], classes: Sequence[str]) -> float:
        """The text's score for the right answer that suits it best."""
        if self.first_line:
            text = text.lstrip("\n").split("\n")[0]
        return max(self.score(text, answer, classes) for answer in answers)


def question_f1(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words in common, in lower case, without punctuation and articles."""
    return _f1(_words(text), _words(answer))


def question_f1_chinese(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words in common, as jieba finds them, without punctuation."""
    dropped = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)
    cut = [[word.lower().translate(dropped).strip() for word in _cut(part)] for part in (text, answer)]
    return _f1(*([word for word in words if word] for words in cut))


def rouge_l(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F score of ROUGE-L as the rouge package computes it; 0 where it cannot, as for an empty text."""
    try:
        return float(optional("rouge").Rouge().get_scores([text], [answer], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):
        return 0.0


def rouge_l_chinese(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """`rouge_l` of the words that jieba finds."""
    return rouge_l(" ".join(_cut(text)), " ".join(_cut(answer)))


def classification(text: str, answer: str, classes: Sequence[str]) -> float:
    """One over the number of classes named, if the right one is among them; parts of its name do not count."""
    named = [name for name in classes if name in text and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def count(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the text that are the right one."""
    numbers = re.findall(r"\d+", text)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """`count` for the first number of the answer, which is like "Paragraph 7"."""
    number = re.search(r"\d+", answer)
    if number is None:
        raise ValueError(f"answer {answer!r} has no number; the answers of this dataset are like 'Paragraph 7'")
    return count(text, number[0])


def code_similarity(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Similarity of the answer and the text's first line of code, the first without any of ` # //, to a hundredth."""
    lines = (line for line in text.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//")))
    return round(optional("rapidfuzz.fuzz").ratio(next(lines, ""), answer)) / 100


def _words(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _cut(text: str) -> list[str]:
    jieba = optional("jieba")
    jieba.setLogLevel("WARNING")
    return jieba.lcut(text)


def _f1(given: Sequence[str], right: Sequence[str]) -> float:
    common = (Counter(given) & Counter(right)).total()
    return 2 * common / (len(given) + len(right)) if common else 0.0


JIEBA, ROUGE, RAPIDFUZZ = (Package(name, extra("evaluate")) for name in ("jieba", "rouge", "rapidfuzz"))
PACKAGES: dict[Score, tuple[Package, ...]] = {
    question_f1_chinese: (JIEBA,),
    rouge_l: (ROUGE,),
    rouge_l_chinese: (ROUGE, JIEBA),
    code_similarity: (RAPIDFUZZ,),
}

BRIEF = "Reply with nothing but the answer."
STORY = "Reply as briefly as possible, best in a single phrase, and explain nothing."
ARTICLE = (
    "Reply as briefly as possible, in a phrase or one sentence, and explain nothing. If the article does not tell, "
    'reply "unanswerable". If it is a question for yes or no, reply "yes", "no" or "unanswerable".'
)
BRIEF_CHINESE = "只回答答案本身，不要写其他内容。"


def _asked(form: str) -> str:
    return f"\n\n{form}\n\nQuestion: {{input}}\nAnswer:"


_passages = partial(
    Dataset,
    f"Here are some passages and, behind them, a question about them. {BRIEF}\n\nPassages:\n",
    _asked(f"Use the passages above. {BRIEF}"),
    32,
    question_f1,
)
_code = partial(Dataset, "Continue this code.\n", max_new_tokens=64, score=code_similarity, chat=False)

DATASETS = {
    "narrativeqa": Dataset(
        f"Here is a story, a novel or the script of a film, and behind it a question about it. {STORY}\n\nStory: ",
        _asked(f"Use the story above. {STORY}"),
        128,
        question_f1,
    ),
    "qasper": Dataset(
        f"Here is a scientific article and behind it a question about it. {ARTICLE}\n\nArticle: ",
        _asked(f"Use the article above. {ARTICLE}"),
        128,
        question_f1,
    ),
    "multifieldqa_en": Dataset(
        "Here is a text and behind it a question for a short answer.\n\n",
        _asked(f"Use the text above. {BRIEF}"),
        64,
        question_f1,
    ),
    "multifieldqa_zh": Dataset(
        "请阅读下面的文字，并用中文简短作答。\n\n",
        f"\n\n请根据上面的文字回答问题。{BRIEF_CHINESE}\n\n问题：{{input}}\n回答：",
        64,
        question_f1_chinese,
    ),
    "hotpotqa": _passages(),
    "2wikimqa": _passages(),
    "musique": _passages(),
    "dureader": Dataset(
        "请根据给出的文章回答问题。\n\n文章：",
        "\n\n请根据上面的文章作答。\n\n问题：{input}\n回答：",
        128,
        rouge_l_chinese,
    ),
    "gov_report": Dataset(
        "Here is a report of a government agency. Summarize it on one page.\n\nReport:\n",
        "\n\nSummarize the report above on one page.\n\nSummary:",
        512,
        rouge_l,
    ),
    "qmsum": Dataset(
        "Here is the transcript of a meeting and behind it a query about it, to answer in one sentence or a few.\n\n"
        "Transcript:\n",
        "\n\nUse the transcript above and answer the query in one sentence or a few.\n\nQuery: {input}\nAnswer:",
        512,
        rouge_l,
    ),
    "multi_news": Dataset(
        "Here are several pieces of news. Summarize all of them on one page.\n\nNews:\n",
        "\n\nSummarize all of the news above on one page.\n\nSummary:",
        512,
        rouge_l,
    ),
    "vcsum": Dataset(
        "请阅读下面的会议记录，并写一段话总结会议内容。\n\n会议记录：\n", "\n\n会议总结：", 512, rouge_l_chinese
    ),
    "trec": Dataset(
        "Name the type of the last question, as in the examples.\n\n",
        "\n{input}",
        64,
        classification,
        chat=False,
        first_line=True,
    ),
    "triviaqa": Dataset(
        f"Answer the last question by its passage, as in the examples. {BRIEF}\n\n",
        "\n\n{input}",
        32,
        question_f1,
        chat=False,
        first_line=True,
    ),
    "samsum": Dataset(
        "Summarize the last dialogue in a few short sentences, as in the examples.\n\n",
        "\n\n{input}",
        128,
        rouge_l,
        chat=False,
        first_line=True,
    ),
    "lsht": Dataset(
        "请仿照例子，判断最后一条新闻的类别。\n\n", "\n{input}", 64, classification, chat=False, first_line=True
    ),
    "passage_count": Dataset(
        "Here are paragraphs of Wikipedia, some of which may occur more than once. How many different ones are there, "
        "each counted once?\n\n",
        "\n\nReply with the number of different paragraphs and nothing else, like 1, 2 or 3.\n\nThe number is: ",
        32,
        count,
    ),
    "passage_retrieval_en": Dataset(
        "Here are 30 paragraphs of Wikipedia and behind them a summary of one of them. Which one is it of?\n\n",
        '\n\nThe summary:\n\n{input}\n\nReply with the number of its paragraph, like "Paragraph 1" or "Paragraph 2".'
        "\n\nThe answer is: ",
        32,
        retrieval,
    ),
    "passage_retrieval_zh": Dataset(
        "下面有若干段文字，最后是其中一段的摘要。请判断摘要来自哪一段。\n\n",
        "\n\n摘要：\n\n{input}\n\n请回答它所属段落的编号，形式如“段落1”、“段落2”。\n\n答案是：",
        32,
        retrieval,
    ),
    "lcc": _code(question="Next line of code:\n"),
    "repobench-p": _code(question="{input}Next line of code:\n"),
}
