"""The routes of the live page and of its JSON API. One thread runs the model, one request after another."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from sparsecbm_jax.app import schemas
from sparsecbm_jax.app.openapi import document
from sparsecbm_jax.app.operations import Operation, operations
from sparsecbm_jax.app.page import live_page
from sparsecbm_jax.app.schemas import ApiError
from sparsecbm_jax.app.security import Guard, Limits, as_json, error_response
from sparsecbm_jax.app.session import Session
from sparsecbm_jax.app.worker import Worker
from sparsecbm_jax.intervention.stored_edit import StoredEdit

# A body that is too large is read up to this many times the limit, since a sender may read the answer only at its end.
_DRAINED = 16


def create_app(
    session: Session,
    *,
    token: str | None = None,
    host_names: Collection[str] = (),
    limits: Limits | None = None,
    title: str = "Decision pathways, live",
) -> Starlette:
    """Builds the live page and its API around a session, for any ASGI server in one process.

    Args:
        session: The session; the caller closes it once the app has shut down.
        token: Token that every request needs but for `/healthz`; necessary where others can reach the server.
        host_names: Names of the server, in addition to 'localhost' and any IP address.
        limits: The server's limits; None for the defaults.
        title: The page's heading.
    """
    limits = limits or Limits()
    worker = Worker(limits.max_waiting)
    known = operations(session, worker)
    content, policy = live_page(session.model, title, limits, keeps_earlier=session.keeps_earlier)
    api = document(known, limits, is_token_needed=token is not None)

    async def page(request: Request) -> Response:
        return HTMLResponse(content, headers={"Content-Security-Policy": policy})

    async def openapi(request: Request) -> Response:
        return JSONResponse(api)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        worker.close()

    return Starlette(
        routes=[
            Route("/", page, methods=["GET"]),
            Route("/openapi.json", openapi, methods=["GET"]),
            *(Route(one.path, _endpoint(one, worker, limits), methods=[one.method]) for one in known),
        ],
        middleware=[Middleware(Guard, token=token, host_names=host_names, limits=limits)],
        exception_handlers={HTTPException: _http_error, ApiError: _refused, Exception: _failed},
        lifespan=lifespan,
    )


def _endpoint(operation: Operation, worker: Worker, limits: Limits) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        given: tuple[Any, ...] = tuple(request.path_params.values())
        if operation.form is not None:
            form: Any = schemas.read_request(operation.form, await _body(request, limits))
            if len(getattr(form, "text", "")) > limits.max_text:
                message = f"'text' has {len(form.text):,} characters; at most {limits.max_text:,} are allowed"
                raise ApiError(413, message, field="text")
            given = (form,)
        if operation.is_slow:
            # The thread also makes the JSON: that of a long text would block other requests.
            return await worker.do(lambda: _rendered(operation.work(*given)))
        return _rendered(operation.work(*given))

    return answer


def _rendered(answer: Any) -> Response:
    if isinstance(answer, StoredEdit):
        headers = {"Content-Disposition": f'attachment; filename="edit-{answer.id}.json"'}
        return JSONResponse(answer.to_dict(), headers=headers)
    return as_json(answer)


async def _body(request: Request, limits: Limits) -> bytes:
    """Reads the body of a request.

    Raises:
        ApiError: 413, if it is too large; 408, if it takes too long to arrive.
    """
    too_large = ApiError(413, f"the request is too large; at most {limits.max_body:,} bytes are allowed")
    size, parts = 0, []
    try:
        async with asyncio.timeout(limits.read_seconds):
            async for part in request.stream():
                size += len(part)
                if size > _DRAINED * limits.max_body:
                    raise too_large
                if size <= limits.max_body:
                    parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the request took more than {limits.read_seconds:g} s to arrive") from None
    if size > limits.max_body:
        raise too_large
    return b"".join(parts)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.scope['path']}"
    return error_response(
        ApiError(error.status_code, f"{where}: {error.detail}; see /openapi.json", headers=error.headers)
    )


async def _failed(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "the server failed; its own output has the error"))
