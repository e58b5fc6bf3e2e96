"""The proxy that docs/serving.md shows: nothing passes without its key, and everything with it."""

import asyncio
import re
from pathlib import Path

import pytest

httpx, fastapi = pytest.importorskip("httpx"), pytest.importorskip("fastapi")
PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


@pytest.fixture
def proxy(monkeypatch):
    """A client of the proxy, and what came through to a server that counts to three."""
    upstream, seen = fastapi.FastAPI(), []

    @upstream.post("/v1/completions")
    async def complete(request: fastapi.Request):
        seen.append((await request.json(), dict(request.query_params), request.headers.get("x-request-id")))
        pieces = (f"data: {number}\n\n" for number in range(3))
        return fastapi.responses.StreamingResponse(pieces, 418, media_type="text/event-stream")

    (code,) = re.findall(r"```python\n(import hmac.*?)```", PAGE, flags=re.S)
    assert len(code.splitlines()) <= 14
    monkeypatch.setenv("KEY", "schlüssel")
    names = {}
    exec(compile(code, "docs/serving.md", "exec"), names)
    names["server"] = httpx.AsyncClient(transport=httpx.ASGITransport(upstream), base_url="http://upstream")
    return names["app"], seen


def ask(app, **headers):
    async def asked():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
            sent = {name.replace("_", "-"): value.encode() for name, value in headers.items()}
            return await client.post("/v1/completions?n=1", json={"prompt": "a"}, headers=sent)

    return asyncio.run(asked())


def test_with_the_key_everything_passes(proxy):
    app, seen = proxy
    answer = ask(app, authorization="Bearer schlüssel", x_request_id="7")
    assert (answer.status_code, answer.text) == (418, "data: 0\n\ndata: 1\n\ndata: 2\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert seen == [({"prompt": "a"}, {"n": "1"}, "7")]


@pytest.mark.parametrize(
    "given", [{}, {"authorization": ""}, {"authorization": "Bearer "}, {"authorization": "schlüssel"}]
)
def test_without_it_nothing_does(proxy, given):
    app, seen = proxy
    assert ask(app, **given).status_code == 401 and not seen
