"""The page at `/`: its files, and what it asks about models and texts; it searches through the public API.

Nothing of it comes from another host, and no text of others is read as HTML: the Content-Security-Policy allows this
server's own scripts and styles alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from megatron_embed.names import Role, Similarity

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
LONGEST_TEXT = 1 << 20
"""Characters of a text whose tokens are counted."""


@dataclass(frozen=True, kw_only=True)
class PageModel:
    """What the page knows about a served model."""

    id: str
    kind: Literal["embedder", "reranker"]
    dim: int = 0
    """Components of a vector; of an embedding model alone, as all that follows."""
    similarity: Similarity = "cosine"
    max_lengths: dict[Role, int] = field(default_factory=dict)
    """Longest text of a role in tokens; what is longer is cut off."""
    count_tokens: Callable[[str, Role], int] | None = None
    """Tokens of a whole text with its prompt, as if nothing were cut off."""

    def described(self) -> dict[str, Any]:
        """What the page is told."""
        described = {"id": self.id, "kind": self.kind}
        return described if self.kind == "reranker" else {**described, "dim": self.dim, "similarity": self.similarity}


@dataclass(frozen=True, kw_only=True)
class PageCorpus:
    """Texts that the server was started with."""

    name: str
    ids: Sequence[str]
    texts: Sequence[str]


class TokensRequest(BaseModel):
    """A text whose tokens are counted."""

    model_config = ConfigDict(extra="forbid")

    model: str
    text: str = Field(max_length=LONGEST_TEXT)
    role: Role = "document"


def page_router(models: Sequence[PageModel], corpus: PageCorpus | None = None, *,
                check_key: Callable[..., Any] | None = None) -> APIRouter:
    """Routes of the page.

    Args:
        models: what is served, in the order in which the page offers it.
        check_key: dependency of the routes that tell about models and texts; the files of the page need no key.
    """
    router = APIRouter(include_in_schema=False)
    for name, (content, media_type) in _page_files().items():
        router.add_api_route("/" if name == "index.html" else f"/page/{name}", _answer(content, media_type))
    router.include_router(_data_router(models, corpus), prefix="/page",
                          dependencies=[] if check_key is None else [Depends(check_key)])
    return router


def _page_files() -> dict[str, tuple[bytes, str]]:
    """Content and type of every file by its name."""
    return {path.name: (path.read_bytes(), _TYPES[path.suffix]) for path in sorted(_STATIC.iterdir())}


def _answer(content: bytes, media_type: str) -> Callable[[], Response]:
    def answer() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return answer


def _data_router(models: Sequence[PageModel], corpus: PageCorpus | None) -> APIRouter:
    """Routes that tell about models and texts."""
    router = APIRouter(include_in_schema=False)
    embedders = {model.id: model for model in models if model.kind == "embedder"}

    @router.get("/info")
    def info() -> dict[str, Any]:
        about = None if corpus is None else {"name": corpus.name, "count": len(corpus.texts)}
        return {"models": [model.described() for model in models], "corpus": about}

    @router.get("/corpus")
    def texts() -> dict[str, Any]:
        rows = [] if corpus is None else zip(corpus.ids, corpus.texts, strict=True)
        return {"rows": [{"id": name, "text": text} for name, text in rows]}

    @router.post("/tokens")
    def tokens(request: TokensRequest) -> Response:
        model = embedders.get(request.model)
        if model is None or model.count_tokens is None:
            message = f"model {request.model!r} is not served here as an embedding model"
            return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=404)
        return JSONResponse({"tokens": model.count_tokens(request.text, request.role),
                             "max_length": model.max_lengths[request.role]})

    return router
