"""Samples of tokens: from files, from problems, and what is refused."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from support.texts import documents, write_texts

from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.probing.data import token_samples, whole_documents
from kara_hf.tasks.reasoner import final_answer, split_of

PROBLEMS = "problems:trace=0.5,fact=0.2,recall=0.3"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BUNDLED_MODEL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("name", ["a.txt", "below/b.md", "c.jsonl", "d.json", "e.parquet", "g.json"])
def test_files_of_every_type_are_joined_with_eos_and_packed(name, folder, tokenizer):
    expected = [token for text in documents(folder / name) for token in [*tokenizer(text)["input_ids"], 1]]
    count = len(expected) // 7
    samples = list(token_samples(folder / name, tokenizer, length=7, count=count, seed=None))
    assert all(sample.dtype == torch.int64 and sample.shape == (7,) for sample in samples)
    assert torch.cat(samples).tolist() == expected[: 7 * count]
    with pytest.raises(
        ValueError, match=rf"too short: its {len(expected)} tokens are {count} samples of 7, and {count + 1}"
    ):
        list(token_samples(folder / name, tokenizer, length=7, count=count + 1, seed=None))
    shuffled = list(token_samples(folder / name, tokenizer, length=7, count=count, seed=3))
    assert len(shuffled) == count


def test_whole_documents_are_cut_and_short_ones_left_out(folder, tokenizer):
    sizes = [len(text.split()) for text in documents(folder / "c.jsonl")]
    least = sorted(sizes)[1]
    expected = [tokenizer(text)["input_ids"] for text in documents(folder / "c.jsonl") if len(text.split()) >= least]
    found = whole_documents(folder / "c.jsonl", tokenizer, length=least, count=4)
    assert [ids.tolist() for ids in found] == [ids[:least] for ids in expected]
    every = whole_documents(folder / "c.jsonl", tokenizer, length=1000, count=5, least=1)
    assert [len(ids) for ids in every] == sizes
    with pytest.raises(ValueError, match=f"its 5 documents 4 have {least} tokens, and 5 are asked for; the longest"):
        whole_documents(folder / "c.jsonl", tokenizer, length=least, count=5)
    with pytest.raises(ValueError, match="text_column='no' is not possible"):
        whole_documents(folder / "c.jsonl", tokenizer, length=least, count=1, text_column="no")


def test_a_folder_is_all_its_files(folder, tokenizer):
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix != ".csv"]
    texts = [text for file in files for text in documents(file)]
    total = sum(len(text.split()) + 1 for text in texts)
    (whole,) = token_samples(folder, tokenizer, length=total, count=1, seed=None)
    assert (whole == 1).sum() == len(texts) and whole[-1] == 1
    other = [next(token_samples(folder, tokenizer, length=total, count=1, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(other[0], other[1]) and not torch.equal(other[0], other[2])
    assert torch.equal(other[0].sort().values, whole.sort().values)  # the same documents in another order


@pytest.mark.parametrize("data", ["files", PROBLEMS])
def test_samples_are_endless_and_a_run_goes_on_where_it_was(data, folder, tokenizer):
    data = folder if data == "files" else data
    length = 100 if data == PROBLEMS else 64
    options = {"length": length, "seed": 5}
    first = list(itertools.islice(token_samples(data, tokenizer, **options), 40))
    for skip in (1, 17, 39):
        assert torch.equal(next(token_samples(data, tokenizer, skip=skip, **options)), first[skip])
    some = list(token_samples(data, tokenizer, skip=2, count=3, **options))
    assert torch.equal(torch.stack(some), torch.stack(first[2:5]))
    assert len({tuple(sample.tolist()) for sample in first}) == 40  # a second pass is in another order
    other = next(token_samples(data, tokenizer, length=length, seed=6))
    assert not torch.equal(other, first[0])


def test_problems_are_those_of_the_evaluation(tokenizer):
    kinds = set()
    for sample in token_samples(PROBLEMS, tokenizer, length=400, count=20):
        assert sample.shape == (400,) and not (sample == tokenizer.unk_token_id).any()
        prompt, completion = tokenizer.decode(sample).split("<eos>")[0].rsplit(" > ", 1)
        assert split_of(f"{prompt} >") == "train" and final_answer(completion)
        assert 150 < len(prompt.split()) + len(completion.split()) + 1 < 400
        kinds.add("recall" if "recall" in prompt else "chain")
    assert kinds == {"recall", "chain"}
    (held_out,) = token_samples("problems:copy=1", tokenizer, length=80, count=1, split="test")
    assert split_of(tokenizer.decode(held_out).split(" > ")[0] + " >") == "test"


def test_a_tokenizer_with_bos_begins_every_sample_with_it(folder):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL, bos_token="<pad>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    samples = list(token_samples(folder / "c.jsonl", tokenizer, length=20, count=4, seed=None))
    assert all(sample[0] == 0 and (sample[1:] != 0).all() for sample in samples)
    plain = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    expected = torch.cat(list(token_samples(folder / "c.jsonl", plain, length=19, count=4, seed=None)))
    assert torch.equal(torch.cat([sample[1:] for sample in samples]), expected)
    assert all(sample[0] == 0 for sample in token_samples(PROBLEMS, tokenizer, length=100, count=2))


def test_samples_that_cannot_be_made_are_refused(folder, tokenizer, tmp_path, monkeypatch):
    def refused(kind, match, data=folder, **options):
        with pytest.raises(kind, match=match):
            list(token_samples(data, tokenizer, **{"length": 16, "count": 1} | options))

    refused(ValueError, "length=1 ", length=1)
    refused(ValueError, "count=0 ", count=0)
    refused(ValueError, "skip=-1 ", skip=-1)
    refused(ValueError, "seed=-1 ", seed=-1)
    refused(ValueError, "split='test' .* files", split="test")
    refused(ValueError, r"text_column='body' .* have the columns text, n", folder / "c.jsonl", text_column="body")
    refused(ValueError, r"text_column='body' .* have the columns text, z", folder / "e.parquet", text_column="body")
    refused(ValueError, "holds int", folder / "c.jsonl", text_column="n")
    refused(FileNotFoundError, "is not there", tmp_path / "nowhere.txt")
    refused(FileNotFoundError, "is not there", "./nowhere")
    refused(FileNotFoundError, "has no file of text", tmp_path)
    refused(ValueError, "too short: its 0 tokens", empty(tmp_path, "empty.jsonl", ""), count=None)
    refused(ValueError, "is not JSON", empty(tmp_path, "broken.jsonl", "{"))
    refused(ValueError, "has int where", empty(tmp_path, "numbers.json", "[1, 2]"))
    refused(ValueError, "write problems:TASK=WEIGHT", "problems:sums=1")
    refused(ValueError, "write problems:TASK=WEIGHT", "problems:trace")
    refused(ValueError, "write problems:TASK=WEIGHT", "problems:trace=0")
    refused(ValueError, "write problems:TASK=WEIGHT", "problems:")
    refused(ValueError, "length=64 .* more than 72 for 'trace'", "problems:trace=1", length=64)
    refused(ValueError, "split='validation'", "problems:copy=1", length=80, split="validation")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(ImportError, r"pip install 'kara_hf\[train\]'")
    assert next(token_samples("problems:copy=1", tokenizer, length=80)).shape == (80,)
    monkeypatch.setattr(type(tokenizer), "eos_token_id", None, raising=False)
    refused(ValueError, "no EOS token")


def empty(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name
