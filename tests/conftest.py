"""What every test runs under: one thread, fixed seeds, quiet libraries and uninitialised memory that shows."""

import gc
import os
import shutil
import sys
from types import SimpleNamespace

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks for anything, and one that did would wait for long

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
for name, most in (("few", 10), ("thorough", 40)):  # `make test-all` draws again, thoroughly
    settings.register_profile(name, deadline=None, max_examples=most, derandomize="CI" in os.environ)
settings.load_profile("few")


def _values(item):
    """What the parameters of a test are in one of its combinations; those given together are one."""
    given, together = item.callspec.params, []
    for marker in item.iter_markers("parametrize"):
        names = marker.args[0].split(",") if isinstance(marker.args[0], str) else marker.args[0]
        together.append([name.strip() for name in names])
    named = {name for names in together for name in names}
    together += [[name] for name in given.keys() - named]
    return {(*names, *(id(given[name]) for name in names)) for names in together}


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items):
    """Of the combinations of a test's parameters, as many as show every value once; the others are slow."""
    tests = {}
    for item in items:
        if hasattr(item, "callspec") and not item.get_closest_marker("slow"):
            tests.setdefault((item.parent.nodeid, item.originalname), {})[item] = _values(item)
    for left in tests.values():
        missing = set.union(*left.values())
        while missing:
            best = max(left, key=lambda item: len(missing & left[item]))
            missing -= left.pop(best)
        for item in left:
            item.add_marker(pytest.mark.slow)


def _poisoned(allocate):
    """`allocate`, with every floating-point element NaN, so that a place nobody wrote is found at once."""

    def allocate_nan(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

    return allocate_nan


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory():
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


@pytest.fixture(autouse=True, scope="module")
def little_to_collect():
    """What is loaded by now is never garbage: the collector need not look at it again, which engines call often."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeds():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def precision_forgotten():
    """accelerate keeps the first precision that a process used; the next test may want another."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def quanto(monkeypatch):
    """Quanto without its code in C++, which it would compile for a minute when it is first used."""
    from optimum.quanto.library.extensions.cpp import ext

    def unpack(packed, bits):
        return torch.cat([packed >> place & 2**bits - 1 for place in range(0, 8, bits)])

    monkeypatch.setattr(ext, "_lib", SimpleNamespace(unpack=unpack))


@pytest.fixture
def compiler():
    """`torch.compile` that knows nothing of what others compiled, and is forgotten afterwards."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")  # while it is open, its thread has an event loop
def browser():
    """A headless Chromium, driven by playwright."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'kara_hf[test]'")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium here; on Debian: apt install chromium")
    with api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()
