"""Transformers' own OpenAI-compatible server, with Kara in its continuous batching."""

from typing import Any

from ..config import require
from ..needs import extra
from .config import ServingConfig
from .seams import check_version


def run_server(
    config: ServingConfig, *, page: int, num_blocks: int | None, max_batch_tokens: int | None, **options: Any
) -> None:
    """Serves until it is told to stop by a signal.

    Args:
        config: the settings.
        page: tokens in a block.
        num_blocks: blocks in the pool, or None for what the engine finds room for.
        max_batch_tokens: tokens in a step at most, or None.
        options: of Transformers' `Serve`; `force_model` is the one model that is served.

    Raises:
        ImportError: the server needs packages that are not there, or Transformers is too old.
    """
    from transformers.utils.import_utils import is_serve_available

    check_version()
    if not is_serve_available():
        raise ImportError(f"serving needs packages that are not installed; run: {extra('serve')}")
    from transformers.cli.serve import Serve
    from transformers.cli.serving import server, utils

    from .gate import checked_manager
    from .session import serving_models

    build, manager = server.build_server, utils.CBGenerateManager

    with serving_models(config) as serving:
        server.build_server = lambda *args, **kwargs: _extended(build(*args, **kwargs), args[0], serving)
        utils.CBGenerateManager = checked_manager(serving)
        try:
            Serve(
                continuous_batching=True,
                cb_block_size=page,
                cb_num_blocks=num_blocks,
                cb_max_batch_tokens=max_batch_tokens,
                **options,
            )
        finally:
            server.build_server, utils.CBGenerateManager = build, manager


def _extended(app: Any, models: Any, serving: Any) -> Any:
    """The server's app with a gate before it, with metrics, and with reasons in OpenAI's form."""
    from fastapi import HTTPException
    from fastapi.responses import JSONResponse, PlainTextResponse
    from transformers.cli.serving.utils import Modality

    from .gate import Gate

    async def refused(_: Any, error: HTTPException) -> Any:
        reason = {"message": str(error.detail), "type": "invalid_request_error", "code": error.status_code}
        return JSONResponse({"error": reason}, status_code=error.status_code)

    loaded = next(iter(models.loaded_models.values()))
    text_only = models.get_model_modality(loaded.model, processor=loaded.processor) == Modality.LLM
    app.add_exception_handler(HTTPException, refused)
    app.add_middleware(Gate, model=models.force_model, text_only=text_only)
    app.get("/metrics")(lambda: PlainTextResponse(serving.metrics.to_prometheus()))
    return app


def count_blocks(name: str, nbytes: int, page: int, dtype: str, trust_remote_code: bool) -> int:
    """Whole-model blocks of `page` tokens that `nbytes` hold for the model of that name, beside two for padding.

    Raises ValueError below 1.
    """
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code).get_text_config()
    kind = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    block = config.num_hidden_layers * 2 * heads * size * kind.itemsize * page
    expected = f"at least {3 * block} bytes, three blocks of {page} tokens of this model, two of them for padding"
    require(nbytes >= 3 * block, "memory", nbytes, expected)
    return nbytes // block - 2
