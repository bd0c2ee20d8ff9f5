"""The operations of the JSON API: a path, the classes of its request and answer, and the function that answers."""

from collections.abc import Callable
from typing import Any, NamedTuple

from sparsecbm_jax.app import schemas
from sparsecbm_jax.app.session import Session
from sparsecbm_jax.app.worker import Worker
from sparsecbm_jax.explanation.pathways import DecisionPathway


class Operation(NamedTuple):
    """An operation of the API.

    Attributes:
        method, path: HTTP method and path.
        summary: Description for a person.
        form: Dataclass of the request's JSON; None for a request without JSON.
        answer: Dataclass of the answer's JSON; None for JSON of another format.
        refusals: HTTP status codes of possible errors.
        work: Function from the form, or from the path's id, to the answer.
        is_slow: True where the operation runs the model or writes to disk.
    """

    method: str
    path: str
    summary: str
    form: type | None
    answer: type | None
    refusals: tuple[int, ...]
    work: Callable[..., Any]
    is_slow: bool


def operations(session: Session, worker: Worker) -> tuple[Operation, ...]:
    """Returns the operations of the API on a session."""

    def health() -> schemas.Health:
        return schemas.Health("ok", worker.num_waiting, session.num_edits)

    return (
        Operation("GET", "/healthz", "Says that the server answers.", None, schemas.Health, (), health, False),
        Operation(
            "POST",
            "/api/explain",
            "Explains a text: its decision pathway.",
            schemas.Text,
            DecisionPathway,
            (400,),
            lambda form: session.explain(form.text),
            True,
        ),
        Operation(
            "POST",
            "/api/preview",
            "Previews a correction: its effect on the text and on held-out ones; changes nothing.",
            schemas.Question,
            schemas.Preview,
            (400,),
            session.preview,
            True,
        ),
        Operation(
            "POST",
            "/api/apply",
            "Makes a correction; it is on disk when this answers.",
            schemas.Order,
            schemas.Applied,
            (400, 409, 503),
            session.apply,
            True,
        ),
        Operation(
            "POST",
            "/api/undo",
            "Undoes an edit at any place of the log; on disk when this answers.",
            schemas.EditId,
            schemas.Edits,
            (400, 404, 409, 503),
            lambda form: session.undo(form.edit),
            True,
        ),
        Operation(
            "GET",
            "/api/edits",
            "Lists the active edits.",
            None,
            schemas.Edits,
            (),
            lambda: schemas.Edits(session.edits),
            False,
        ),
        Operation(
            "GET",
            "/api/edits/{edit}",
            "Returns an edit as a file, for launch/edits.py --add.",
            None,
            None,
            (404,),
            session.get,
            False,
        ),
    )
