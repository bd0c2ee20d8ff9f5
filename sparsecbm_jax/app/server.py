"""The routes of the live page and of its JSON API. One thread does the model's work, one request after another."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from sparsecbm_jax.app import forms
from sparsecbm_jax.app.desk import Desk
from sparsecbm_jax.app.forms import Refusal
from sparsecbm_jax.app.gate import Gate, Limits, as_json, refuse, too_many
from sparsecbm_jax.app.openapi import document
from sparsecbm_jax.app.page import live_page
from sparsecbm_jax.edits import StoredEdit
from sparsecbm_jax.explanation import DecisionPathway

T = TypeVar("T")
# A body that is too large is read on to this many times the limit, since a sender may read no answer before it is done.
_DRAINED = 16


class Operation(NamedTuple):
    """One thing that the API does.

    Attributes:
        method, path: of HTTP.
        summary: for a person.
        form: dataclass of the request's JSON; None for none.
        answer: dataclass of the answer's JSON; None for JSON of another format.
        refusals: HTTP's numbers of what may come in its place.
        work: from form, or from the path's id, to the answer.
        is_slow: whether the model has to work, or the disk.
    """

    method: str
    path: str
    summary: str
    form: type | None
    answer: type | None
    refusals: tuple[int, ...]
    work: Callable[..., Any]
    is_slow: bool


class Worker:
    """One thread for the model's work, and a bound on how much of it waits."""

    def __init__(self, max_waiting: int) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._max_waiting, self.num_waiting = max_waiting, 0

    async def do(self, work: Callable[..., T], *args: Any) -> T:
        """Waits for its turn, and for the work.

        Raises:
            Refusal: 429, if too much of it waits already.
        """
        if self.num_waiting >= self._max_waiting:
            raise too_many(f"{self.num_waiting} requests wait for the model already", 1)
        self.num_waiting += 1
        turn = asyncio.get_running_loop().run_in_executor(self._pool, work, *args)
        turn.add_done_callback(self._is_done)
        # Work that nobody waits for any longer counts until it is done.
        return await asyncio.shield(turn)

    def _is_done(self, turn: asyncio.Future) -> None:
        self.num_waiting -= 1
        if not turn.cancelled():
            turn.exception()

    def close(self) -> None:
        """Waits for the work that has begun; what waits is not begun."""
        self._pool.shutdown(cancel_futures=True)


def operations(desk: Desk, worker: Worker) -> tuple[Operation, ...]:
    """What the API does, and how."""

    def health() -> forms.Health:
        return forms.Health("ok", worker.num_waiting, desk.num_edits)

    return (
        Operation("GET", "/healthz", "Says that the server answers.", None, forms.Health, (), health, False),
        Operation(
            "POST",
            "/api/explain",
            "Explains a text: its decision pathway.",
            forms.Text,
            DecisionPathway,
            (400,),
            lambda form: desk.explain(form.text),
            True,
        ),
        Operation(
            "POST",
            "/api/preview",
            "Says what a correction would do, to the text and to held-out ones; changes nothing.",
            forms.Question,
            forms.Preview,
            (400,),
            desk.preview,
            True,
        ),
        Operation(
            "POST",
            "/api/apply",
            "Makes a correction; it is on disk when this answers.",
            forms.Order,
            forms.Applied,
            (400, 409, 503),
            desk.apply,
            True,
        ),
        Operation(
            "POST",
            "/api/undo",
            "Undoes an edit, whichever its place; on disk when this answers.",
            forms.EditId,
            forms.Edits,
            (400, 404, 409, 503),
            lambda form: desk.undo(form.edit),
            True,
        ),
        Operation(
            "GET",
            "/api/edits",
            "Lists the edits in force.",
            None,
            forms.Edits,
            (),
            lambda: forms.Edits(desk.edits),
            False,
        ),
        Operation(
            "GET",
            "/api/edits/{edit}",
            "Gives an edit as a file, for launch/edits.py --add.",
            None,
            None,
            (404,),
            desk.get,
            False,
        ),
    )


def create_app(
    desk: Desk,
    *,
    token: str | None = None,
    host_names: Collection[str] = (),
    limits: Limits | None = None,
    title: str = "Decision pathways, live",
) -> Starlette:
    """The live page and its API around a desk, to be served by any ASGI server in one process.

    Args:
        desk: what is asked; it is the caller's to close, once the app has shut down.
        token: what has to be shown with every request but for `/healthz`; wanted where others reach the server.
        host_names: by which the server may be called, beside 'localhost' and any IP address.
        limits: what it takes on; None for the defaults.
        title: the page's heading.
    """
    limits = limits or Limits()
    worker = Worker(limits.max_waiting)
    known = operations(desk, worker)
    content, policy = live_page(desk.model, title, limits, is_lasting=desk.is_lasting)
    api = document(known, limits, is_token_wanted=token is not None)

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
        middleware=[Middleware(Gate, token=token, host_names=host_names, limits=limits)],
        exception_handlers={HTTPException: _http_error, Refusal: _refused, Exception: _failed},
        lifespan=lifespan,
    )


def _endpoint(operation: Operation, worker: Worker, limits: Limits) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        given: tuple[Any, ...] = tuple(request.path_params.values())
        if operation.form is not None:
            form: Any = forms.read_form(operation.form, await _body(request, limits))
            if len(getattr(form, "text", "")) > limits.max_text:
                message = f"'text' has {len(form.text):,} characters; at most {limits.max_text:,} are allowed"
                raise Refusal(413, message, field="text")
            given = (form,)
        if operation.is_slow:
            # Its JSON, too, is the thread's work: that of a long text would keep other requests waiting.
            return await worker.do(lambda: _rendered(operation.work(*given)))
        return _rendered(operation.work(*given))

    return answer


def _rendered(answer: Any) -> Response:
    if isinstance(answer, StoredEdit):
        headers = {"Content-Disposition": f'attachment; filename="edit-{answer.id}.json"'}
        return JSONResponse(answer.to_dict(), headers=headers)
    return as_json(answer)


async def _body(request: Request, limits: Limits) -> bytes:
    """The body of a request.

    Raises:
        Refusal: 413, if it is too large; 408, if it takes too long to come.
    """
    too_large = Refusal(413, f"the request is too large; at most {limits.max_body:,} bytes are allowed")
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
        raise Refusal(408, f"the request took more than {limits.read_seconds:g} s to come") from None
    if size > limits.max_body:
        raise too_large
    return b"".join(parts)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return refuse(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.scope['path']}"
    return refuse(Refusal(error.status_code, f"{where}: {error.detail}; see /openapi.json", headers=error.headers))


async def _failed(request: Request, error: Exception) -> Response:
    return refuse(Refusal(500, "the server failed; what happened stands in its own output"))
