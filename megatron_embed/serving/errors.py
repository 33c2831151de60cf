"""Errors that a request is answered with, in the shape of the API that was asked."""

from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse, Response

from megatron_embed.errors import UserError

TEI_PATHS = ("/embed", "/rerank")
"""Paths whose errors have Text Embeddings Inference's shape; all others have OpenAI's."""
TEI_TYPES = {413: "Validation", 422: "Validation", 429: "Overloaded", 503: "Unhealthy"}
SHOWN_PROBLEMS = 3
"""Problems of a request's body that a message names."""


class RequestError(HTTPException):
    """An answer other than 200: its status and a sentence for the client."""

    def __init__(self, status: int, message: str, *, code: str, retry_after: int | None = None) -> None:
        """`code`: a word for programs; `retry_after`: seconds, a header of the answer."""
        headers = {} if retry_after is None else {"retry-after": str(retry_after)}
        if status == 401:
            headers["www-authenticate"] = "Bearer"
        super().__init__(status, message, headers=headers)
        self.code = code


class ErrorDetail(BaseModel):
    """What went wrong, as OpenAI's API says it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """An error of the paths under /v1."""

    error: ErrorDetail


class TeiErrorBody(BaseModel):
    """An error of /embed and /rerank."""

    error: str
    error_type: str


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504)}
"""For the description of a path: the answers besides 200."""
TEI_ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": TeiErrorBody} for status in ERRORS}


def stopping() -> RequestError:
    """The answer to a request that cannot be completed before the server ends."""
    return RequestError(503, "the server is stopping; send the request again", code="stopping", retry_after=5)


def error_response(path: str, error: StarletteHTTPException) -> Response:
    """The answer for an error. `path`: that was asked."""
    status, message = error.status_code, str(error.detail)
    code = error.code if isinstance(error, RequestError) else None
    body: dict[str, Any]
    if path in TEI_PATHS:
        body = {"error": message, "error_type": TEI_TYPES.get(status, "Backend")}
    else:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status, headers=dict(error.headers or {}))


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error in the shape of its path."""

    async def known(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        return error_response(request.url.path, error)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            return error_response(request.url.path, RequestError(
                415, f"Content-Type is {kind!r}; send application/json", code="unsupported_media_type"))
        return error_response(request.url.path, RequestError(422, _problems(error), code="invalid_request"))

    async def refused(request: Request, error: Exception) -> Response:
        return error_response(request.url.path, RequestError(422, str(error), code="invalid_text"))

    async def failed(request: Request, error: Exception) -> Response:
        return error_response(request.url.path, RequestError(
            500, f"the server failed: {type(error).__name__}; its log has the details", code="internal_error"))

    app.add_exception_handler(StarletteHTTPException, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(UserError, refused)
    app.add_exception_handler(Exception, failed)


def _problems(error: RequestValidationError) -> str:
    """A sentence on what is wrong with a body, without its values, which may be long."""
    shown = []
    for problem in error.errors()[:SHOWN_PROBLEMS]:
        if problem["type"] == "json_invalid":
            return f"the body is not JSON: {problem['ctx']['error']} at character {problem['loc'][-1]}"
        name = ".".join(str(part) for part in problem["loc"][1:]) or "the body"
        shown.append(f"{name}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(shown)
