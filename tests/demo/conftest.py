"""What tests of the demo share: the bundled models, loaded once."""

import pytest

pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'kara_hf[demo]'")

from kara_hf.demo.models import Models


@pytest.fixture(scope="session")
def models():
    return Models(device="cpu")
