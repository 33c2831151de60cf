"""The web application of a server."""

from collections.abc import Sequence
from typing import Literal

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel
from starlette.responses import Response

from megatron_embed import __version__
from megatron_embed.serving.errors import ERRORS, RequestError, add_error_handlers, stopping
from megatron_embed.serving.guard import Guard, ServerState
from megatron_embed.serving.metrics import Metrics
from megatron_embed.serving.models import ServedModels
from megatron_embed.serving.openai_routes import openai_router
from megatron_embed.serving.page import page_router
from megatron_embed.serving.page_corpus import PageCorpus
from megatron_embed.serving.rerank_routes import rerank_router
from megatron_embed.serving.tei_routes import tei_router


class Health(BaseModel):
    """State of the server."""

    status: Literal["ok"]


def create_app(models: ServedModels, *, api_keys: Sequence[str] = (), hosts: Sequence[str] = (),
               state: ServerState | None = None, corpus: PageCorpus | None = None) -> FastAPI:
    """The application over these models, with every route; others are added with `include_router`.

    Args:
        models: the registry; their queue is shared by all routes.
        api_keys: of which a request needs one; empty: none is needed.
        hosts: names that a request may give the server; empty: any.
        state: shared with what stops the server.
        corpus: texts that the page searches at first.
    """
    state = state or ServerState()
    metrics = Metrics(models)
    # The interactive pages of FastAPI would load scripts from another host.
    app = FastAPI(title="megatron-embed serve", version=__version__, docs_url=None, redoc_url=None)
    add_error_handlers(app)
    for router in (openai_router(models, metrics), rerank_router(models, metrics), tei_router(models, metrics),
                   _operations_router(models, metrics, state), page_router(models, corpus)):
        app.include_router(router)
    app.add_middleware(Guard, limits=models.limits, metrics=metrics, state=state, api_keys=api_keys, hosts=hosts)
    return app


def _operations_router(models: ServedModels, metrics: Metrics, state: ServerState) -> APIRouter:
    """/health and /metrics."""
    router = APIRouter(responses=ERRORS, tags=["Operations"])

    @router.get("/health", response_model=Health)
    async def health() -> Health:
        """Whether the server answers requests; 503 while it stops."""
        if state.stopping:
            raise stopping()
        if not models.queue.batcher.alive:
            raise RequestError(503, "the thread that computes has ended; start the server again", code="unhealthy")
        return Health(status="ok")

    @router.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Counters and gauges in Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
