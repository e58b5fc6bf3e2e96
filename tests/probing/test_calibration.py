"""A score fitted to a model: what it is fitted to, the fit, the file, what a cache keeps by it, and its command."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.architectures import build
from support.batches import ids, left_padded
from support.marks import most_examples
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from typer.testing import CliRunner

from kara_hf import KaraCache, KeyCalibration, attach, calibrate, detach
from kara_hf.bundled import BUNDLED_CALIBRATION, BUNDLED_MODEL
from kara_hf.cli.app import app
from kara_hf.cli.calibrate import BUNDLED
from kara_hf.config import KaraConfig
from kara_hf.integration.attach import is_attached
from kara_hf.integration.generation import for_forward, for_generate
from kara_hf.policy import KaraPolicy
from kara_hf.policy.calibrated import FILE, predict
from kara_hf.probing import calibrate as fit
from kara_hf.probing.attention import Recorder
from kara_hf.probing.calibrate import QuadraticFit, future_shares
from kara_hf.serving import ServingConfig, kara_continuous_batching
from kara_hf.serving.seams import check_version
from kara_hf.tasks import reasoner_tasks  # noqa: F401  registers them
from kara_hf.tasks.task import make_task

WINDOWS = {"window": 8, "recent": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the llama in miniature."""
    folder = tmp_path_factory.mktemp("calibration")
    calibrate(build("llama"), [ids(96, seed) for seed in range(8)], rank=6, **WINDOWS).save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------------------------- what it is fitted to
@pytest.mark.parametrize("name", ["llama", "qwen3", "deepseek-v3"])
def test_shares_are_those_of_the_models_own_attention(name):
    model, tokens = build(name), 31
    sample = ids(tokens)
    recorder = Recorder({0, 1, 2}, queries=2**31)
    with recorder.watching(model):
        seen = recorder.run(model, sample)
    detach(model)
    model.set_attn_implementation("eager")
    weights = model(sample[None], output_attentions=True, use_cache=False).attentions
    for layer, found in zip(range(3), seen, strict=True):
        got = future_shares(found, **WINDOWS)
        heads = found.key.shape[0]
        assert got.shape == (heads, 24)  # the third window has 31 - 24 - 3 queries behind it
        for head, j in itertools.product(range(heads), range(24)):
            first, seal = j // 8 * 8, (j // 8 + 1) * 8 + 3
            own = weights[layer][0].unflatten(0, (heads, -1))[head, :, seal:]
            wanted = own[..., j].sum() / own[..., first : first + 8].sum()
            torch.testing.assert_close(got[head, j], wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got.unflatten(1, (3, 8)).sum(2), torch.ones(heads, 3))


def test_shares_do_not_depend_on_how_many_queries_lie_in_memory(monkeypatch):
    model = build("llama")
    recorder = Recorder({0}, queries=2**31)
    with recorder.watching(model):
        (seen,) = recorder.run(model, ids(50))
    whole = future_shares(seen, **WINDOWS)
    for chunk in (1, 7, 50):
        monkeypatch.setattr(fit, "QUERY_CHUNK", chunk)
        torch.testing.assert_close(future_shares(seen, **WINDOWS), whole)


# ------------------------------------------------------------------------------------------------------------- the fit
@most_examples(20)
@given(
    seed=st.integers(0, 999),
    size=st.integers(1, 5),
    heads=st.integers(1, 3),
    cuts=st.lists(st.integers(1, 199), max_size=4, unique=True),
)
def test_any_quadratic_is_found_again(seed, size, heads, cuts):
    """Exactly, whatever the parts in which its keys come."""
    rng = torch.Generator().manual_seed(seed)
    keys = torch.randn(heads, 200, size, generator=rng) * 3 + 1
    form = torch.randn(heads, size, size, generator=rng)
    line = torch.randn(heads, 1, size, generator=rng)
    targets = ((keys @ form + line) * keys).sum(2) + 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "RIDGE", 1e-10)
        patch.setattr(fit, "FIRST_TOKENS", 40)
        fitted = QuadraticFit(rank=size)
        for first, last in itertools.pairwise([0, *sorted(cuts), 200]):
            fitted.add(keys[:, first:last], targets[:, first:last])
        found = fitted.solve()
    scale = targets.std()
    torch.testing.assert_close(predict(keys, **found) / scale, targets / scale, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(found["quadratic"], found["quadratic"].mT)


def test_few_directions_are_those_of_most_variance():
    keys = torch.randn(1, 500, 6) * torch.tensor([9.0, 1e-3, 7.0, 1e-3, 1e-3, 1e-3])
    targets = keys[..., 0] * keys[..., 2]
    fitted = QuadraticFit(rank=2)
    fitted.add(keys, targets)
    found = fitted.solve()
    assert found["basis"].shape == (1, 6, 2)
    assert torch.corrcoef(torch.cat([predict(keys, **found), targets]))[0, 1] > 0.999


# ------------------------------------------------------------------------------------------------------ what is kept
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "deepseek-v3"])
def test_a_cache_keeps_what_the_quadratic_ranks_highest(name, tmp_path):
    model = build(name)
    calibrate(model, [ids(96, seed) for seed in range(6)], rank=4, **WINDOWS).save_pretrained(tmp_path)
    calibration = KeyCalibration.from_pretrained(tmp_path)
    sample, dense = ids(40, seed=99)[None], {}
    recorder = Recorder(set(calibration.layers), queries=1)
    with recorder.watching(model):
        for layer, seen in zip(sorted(calibration.layers), recorder.run(model, sample[0]), strict=True):
            dense[layer] = predict(seen.key, **calibration.layers[layer])
    settings = {"retention": 0.25, "block_size": 4, "compress_prompt": True, "sinks": 0, **WINDOWS}
    cache = KaraCache(model, score=tmp_path, **settings)
    plain = KaraCache(model, score="key-difference", **settings)
    with torch.no_grad():
        model(sample, **for_forward(model, cache))
        model(sample, **for_forward(model, plain))
    assert cache.report().resident_bytes == plain.report().resident_bytes  # nothing is held but keys and values
    for layer, scores in dense.items():
        rows = cache.layers[layer].stored().lengths.shape[1]
        scores = scores.unflatten(0, (rows, -1)).mean(1)
        for head in range(rows):
            wanted = []
            for first in range(0, 32, 8):  # the fifth window would need 3 tokens more
                wanted += sorted((scores[head, first : first + 8].topk(2).indices + first).tolist())
            assert cache.kept_positions(layer, head=head).tolist() == [*wanted, *range(32, 40)]


def test_batches_keep_what_single_runs_keep(folder):
    model = build("llama")
    settings = {"retention": 0.5, "block_size": 4, "score": folder, **WINDOWS}
    texts = [ids(5, 1), ids(9, 2), ids(13, 3)]
    inputs = left_padded(texts)
    cache = KaraCache(model, **settings)
    out = model.generate(**inputs, **for_generate(cache), max_new_tokens=40, do_sample=False)
    for row, text in enumerate(texts):
        alone = KaraCache(model, **settings)
        single = model.generate(text[None], **for_generate(alone), max_new_tokens=40, do_sample=False)
        assert out[row, -40:].tolist() == single[0, -40:].tolist()
        for layer, head in itertools.product(range(3), range(2)):
            assert torch.equal(cache.kept_positions(layer, row, head), alone.kept_positions(layer, 0, head))


def test_where_everything_is_kept_it_changes_nothing(folder):
    model = build("llama")
    cache = KaraCache(model, retention=1.0, score=folder, block_size=4, **WINDOWS)
    out = model.generate(ids(9)[None], **for_generate(cache), max_new_tokens=40, do_sample=False)
    detach(model)
    wanted = model.generate(
        ids(9)[None], **for_generate(DynamicCache(config=model.config)), max_new_tokens=40, do_sample=False
    )
    assert out.tolist() == wanted.tolist()


# ------------------------------------------------------------------------------------------------------------ the file
def test_what_is_saved_is_read_again(folder, monkeypatch):
    found = KeyCalibration.from_pretrained(folder)
    assert sorted(found.layers) == [0, 1, 2]
    shapes = {name: tuple(tensor.shape) for name, tensor in found.layers[1].items()}
    assert shapes == {"mean": (2, 16), "basis": (2, 16, 6), "quadratic": (2, 6, 6), "linear": (2, 6), "constant": (2,)}
    assert found.model["num_hidden_layers"] == 3
    assert found.origin["samples"] == 8 and found.origin["tokens"] == 768 and found.origin["window"] == 8
    assert KeyCalibration.from_pretrained(folder / FILE).origin == found.origin
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file, **hub: folder / file)
    assert KaraPolicy(KaraConfig(score="me/calibrated")).calibration.origin == found.origin
    config = KaraConfig.from_json(KaraConfig(score=str(folder)).to_json())
    assert KaraPolicy(config).calibration.origin == found.origin


def test_uploads_go_to_the_named_repository(folder, tmp_path, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, repo_id, **options):
            calls.append((repo_id, options))

        def upload_file(self, **options):
            calls.append(options)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    calibration = KeyCalibration.from_pretrained(folder)
    calibration.push_to_hub("me/calibrated", token="secret", private=True)
    (tmp_path / FILE).write_bytes(calls[2].pop("path_or_fileobj"))
    uploaded = {"path_in_repo": FILE, "repo_id": "me/calibrated"}
    assert calls == ["secret", ("me/calibrated", {"private": True, "exist_ok": True}), uploaded]
    again = KeyCalibration.from_pretrained(tmp_path)
    assert again.origin == calibration.origin
    torch.testing.assert_close(again.layers, calibration.layers, atol=0, rtol=0)


# ----------------------------------------------------------------------------------------------------------- bad input
def test_files_that_do_not_fit_are_refused_before_anything_is_done(folder, tmp_path):
    small = build("llama")
    with pytest.raises(ValueError, match="score='norm' is not possible.*one of bidirectional.*key calibration"):
        KaraCache(small, score="norm")
    with pytest.raises(ValueError, match="score=3 is not possible"):
        KaraCache(small, score=3)
    with pytest.raises(FileNotFoundError, match="there is no .*nowhere.*kara-hf calibrate"):
        KaraCache(small, score="/nowhere/at/all")
    with pytest.raises(FileNotFoundError, match=f"there is no .*{FILE}"):
        KaraCache(small, score=tmp_path)
    save_file({"0.mean": torch.zeros(1)}, tmp_path / FILE, {"format": "9"})
    with pytest.raises(ValueError, match="has format '9', and this version of kara_hf reads 1"):
        KaraCache(small, score=tmp_path)
    other = build("qwen3")
    with pytest.raises(ValueError, match="another model: model_type llama instead of qwen3;.*kara-hf calibrate"):
        KaraCache(other, score=folder)
    assert not is_attached(other) and not is_attached(small)
    small._tp_size = 2
    with pytest.raises(ValueError, match="tensor parallelism .tp_size=2. each process has some"):
        KaraCache(small, score=folder)
    found = KeyCalibration.from_pretrained(folder)
    del found.layers[1]
    with pytest.raises(ValueError, match=r"nothing about layers \[1\]"):
        found.check(found.model, {0, 1, 2})


def test_serving_refuses_the_calibration_of_another_model(folder):
    try:
        check_version()
    except ImportError as error:
        pytest.skip(str(error))
    model = build("qwen3")
    config = ServingConfig.of(score=str(folder), window=8, recent=3)
    with kara_continuous_batching(model, config):
        with pytest.raises(ValueError, match="another model"):
            model.generate_batch([ids(9).tolist()])


def test_what_cannot_be_calibrated_is_refused():
    model = build("llama").train()
    attach(model)
    for name, value in (("window", 1), ("recent", -1), ("rank", 0)):
        with pytest.raises(ValueError, match=f"{name}={value} is not possible"):
            calibrate(model, [ids(40)], **{name: value})
    with pytest.raises(ValueError, match=r"sample 1 must be token ids \[N\] int64, at least 12 .*got \[11\]"):
        calibrate(model, [ids(40), ids(11)], **WINDOWS)
    with pytest.raises(ValueError, match=r"got \[1, 40\]"):
        calibrate(model, [ids(40)[None]], **WINDOWS)
    with pytest.raises(ValueError, match="no sample"):
        calibrate(model, [])
    with pytest.raises(
        ValueError, match="have 32 tokens in whole windows, and 152 coefficients.*more samples or a lower"
    ):
        calibrate(model, [ids(40)], **WINDOWS)
    with pytest.raises(TypeError, match="expected a Transformers model"):
        calibrate(torch.nn.Linear(2, 2), [ids(40)])
    with pytest.raises(ValueError, match="computes its attention itself"):
        calibrate(build("falcon-new"), [ids(40)])
    with pytest.raises(ValueError, match="no full-attention layer"):
        calibrate(build("mistral-sliding"), [ids(40)])
    assert model.training and is_attached(model)
    torch.nn.init.constant_(model.model.layers[0].self_attn.k_proj.weight, torch.inf)
    with pytest.raises(ValueError, match="keys have NaN"):
        calibrate(model, [ids(96, seed) for seed in range(8)], rank=4, **WINDOWS)


# -------------------------------------------------------------------------------------------- the bundled calibration
def test_the_bundled_one_knows_what_will_be_looked_at():
    """On problems that it was not made from: more of the attention to come than by the norm of keys, or by chance."""
    calibration = KeyCalibration.from_pretrained(BUNDLED_CALIBRATION)
    made = {"split": "train", "seed": 0, "tokens": BUNDLED["samples"] * BUNDLED["length"]}  # as the command makes it
    assert (
        calibration.origin.items() >= (made | {name: BUNDLED[name] for name in ("data", "samples", "window")}).items()
    )
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    task = make_task("trace:generated=300", tokenizer)
    recorder = Recorder(set(calibration.layers), queries=2**31)
    caught = {"calibrated": 0.0, "norm": 0.0, "chance": 0.0}
    with recorder.watching(model):
        for number in range(8):
            example = task.example(number)
            text = f"{example.context}{example.question} {example.reference}"
            for layer, seen in enumerate(recorder.run(model, tokenizer(text, return_tensors="pt").input_ids[0])):
                shares = future_shares(seen, window=64, recent=32).unflatten(1, (-1, 64))
                keys = seen.key[:, : shares.shape[1] * 64]
                scores = {
                    "calibrated": predict(keys, **calibration.layers[layer]),
                    "norm": keys.norm(dim=2),
                    "chance": torch.rand(keys.shape[:2], generator=torch.Generator().manual_seed(0)),
                }
                for name, score in scores.items():
                    best = score.unflatten(1, (-1, 64)).topk(8, 2).indices
                    caught[name] += float(shares.gather(2, best).sum(2).mean())
    assert caught["calibrated"] > 1.1 * caught["norm"] > 1.5 * caught["chance"]


# --------------------------------------------------------------------------------------------------------- the command
def run(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return found.exit_code, found.output


def test_the_command_writes_what_other_commands_use(tmp_path):
    code, output = run("calibrate", "--out", tmp_path / "c", "--samples", 6, "--length", 256, "--rank", 8)
    assert (code, output) == (0, f"written to {tmp_path / 'c'}\n")
    origin = KeyCalibration.from_pretrained(tmp_path / "c").origin
    assert origin["data"].startswith("problems:") and (origin["samples"], origin["tokens"]) == (6, 1536)
    code, output = run("generate", "--cache", "kara", "--score", tmp_path / "c", "--max-new-tokens", 100)
    assert code == 0 and str(tmp_path / "c") in output.replace("\n", "")
    task = ["--tasks", "trace:generated=80", "--n", 1, "--budgets", 0.5, "--out", tmp_path / "results"]
    code, output = run("evaluate", *task, "--methods", "calibrated", "--calibration", tmp_path / "c")
    assert code == 0, output
    (found,) = (tmp_path / "results").rglob("calibrated@*.jsonl")
    assert str(tmp_path) not in found.read_text().replace(" ".join(map(str, task)), "").split('"command"')[0]


def test_the_command_refuses_what_is_not_possible(tmp_path):
    code, output = run("calibrate", "--out", tmp_path, "--data", "text.txt")
    assert code == 2 and "data='text.txt' is not possible: data must be problems:" in output
    code, output = run("calibrate", "--out", tmp_path, "--model", "some/model")
    assert code == 2 and "given with --model: --model some/model --data TEXT" in output
    code, output = run("evaluate", "--methods", "calibrated", "--calibration", "/nowhere", "--out", tmp_path)
    assert code == 2 and "there is no /nowhere; make one with `kara-hf calibrate`" in output
    code, output = run("calibrate", "--out", tmp_path, "--samples", 0)
    assert code == 2 and "samples=0" in output
    code, output = run("calibrate", "--out", tmp_path, "--data", "problems:trace=1", "--samples", 1, "--length", 90)
    assert code == 2 and "at least 97" in output
    assert not list(tmp_path.iterdir())
