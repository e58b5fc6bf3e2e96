"""`kara-hf compress` and `kara-hf generate --from`: a text is read once, and asked about from a file."""

import pytest
import torch
from typer.testing import CliRunner

from kara_hf import CompressedCache, KaraCache, KVCompressCache
from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.cli import app as cli
from kara_hf.integration.generation import generate, greedy
from kara_hf.integration.loading import LoadedModel
from kara_hf.tasks.reasoner import make_problem


def invoke(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], env={"NO_COLOR": "1"})


@pytest.fixture(scope="module")
def loaded():
    return LoadedModel(str(BUNDLED_MODEL), device="cpu")


@pytest.fixture
def problem(tmp_path):
    """Two parts of a problem: a text in a file, and a question."""
    text, sign, question = make_problem(task="fact", split="test", generated=100, seed=1).prompt.partition("?")
    (tmp_path / "book.txt").write_text(text)
    return tmp_path / "book.txt", f"{sign}{question}"


@pytest.mark.parametrize(
    ("options", "make"),
    [
        (["--max-cache-tokens", 96], lambda model: KVCompressCache(model, max_cache_tokens=96)),
        (
            ["--max-cache-tokens", 96, "--prefill-chunk", 40],
            lambda model: KVCompressCache(model, max_cache_tokens=96, prefill_chunk=40),
        ),
        (["--cache", "kara", "--retention", 0.5], lambda model: KaraCache(model, retention=0.5, compress_prompt=True)),
    ],
    ids=["kv-compress", "chunks", "kara"],
)
def test_what_is_asked_from_a_file_is_answered_as_from_memory(options, make, loaded, problem, tmp_path):
    file, question = problem
    out = tmp_path / "book.safetensors"
    made = invoke("compress", "--file", file, "--out", out, "--device", "cpu", *options)
    assert made.exit_code == 0, made.output
    cache = make(loaded.model)
    text, asked = loaded.encode_text(file.read_text(), chat=True), loaded.encode_question(question, chat=True)
    cache.read(text)
    cache.compress()
    assert f"{type(cache).__name__} of {text.shape[1]} tokens" in made.stdout and f"written to {out}" in made.stdout
    saved = CompressedCache.load(out, loaded.model).report()
    assert saved.kept.tolist() == cache.report().kept.tolist() and saved.kept.max() <= text.shape[1]

    answered = invoke("generate", question, "--from", out, "--max-new-tokens", 12, "--device", "cpu")
    assert answered.exit_code == 0, answered.output
    ids = torch.cat([text, asked], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tokens = generate(loaded.model, cache, greedy(loaded.model, loaded.tokenizer, max_new_tokens=12), **inputs)
    assert (
        answered.stdout.strip() == loaded.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True).strip()
    )


def test_a_text_and_a_question_make_up_one_message(loaded, monkeypatch):
    for template in (None, "{% for m in messages %}ba : {{ m['content'] }} >{% endfor %}{% if 1 %} ce{% endif %}"):
        monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
        parts = [loaded.encode_text("ba : 3 ;\n", chat=True), loaded.encode_question(" ? ba ba", chat=True)]
        assert torch.cat(parts, 1).tolist() == loaded.encode("ba : 3 ;\n\n? ba ba", chat=True).tolist()


def test_mistakes_end_in_one_line(problem, tmp_path):
    file, question = problem
    out = tmp_path / "book.safetensors"
    assert "cache='full' is not possible" in invoke("compress", "--file", file, "--out", out, "--cache", "full").stderr
    assert "nowhere.txt" in invoke("compress", "--file", tmp_path / "nowhere.txt", "--out", out).stderr
    assert (
        "leave out what says others (cache, retention)"
        in invoke("generate", question, "--from", out, "--retention", 0.5).stderr
    )
    assert "needs a PROMPT" in invoke("generate", "--from", out).stderr
    assert "book.safetensors" in invoke("generate", question, "--from", out).stderr
