"""What is planned from a config is what the cache then holds."""

import functools
import re
from dataclasses import asdict

import pytest
import torch
from support.architectures import build
from support.marks import slow
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from kara_hf import KaraCache, KaraConfig, KVCompressCache, KVCompressConfig
from kara_hf.cache.plan import plan
from kara_hf.cli.app import app

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 99, "max_position_embeddings": 4096}


@functools.cache
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES), dtype=torch.bfloat16).eval()


@torch.no_grad()
def held(cache, tokens, prompt):
    """The most that reports say behind the prompt's last token but one: tokens of a head, and bytes."""
    ids, found = torch.randint(3, 90, (1, tokens)), []
    model()(ids[:, :prompt], past_key_values=cache)
    for at in range(prompt, tokens):
        model()(ids[:, at : at + 1], past_key_values=cache)
        report = cache.report()
        found.append((float(report.kept.float().mean()), report.nominal_bytes, report.query_bytes))
        found[-1] += (report.resident_bytes, report.full_bytes)
    return [max(column) for column in zip(*found, strict=True)]


KARA = {
    "all": {"retention": 1.0},
    "quarter": {"retention": 0.25},
    "number": {"retention": 0.5, "recent": 20},
    "at least": {"min_cache_tokens": 90},
}
BUDGETS = {"third": {"retention": 0.3}, "tokens": {"retention": None, "max_cache_tokens": 128}}
BITS = pytest.mark.parametrize("bits", [None, 4, slow(8)])


def as_planned(cache, settings, tokens, prompt):
    slots, nominal, of_queries, resident, full = held(cache(model(), **asdict(settings)), tokens, prompt)
    planned = plan(model().config, settings, tokens, prompt=prompt)
    assert planned.full_bytes == full and planned.query_bytes == of_queries
    if cache is KaraCache and (settings.bits is None or settings.retention < 1):
        assert (planned.tokens, planned.nominal_bytes) == (slots, nominal)
        assert planned.resident_bytes == pytest.approx(resident, rel=0.01 if settings.bits is None else 0.15)
        return
    assert planned.tokens - settings.block_size <= slots <= planned.tokens
    assert 0.8 * planned.nominal_bytes <= nominal <= 1.01 * planned.nominal_bytes
    assert 0.85 * planned.resident_bytes <= resident <= 1.05 * planned.resident_bytes


@BITS
@pytest.mark.parametrize("queries", [None, 4])
@pytest.mark.parametrize("how", KARA)
@pytest.mark.parametrize(("tokens", "prompt"), [(300, 150), slow(390, 20), slow(251, 200)])
def test_kara_holds_what_was_planned(tokens, prompt, how, queries, bits):
    as_planned(KaraCache, KaraConfig(window=32, queries=queries, bits=bits, **KARA[how]), tokens, prompt)


@BITS
@pytest.mark.parametrize("how", BUDGETS)
@pytest.mark.parametrize(("tokens", "prompt"), [(300, 150), slow(390, 20), slow(251, 200)])
def test_kv_compress_holds_what_was_planned(tokens, prompt, how, bits):
    as_planned(KVCompressCache, KVCompressConfig(bits=bits, **BUDGETS[how]), tokens, prompt)


def test_layers_of_other_kinds_do_not_count():
    mixed = build("gemma3").config
    full = sum(kind == "full_attention" for kind in mixed.layer_types)
    found = plan(mixed, KaraConfig(retention=1.0), 100, dtype=torch.float32)
    assert full < len(mixed.layer_types)
    assert found.full_bytes == 100 * full * mixed.num_key_value_heads * 2 * mixed.head_dim * 4


def test_what_cannot_be_planned_is_named():
    with pytest.raises(ValueError, match="deepseek_v3.*one latent row.*report"):
        plan(build("deepseek-v3").config, KaraConfig(), 100)
    with pytest.raises(ValueError, match="prompt=101 is not possible: prompt must be from 1 to tokens=100"):
        plan(model().config, KaraConfig(), 100, prompt=101)


def test_the_command_needs_a_config_alone(tmp_path):
    model().config.save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--tokens", "4096", "--batch", "4", "--memory", "8MiB", "--dtype", "float16"]
    shown = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "100"})
    assert shown.exit_code == 0, shown.output
    lines = {re.split(r"\s{2,}", line.strip())[0]: line.split() for line in shown.output.splitlines()}
    full = plan(model().config, KaraConfig(), 4096).full_bytes
    assert lines["full cache"][-4:] == ["16.0", "MiB", "100%", str(2**23 // full)]
    kept = plan(model().config, KaraConfig(retention=0.25, bits=4), 4096, prompt=1024)
    name = "KaraCache(retention=0.25, bits=4)"
    assert lines[name][-1] == str(2**23 // kept.resident_bytes) and f"{kept.tokens:,}" in lines[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "./nowhere"), "model='./nowhere' is no folder"),
        (("--tokens", "9"), "prompt=1024 is not possible"),
        (("--batch", "0"), "batch=0 is not possible"),
        (("--memory", "much"), "memory='much' is not possible"),
        (("--shares", "2"), "retention=2.0 is not possible"),
        (("--bits", "3"), "bits=3 is not possible"),
        (("--dtype", "int8"), "dtype='int8' is not possible"),
        (("--shares", "", "--bits", ""), r"shares=\[\] is not possible"),
    ],
)
def test_mistakes_are_named(arguments, message):
    shown = CliRunner().invoke(app, ["plan", *arguments])
    assert shown.exit_code == 2
    assert re.search(message, shown.output)
