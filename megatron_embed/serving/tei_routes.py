"""/embed and /rerank, in the shapes of Text Embeddings Inference."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from megatron_embed.serving.errors import TEI_ERRORS
from megatron_embed.serving.metrics import Metrics
from megatron_embed.serving.models import ServedModels
from megatron_embed.serving.openai_routes import Text, Texts, json_response, listed


class EmbedRequest(BaseModel):
    """A request of vectors. Fields that are not listed are ignored."""

    model_config = ConfigDict(strict=True)

    inputs: Texts
    normalize: bool | None = None
    """Unit vectors; null: as the model's directory says."""
    truncate: bool | None = None
    """False: a text beyond the maximum length is refused. Null: it is truncated, as in training."""
    prompt_name: Literal["query", "document"] | None = None
    """Whose prompt and length apply. Null: document."""
    dimensions: Annotated[int, Field(ge=1)] | None = None


class TeiRerankRequest(BaseModel):
    """A query and the texts to score. Fields that are not listed are ignored."""

    model_config = ConfigDict(strict=True)

    query: Text
    texts: Annotated[list[Text], Field(min_length=1)]
    raw_scores: bool | None = None
    """The head's scores before the activation. Null: no."""
    return_text: bool | None = None
    """Whether the answer holds the texts. Null: no."""
    truncate: bool | None = None
    """False: a pair beyond the maximum length is refused. Null: it is truncated."""


class Rank(BaseModel):
    """A text's score."""

    index: int
    score: float
    text: str | None = None


def tei_router(models: ServedModels, metrics: Metrics) -> APIRouter:
    """The routes over these models: the first embedding model and the first reranker, since a request names none."""
    router = APIRouter(responses=TEI_ERRORS, tags=["Text Embeddings Inference"])

    @router.post("/embed", response_model=list[list[float]])
    async def embed(request: EmbedRequest) -> Response:
        """Vectors of texts."""
        model = models.embedder(None)
        result = await model.encode(models.queue, listed(request.inputs), request.prompt_name or "document",
                                    dimensions=request.dimensions, normalize=request.normalize,
                                    truncate=request.truncate is not False)
        metrics.computed(model.name, result.tokens)
        return json_response(result.vectors.tolist())

    @router.post("/rerank", response_model=list[Rank])
    async def rerank(request: TeiRerankRequest) -> Response:
        """Scores of texts for a query, the most relevant first."""
        model = models.reranker(None)
        result = await model.rerank(models.queue, request.query, request.texts,
                                    truncate=request.truncate is not False)
        metrics.computed(model.name, result.tokens)
        scores = result.raw if request.raw_scores else result.scores
        ranks: list[dict[str, Any]] = [{"index": index, "score": float(scores[index])} for index in result.ranking()]
        if request.return_text:
            for rank in ranks:
                rank["text"] = request.texts[rank["index"]]
        return json_response(ranks)

    return router
