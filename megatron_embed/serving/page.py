"""The page at `/`: its files, and what it asks about models and texts beside the public API, which it searches with.

Nothing of it comes from another host, and no text is read as HTML: the Content-Security-Policy allows this server's own
scripts and styles alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from megatron_embed.names import Role
from megatron_embed.serving.errors import RequestError
from megatron_embed.serving.models import ServedEmbedder, ServedModels
from megatron_embed.serving.openai_routes import Text
from megatron_embed.serving.page_corpus import PageCorpus

_STATIC = Path(__file__).resolve().parent / "static"
_TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8",
          ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
PAGE_FILES = {path.name: path for path in sorted(_STATIC.iterdir()) if path.suffix in _TYPES}
"""The page's files by name."""
PUBLIC_PAGE_PATHS = frozenset({"/", *(f"/page/{name}" for name in PAGE_FILES)})
"""Paths that need no API key: nothing of models and texts is in these files."""
TEXTS_AT_ONCE = 64
"""Texts of the server's corpus that are embedded, and sent to the page, together."""


class TokensRequest(BaseModel):
    """A text whose tokens are counted."""

    model_config = ConfigDict(strict=True)

    text: Annotated[Text, Field(max_length=1 << 20)]
    model: str | None = None
    role: Role = "document"


def page_router(models: ServedModels, corpus: PageCorpus | None = None) -> APIRouter:
    """The routes of the page. `corpus`: texts that it searches at first; None: its example."""
    router = APIRouter(include_in_schema=False)
    for name, path in PAGE_FILES.items():
        router.add_api_route("/" if name == "index.html" else f"/page/{name}",
                             _answer(path.read_bytes(), _TYPES[path.suffix]))

    @router.get("/page/info")
    async def info() -> dict[str, Any]:
        about = None if corpus is None else {"name": corpus.name, "count": len(corpus.texts)}
        return {"models": [_described(model) if isinstance(model, ServedEmbedder)
                           else {"id": model.name, "kind": model.kind} for model in models.all], "corpus": about}

    @router.post("/page/tokens")
    def tokens(request: TokensRequest) -> dict[str, int]:
        count, most = models.embedder(request.model).count_tokens(request.text, request.role)
        return {"tokens": count, "max_length": most}

    @router.get("/page/corpus")
    async def texts() -> dict[str, Any]:
        given = _required(corpus)
        return {"rows": [{"id": name, "text": text} for name, text in zip(given.ids, given.texts, strict=True)]}

    @router.get("/page/vectors")
    async def vectors(model: str, start: Annotated[int, Field(ge=0)]) -> Response:
        given, embedder = _required(corpus), models.embedder(model)
        if start >= len(given.texts):
            raise RequestError(422, f"start = {start}: the corpus has {len(given.texts)} texts", code="invalid_request")
        rows = await _vectors(models, embedder, given, start)
        return Response(rows.astype("<f4").tobytes(), media_type="application/octet-stream")

    return router


def _answer(content: bytes, media_type: str) -> Callable[[], Response]:
    def answer() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return answer


def _described(model: ServedEmbedder) -> dict[str, Any]:
    return {"id": model.name, "kind": model.kind, "dim": model.dim, "similarity": model.similarity}


def _required(corpus: PageCorpus | None) -> PageCorpus:
    if corpus is None:
        raise RequestError(404, "the server was started without --corpus", code="no_corpus")
    return corpus


async def _vectors(models: ServedModels, model: ServedEmbedder, corpus: PageCorpus, start: int) -> np.ndarray:
    """[up to TEXTS_AT_ONCE, dim] float32 of the corpus from `start`; computed at the first request, then kept."""
    key = (model.name, start)
    if key not in corpus.vectors:
        part = corpus.texts[start:start + TEXTS_AT_ONCE]
        corpus.vectors[key] = (await model.encode(models.queue, part, "document")).vectors
    return corpus.vectors[key]
