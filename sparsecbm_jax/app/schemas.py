"""What the live page is asked and what it answers: dataclasses, which checks, JSON and the OpenAPI document follow."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from sparsecbm_jax.config.names import did_you_mean
from sparsecbm_jax.correction.report import CorrectionReport, EditorDescription, TextPrediction
from sparsecbm_jax.explanation.pathways import DecisionPathway
from sparsecbm_jax.intervention.stored_edit import StoredEdit

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


class ApiError(ValueError):
    """What is answered in place of a result.

    Attributes:
        status: of HTTP.
        field: of the form that was wrong; None where it is no field's fault.
        headers: of the answer.
    """

    def __init__(
        self, status: int, message: str, *, field: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.field, self.headers = status, field, dict(headers or {})


@dataclasses.dataclass(frozen=True)
class Text:
    """A text to explain.

    Attributes:
        text: not empty, and no longer than the server allows.
    """

    text: str


@dataclasses.dataclass(frozen=True)
class Question:
    """A correction that someone thinks of making.

    Attributes:
        text: the text that the model misreads.
        concept: the concept that it misreads.
        target: the class that the concept should have.
    """

    text: str
    concept: str
    target: str


@dataclasses.dataclass(frozen=True)
class Order:
    """A correction to make.

    Attributes:
        text, concept, target: as in a preview.
        edit: id of the edit that the preview showed; where the model has changed since, so that another one would be
            made, nothing is. Null or left out: whichever repairs the concept now.
    """

    text: str
    concept: str
    target: str
    edit: str | None = None


@dataclasses.dataclass(frozen=True)
class EditId:
    """An active edit.

    Attributes:
        edit: its id.
    """

    edit: str


@dataclasses.dataclass(frozen=True)
class Correction:
    """A correction in numbers.

    Attributes:
        text, concept, target, label: what was asked; label is null: the task label does not enter.
        editor: how the model was changed.
        num_dropped, num_grown: changed weights.
        num_weights: maskable weights of the backbone.
        is_repaired: whether the concept has the asked class with it.
        changed_share: dropped and grown weights over `num_weights`.
        before, after: what the model says about the text.
    """

    text: str
    concept: str
    target: str
    label: str | None
    editor: EditorDescription
    num_dropped: int
    num_grown: int
    num_weights: int
    is_repaired: bool
    changed_share: float
    before: TextPrediction
    after: TextPrediction

    @classmethod
    def of(cls, report: CorrectionReport) -> "Correction":
        """The same without the positions."""
        kept_as_they_are = {name: getattr(report, name) for name in ("editor", "before", "after")}
        return cls(**(report.to_dict() | kept_as_they_are))


@dataclasses.dataclass(frozen=True)
class SampleEffect:
    """What an edit does to held-out texts. Other concepts are predicted as before: their subnetworks stay.

    Attributes:
        num_texts: texts in the sample.
        num_changed: those whose concept is predicted as another class.
        num_repaired, num_broken: of the texts with a gold class, those predicted correctly only after, and only before.
        num_labels_changed: texts that get another label.
        shift: mean total variation distance of the concept's probabilities before and after, from 0 to 1.
        flips: by class before and class after, how many texts are predicted as another class.
        changed_texts: the first of those texts.
    """

    num_texts: int
    num_changed: int
    num_repaired: int
    num_broken: int
    num_labels_changed: int
    shift: float
    flips: dict[str, dict[str, int]]
    changed_texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Preview:
    """What a correction would do; nothing is changed yet.

    Attributes:
        edit: id of the edit, to make this one and no other; null where nothing would change.
        report: the correction in numbers.
        before, after: the text's pathway now, and with the edit, for the class that was asked.
        sample: what it does to held-out texts; null where the server has none, or nothing would change.
    """

    edit: str | None
    report: Correction
    before: DecisionPathway
    after: DecisionPathway
    sample: SampleEffect | None


@dataclasses.dataclass(frozen=True)
class EditSummary:
    """An active edit.

    Attributes:
        id: twelve hexadecimal digits.
        concept, was, target: what was corrected, the class before, and the class that was asked.
        num_dropped, num_grown: changed weights.
        text_sha256: of the text that was corrected; the text itself is not kept.
    """

    id: str
    concept: str
    was: str
    target: str
    num_dropped: int
    num_grown: int
    text_sha256: str

    @classmethod
    def of(cls, edit: StoredEdit) -> "EditSummary":
        """What a list says of an edit."""
        was = edit.before.get("concepts", {}).get(edit.concept, "?")
        return cls(edit.id, edit.concept, was, edit.target, *edit.num_changed, edit.text_sha256)


@dataclasses.dataclass(frozen=True)
class Edits:
    """All active edits.

    Attributes:
        edits: oldest first.
    """

    edits: tuple[EditSummary, ...]


@dataclasses.dataclass(frozen=True)
class Applied:
    """What was made of an order.

    Attributes:
        edit: id of the edit that is active now; null where nothing had to change, or no edit was found.
        is_repaired: whether the concept has the asked class on the text now.
        edits: all active ones, oldest first.
    """

    edit: str | None
    is_repaired: bool
    edits: tuple[EditSummary, ...]


@dataclasses.dataclass(frozen=True)
class Health:
    """Whether the server answers.

    Attributes:
        status: 'ok'.
        num_waiting: requests for the model at work or in wait.
        num_edits: active edits.
    """

    status: str
    num_waiting: int
    num_edits: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """Why there is no result.

    Attributes:
        message: for a person.
        field: of the request that was wrong; null where it is no field's fault.
    """

    message: str
    field: str | None


def read_request(form: type[T], body: bytes) -> T:
    """A request's JSON as the dataclass that it should be.

    Raises:
        Refusal: 400, naming the field, if it is not.
    """
    hints = typing.get_type_hints(form)
    expected = f"a JSON object with {', '.join(map(repr, hints))}"
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request is not JSON ({error}); expected {expected}") from None
    if not isinstance(content, dict):
        raise ApiError(400, f"the request is {_kind(content)}; expected {expected}")
    for name in content:
        if name not in hints:
            raise ApiError(
                400, f"there is no field {name!r}{did_you_mean(name, hints)}; expected {expected}", field=name
            )
    for field in dataclasses.fields(form):
        if field.name not in content:
            if field.default is dataclasses.MISSING:
                raise ApiError(400, f"{field.name!r} is missing; expected {expected}", field=field.name)
        elif not isinstance(content[field.name], hints[field.name]):
            kinds = " or ".join(_NAMES[one] for one in _alternatives(hints[field.name]))
            message = f"{field.name!r} is {_kind(content[field.name])}; expected {kinds}"
            raise ApiError(400, message, field=field.name)
    return form(**content)


_NAMES = {
    str: "a string",
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "an array",
    dict: "an object",
}


def _kind(value: Any) -> str:
    return _NAMES[type(value)]


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
