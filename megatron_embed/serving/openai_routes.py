"""/v1/embeddings and /v1/models, in the shapes of OpenAI's API."""

import base64
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import to_json
from starlette.responses import Response

from megatron_embed.serving.errors import ERRORS, RequestError
from megatron_embed.serving.metrics import Metrics
from megatron_embed.serving.models import ServedEmbedder, ServedModels, ServedReranker


def check_text(text: str) -> str:
    """The text. Raises ValueError for one that is not Unicode, which JSON can express."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"has an unpaired surrogate at character {error.start + 1}") from None
    return text


def check_texts(value: Any) -> Any:
    """The value. Raises ValueError unless it is a text or several."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("must be a string or a list of strings; token ids are not accepted, because the model's "
                         "prompt is put before the text")
    if not texts:
        raise ValueError("must hold at least one text")
    for text in texts:
        check_text(text)
    return value


Text = Annotated[str, AfterValidator(check_text)]
Texts = Annotated[str | Annotated[list[str], Field(min_length=1)], BeforeValidator(check_texts)]
"""One text or several."""


def listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def json_response(body: Any) -> Response:
    return Response(to_json(body), media_type="application/json")


class EmbeddingsRequest(BaseModel):
    """A request of vectors. Fields that are not listed are ignored."""

    model_config = ConfigDict(strict=True)

    input: Texts
    model: str | None = None
    """Any name while one embedding model is served."""
    encoding_format: Literal["float", "base64"] | None = None
    """base64: of little-endian float32. Null: float."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Components that vectors are cut to; unit vectors get unit length again."""
    input_type: Literal["query", "document"] | None = None
    """Whose prompt and length apply. Null: document."""
    user: str | None = None


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    """The vector of one text."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsResponse(BaseModel):
    """Vectors, in the order of the texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal["embedding", "reranker"]
    max_length: int
    """Tokens of a text, or of a pair."""
    dimensions: int | None
    """Numbers of a vector; null for a reranker."""


class ModelsResponse(BaseModel):
    """The models of the server."""

    object: Literal["list"]
    data: list[ModelCard]


def openai_router(models: ServedModels, metrics: Metrics) -> APIRouter:
    """The routes over these models."""
    router = APIRouter(responses=ERRORS, tags=["OpenAI"])
    started = int(time.time())

    @router.post("/v1/embeddings", response_model=EmbeddingsResponse)
    async def embeddings(request: EmbeddingsRequest) -> Response:
        """Vectors of texts."""
        model = models.embedder(request.model)
        result = await model.encode(models.queue, listed(request.input), request.input_type or "document",
                                    dimensions=request.dimensions)
        metrics.computed(model.name, result.tokens)
        vectors = encoded(result.vectors, request.encoding_format or "float")
        total = sum(result.tokens)
        return json_response({
            "object": "list", "model": model.name, "usage": {"prompt_tokens": total, "total_tokens": total},
            "data": [{"object": "embedding", "index": index, "embedding": vector}
                     for index, vector in enumerate(vectors)]})

    @router.get("/v1/models", response_model=ModelsResponse)
    async def list_models() -> Any:
        """The models that are served."""
        return {"object": "list", "data": [card(model, started) for model in models.all]}

    @router.get("/v1/models/{name:path}", response_model=ModelCard)
    async def one_model(name: str) -> Any:
        """The model of that name."""
        for model in models.all:
            if model.name == name:
                return card(model, started)
        raise RequestError(404, f"model = {name!r} is not served here; see /v1/models", code="model_not_found")

    return router


def encoded(vectors: np.ndarray, encoding_format: Literal["float", "base64"]) -> Sequence[Any]:
    """The vectors as lists of numbers, or base64 of little-endian float32."""
    if encoding_format == "float":
        rows: list[list[float]] = vectors.tolist()
        return rows
    return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]


def card(model: ServedEmbedder | ServedReranker, started: int) -> dict[str, Any]:
    """The entry of a model in /v1/models. `started`: when the server did, in seconds since 1970."""
    return {"id": model.name, "object": "model", "created": started, "owned_by": "megatron_embed", "kind": model.kind,
            "max_length": model.max_length, "dimensions": model.dim if isinstance(model, ServedEmbedder) else None}
