"""/v1/rerank and /v2/rerank, which take Cohere's and Jina's requests and give an answer that both clients read."""

import uuid
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from megatron_embed.serving.errors import ERRORS
from megatron_embed.serving.metrics import Metrics
from megatron_embed.serving.models import ServedModels
from megatron_embed.serving.openai_routes import Text, Usage, json_response


class Document(BaseModel):
    """A document as an object."""

    model_config = ConfigDict(strict=True)

    text: Text


class RerankRequest(BaseModel):
    """A query and the documents to put in order. Fields that are not listed are ignored."""

    model_config = ConfigDict(strict=True)

    query: Text
    documents: Annotated[list[Text | Document], Field(min_length=1)]
    model: str | None = None
    """Any name while one reranker is served."""
    top_n: Annotated[int, Field(ge=1)] | None = None
    """Documents in the answer, the most relevant first; null: all."""
    return_documents: bool | None = None
    """Whether the answer holds the documents' texts. Null: no."""
    instruction: Text | None = None
    """In place of the model's own."""


class Result(BaseModel):
    """A document's score."""

    index: int
    """Position in the request."""
    relevance_score: float
    document: Document | None = None


class RerankResponse(BaseModel):
    """Documents by their scores, the most relevant first."""

    id: str
    model: str
    results: list[Result]
    usage: Usage
    meta: dict[str, Any]


def rerank_router(models: ServedModels, metrics: Metrics) -> APIRouter:
    """The routes over these models."""
    router = APIRouter(responses=ERRORS, tags=["Cohere and Jina"])

    @router.post("/v1/rerank", response_model=RerankResponse)
    @router.post("/v2/rerank", response_model=RerankResponse)
    async def rerank(request: RerankRequest) -> Response:
        """Scores of documents for a query."""
        model = models.reranker(request.model)
        documents = [document if isinstance(document, str) else document.text for document in request.documents]
        result = await model.rerank(models.queue, request.query, documents, instruction=request.instruction)
        metrics.computed(model.name, result.tokens)
        results: list[dict[str, Any]] = [{"index": index, "relevance_score": float(result.scores[index])}
                                         for index in result.ranking()[: request.top_n]]
        if request.return_documents:
            for answer in results:
                answer["document"] = {"text": documents[answer["index"]]}
        total = sum(result.tokens)
        return json_response({
            "id": str(uuid.uuid4()), "model": model.name, "results": results,
            "usage": {"prompt_tokens": total, "total_tokens": total},
            "meta": {"api_version": {"version": "1"}, "billed_units": {"search_units": 1}}})

    return router
