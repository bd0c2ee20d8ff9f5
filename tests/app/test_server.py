"""The live page's API: what it answers and refuses, and what a restart keeps."""

import asyncio
import contextlib
import dataclasses
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from sparsecbm_jax.app import Limits, Session, create_app, is_loopback, security
from sparsecbm_jax.app import schemas as schemas_lib
from sparsecbm_jax.app import session as session_lib
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.correction.corrections import correct
from sparsecbm_jax.correction.request_file import CorrectionRequest, RequestFile
from sparsecbm_jax.explanation.pathways import DecisionPathway, explain
from sparsecbm_jax.intervention import editors
from sparsecbm_jax.intervention.stored_edit import StoredEdit, apply_stored
from sparsecbm_jax.model.predictions import predict, text_batches
from sparsecbm_jax.runtime.json_schema import schema_of

from tests.runtime.test_json_schema import problem
from tests.support.tiny_model import TEXTS, tiny_model
from tests.support.tiny_session import HOSTILE, anchors, asked_otherwise, model, sample

pytest.importorskip("jinja2", reason="jinja2 not here: pip install 'sparsecbm-jax[report]'")
pytest.importorskip("starlette", reason="starlette not here: pip install 'sparsecbm-jax[app]'")
pytest.importorskip("httpx", reason="httpx not here: pip install httpx")

import httpx
from starlette.testclient import TestClient

ADDRESS = "http://127.0.0.1:8000"
TOKEN = "a token, of the test"


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    with contextlib.closing(Session(model(), tmp_path / "edits.log", sample())) as opened:
        yield opened


@pytest.fixture
def client(session: Session) -> Iterator[TestClient]:
    with TestClient(create_app(session, limits=Limits(rate=1e6, burst=1000)), ADDRESS) as opened:
        yield opened


def ask(client: TestClient, path: str, form: Any, status: int = 200) -> Any:
    answer = client.post(path, json=form)
    assert answer.status_code == status, answer.text
    return answer.json()


def other_class(pathway: Any, concept: str) -> str:
    """The first class that the model does not read the concept as."""
    (lane,) = (lane for lane in pathway["concepts"] if lane["name"] == concept)
    return next(name for name in lane["probabilities"] if name != lane["predicted_class"])


def reading(pathway: Any, concept: str) -> str:
    return next(lane["predicted_class"] for lane in pathway["concepts"] if lane["name"] == concept)


def question(client: TestClient, text: str = TEXTS[0], concept: str = "service") -> dict[str, str]:
    return {
        "text": text,
        "concept": concept,
        "target": other_class(ask(client, "/api/explain", {"text": text}), concept),
    }


def test_a_text_is_explained_as_elsewhere(client: TestClient) -> None:
    for text in (TEXTS[0], HOSTILE):
        answer = ask(client, "/api/explain", {"text": text})
        assert answer == explain(model(), [text])[0].to_dict()
        assert problem(answer, schema_of(DecisionPathway), schema_of(DecisionPathway)) is None


def test_a_preview_says_what_would_change_and_changes_nothing(client: TestClient) -> None:
    asked = question(client)
    found = ask(client, "/api/preview", asked)
    corrected, report = correct(model(), CorrectionRequest(*asked.values()))
    assert found["edit"] == report.stored().id
    assert found["report"] == json.loads(json.dumps(report.to_dict())) and report.is_repaired
    target = {asked["concept"]: asked["target"]}
    assert found["before"] == explain(model(), [asked["text"]], target)[0].to_dict()
    assert found["after"] == explain(corrected, [asked["text"]], target)[0].to_dict()
    k = model().schema.concepts.index(asked["concept"])
    was, now = (predict(one, TEXTS).concepts[:, k] for one in (model(), corrected))
    assert found["sample"]["num_texts"] == len(TEXTS)
    assert found["sample"]["num_changed"] == (was != now).sum() > 0
    assert found["sample"]["num_broken"] == ((was == 0) & (now != 0)).sum()
    assert found["sample"]["changed_texts"] == [
        text for text, differs in zip(TEXTS, was != now, strict=True) if differs
    ]
    assert sum(n for by in found["sample"]["flips"].values() for n in by.values()) == found["sample"]["num_changed"]
    assert problem(found, schema_of(schemas_lib.Preview), schema_of(schemas_lib.Preview)) is None
    assert client.get("/api/edits").json() == {"edits": []}
    nothing = ask(client, "/api/preview", asked | {"target": reading(found["before"], "service")})
    assert nothing["edit"] is nothing["sample"] is None and nothing["report"]["is_repaired"]


def test_a_correction_is_made_kept_passed_on_and_undone(client: TestClient, tmp_path: Path) -> None:
    asked = question(client)
    before = ask(client, "/api/explain", {"text": asked["text"]})
    previewed = ask(client, "/api/preview", asked)
    made = ask(client, "/api/apply", asked | {"edit": previewed["edit"]})
    assert made["edit"] == previewed["edit"] and made["is_repaired"]
    assert problem(made, schema_of(schemas_lib.Applied), schema_of(schemas_lib.Applied)) is None
    (listed,) = made["edits"]
    assert (listed["was"], listed["target"]) == (reading(before, "service"), asked["target"])
    after = ask(client, "/api/explain", {"text": asked["text"]})
    assert reading(after, "service") == asked["target"]
    assert client.get("/api/edits").json() == {"edits": made["edits"]}

    answer = client.get(f"/api/edits/{made['edit']}")
    assert answer.headers["content-disposition"] == f'attachment; filename="edit-{made["edit"]}.json"'
    (tmp_path / "one.json").write_bytes(answer.content)
    edit = StoredEdit.load(tmp_path / "one.json")
    masks = apply_stored(model().masks, edit, model().schema.concepts)
    elsewhere = dataclasses.replace(model(), masks=masks)
    assert explain(elsewhere, [asked["text"]])[0].to_dict() == after

    assert ask(client, "/api/undo", {"edit": made["edit"]}) == {"edits": []}
    assert ask(client, "/api/explain", {"text": asked["text"]}) == before


def test_a_restart_keeps_what_was_acknowledged(session: Session, client: TestClient, tmp_path: Path) -> None:
    first, second = question(client), question(client, TEXTS[1], "food")
    undone = ask(client, "/api/apply", first)["edit"]
    kept = ask(client, "/api/apply", second)["edits"]
    ask(client, "/api/undo", {"edit": undone})
    # As a kill leaves it: only the lock is let go.
    session.close()
    with contextlib.closing(Session(model(), tmp_path / "edits.log")) as restarted:
        assert [dataclasses.asdict(edit) for edit in restarted.edits] == kept[1:]
        assert masks_lib.fingerprint(restarted.model.masks) == masks_lib.fingerprint(session.model.masks)
        with TestClient(create_app(restarted), ADDRESS) as again:
            assert reading(ask(again, "/api/explain", {"text": TEXTS[1]}), "food") == second["target"]
            assert ask(again, "/api/preview", question(again, TEXTS[1], "food"))["sample"] is None


def test_continual_corrections_hold_those_before_them(tmp_path: Path) -> None:
    def opened() -> Session:
        requests = RequestFile(tmp_path / "requests.jsonl")
        editor = editors.continual(anchors(), original=model().arrays)
        return Session(model(), tmp_path / "edits.log", editor=editor, requests=requests)

    with contextlib.closing(opened()) as session, TestClient(create_app(session), ADDRESS) as client:
        asked = (asked_otherwise(text, "ambiance") for text in (TEXTS[0], TEXTS[3]))
        first, second = ({"text": one.text, "concept": one.concept, "target": one.target} for one in asked)
        ask(client, "/api/apply", first)
        previewed = ask(client, "/api/preview", second)
        assert previewed["report"]["editor"]["name"] == "continual"
        ask(client, "/api/apply", second | {"edit": previewed["edit"]})
        for one in (first, second):
            assert reading(ask(client, "/api/explain", {"text": one["text"]}), "ambiance") == one["target"]
    with contextlib.closing(opened()) as session, TestClient(create_app(session), ADDRESS) as client:
        assert session.num_kept == 2
        ask(client, "/api/undo", {"edit": session.edits[-1].id})
        assert session.num_kept == 1, "what is undone is no longer kept"
        # The same question again, after a restart: the same edit.
        assert ask(client, "/api/preview", second)["edit"] == previewed["edit"]


def test_what_is_made_is_what_was_previewed(client: TestClient) -> None:
    asked = question(client)
    previewed = ask(client, "/api/preview", asked)
    other = ask(client, "/api/apply", question(client, TEXTS[1], "food"))["edit"]
    refused = ask(client, "/api/apply", asked | {"edit": previewed["edit"]}, 409)
    assert refused == {"message": "the model has changed since this was previewed; preview it again", "field": "edit"}
    assert [edit["id"] for edit in client.get("/api/edits").json()["edits"]] == [other]
    ask(client, "/api/undo", {"edit": other})
    assert ask(client, "/api/apply", asked | {"edit": previewed["edit"]})["edit"] == previewed["edit"]
    # There and back: the way back flips weights that the way there has flipped.
    back = ask(client, "/api/apply", asked | {"target": reading(previewed["before"], "service")})["edit"]
    if back is not None and len(client.get("/api/edits").json()["edits"]) == 2:
        answer = client.post("/api/undo", json={"edit": previewed["edit"]})
        assert answer.status_code in (200, 409)
        if answer.status_code == 409:
            assert f"shares weights with {back}" in answer.json()["message"]


def test_nothing_is_made_that_cannot_be_written(
    session: Session, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = question(client)
    before = masks_lib.fingerprint(session.model.masks)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(session._log, "_write", full)
        message = ask(client, "/api/apply", asked, 503)["message"]
    assert "No space left on device" in message and "nothing was changed" in message
    assert masks_lib.fingerprint(session.model.masks) == before and not session.edits
    made = ask(client, "/api/apply", asked)["edit"]
    with monkeypatch.context() as patched:
        patched.setattr(session._log, "_write", full)
        ask(client, "/api/undo", {"edit": made}, 503)
    assert [edit.id for edit in session.edits] == [made]


ASKED = {"text": TEXTS[0], "concept": "service", "target": "Positive"}


@pytest.mark.parametrize(
    ("path", "body", "status", "field", "words"),
    [
        ("explain", b"{", 400, None, "is not JSON"),
        ("explain", b"\xff", 400, None, "is not JSON"),
        ("explain", b"[" * 60_000, 400, None, "is not JSON"),
        ("explain", ["text"], 400, None, "the request is an array; expected a JSON object with 'text'"),
        ("explain", {}, 400, "text", "'text' is missing"),
        ("explain", {"text": 3}, 400, "text", "'text' is a number; expected a string"),
        ("explain", {"text": None}, 400, "text", "'text' is null; expected a string"),
        ("explain", {"text": "a", "txt": "b"}, 400, "txt", "there is no field 'txt' (did you mean 'text'?)"),
        ("explain", b'{"text": "a", "\\ud800": 1}', 400, "\ud800", "there is no field '\\ud800'"),
        ("explain", {"text": "  "}, 400, "text", "'text' is '  '"),
        ("explain", b'{"text": "\\ud800"}', 400, "text", "'text' is not valid Unicode: character 0"),
        ("explain", {"text": "a" * 10_001}, 413, "text", "'text' has 10,001 characters; at most 10,000 are allowed"),
        ("explain", {"text": "a" * 65_536}, 413, None, "at most 65,536 bytes are allowed"),
        ("explain", {"text": "a" * 2_000_000}, 413, None, "at most 65,536 bytes are allowed"),
        (
            "preview",
            ASKED | {"concept": "servce"},
            400,
            "concept",
            "there is no concept 'servce' (did you mean 'service'?)",
        ),
        (
            "preview",
            ASKED | {"target": "positive"},
            400,
            "target",
            "there is no class 'positive' (did you mean 'Positive'?)",
        ),
        ("preview", ASKED | {"target": ["Positive"]}, 400, "target", "'target' is an array; expected a string"),
        ("apply", ASKED | {"edit": 5}, 400, "edit", "'edit' is a number; expected a string or null"),
        ("apply", ASKED | {"concept": "price"}, 400, "concept", "expected one of 'food', 'ambiance', 'service'"),
        ("apply", ASKED | {"edit": "0123456789ab"}, 409, "edit", "preview it again"),
        ("undo", {"edit": "0123456789ab"}, 404, "edit", "there is no active edit '0123456789ab'"),
        ("nothing", {}, 404, None, "POST /api/nothing: Not Found"),
        ("edits", {}, 405, None, "POST /api/edits: Method Not Allowed"),
    ],
    ids=lambda value: None if isinstance(value, (dict, list, bytes)) else str(value)[:20],
)
def test_bad_requests_are_refused_by_name(
    client: TestClient, path: str, body: Any, status: int, field: str | None, words: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(f"/api/{path}", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["field"]) == (status, field), answer.text
    assert words in answer.json()["message"]
    assert client.get("/api/edits").json() == {"edits": []}


def test_a_body_without_a_length_is_bounded_too(client: TestClient) -> None:
    def parts() -> Iterator[bytes]:
        yield from [b'{"text": "'] + [b"a" * 10_000] * 10

    answer = client.post("/api/explain", content=parts(), headers={"Content-Type": "application/json"})
    assert "content-length" not in answer.request.headers
    assert answer.status_code == 413 and "at most 65,536 bytes" in answer.json()["message"]


def test_only_its_own_page_may_ask(client: TestClient) -> None:
    asked = {"text": TEXTS[0]}
    for headers, status in (
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8000"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "[oops"}, 403),
        ({"Host": "localhost:9999"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:8001"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[oops"}, 403),
        ({"Origin": ADDRESS}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
    ):
        given = {"Content-Type": "application/json"} | headers
        answer = client.post("/api/explain", content=json.dumps(asked), headers=given)
        assert answer.status_code == status, (headers, answer.text)
    assert client.get("/", headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 403


def test_a_name_that_was_allowed_is_known(session: Session) -> None:
    with TestClient(create_app(session, host_names=["Pathways.example"]), "http://pathways.example") as client:
        assert client.get("/healthz").status_code == 200


def test_a_token_is_wanted_where_there_is_one(session: Session) -> None:
    with TestClient(create_app(session, token=TOKEN), ADDRESS, follow_redirects=False) as client:
        assert client.get("/healthz").json()["status"] == "ok"
        for path in ("/", "/api/edits", "/openapi.json", "/nothing"):
            answer = client.get(path)
            assert answer.status_code == 401 and "a token is needed" in answer.json()["message"]
            assert answer.headers["www-authenticate"] == "Bearer"
        for shown in ("", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xe9"):
            assert client.get("/api/edits", headers=[(b"Authorization", shown.encode("latin-1"))]).status_code == 401
        assert client.get("/api/edits", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
        assert client.get("/", params={"token": "wrong"}).status_code == 401
        assert client.get("/api/edits", params={"token": TOKEN}).status_code == 401
        answer = client.get("/", params={"token": TOKEN})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(answer.headers["set-cookie"].split("; "))
        assert client.get("/").status_code == 200
        assert client.post("/api/explain", json={"text": TEXTS[0]}).status_code == 200
    assert not is_loopback("0.0.0.0") and not is_loopback("192.0.2.1") and is_loopback("127.0.0.2")


def test_too_much_at_once_is_refused_and_the_rest_is_answered(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_free = threading.Event()
    done = session.explain

    def held(text: str) -> Any:
        assert is_free.wait(60)
        return done(text)

    monkeypatch.setattr(session, "explain", held)
    app = create_app(session, limits=Limits(max_waiting=3))

    async def pressed() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=ADDRESS) as client:
            asked = [asyncio.create_task(client.post("/api/explain", json={"text": TEXTS[0]})) for _ in range(5)]
            await asyncio.wait(asked, timeout=60, return_when=asyncio.FIRST_COMPLETED)
            # The model is at work, and the server answers.
            assert (await client.get("/healthz")).json()["num_waiting"] == 3
            assert (await client.get("/api/edits")).status_code == 200
            is_free.set()
            answers = await asyncio.gather(*asked)
            assert (await client.post("/api/explain", json={"text": TEXTS[0]})).status_code == 200
            return answers

    answers = asyncio.run(pressed())
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 2
    for answer in answers:
        if answer.status_code == 429:
            assert answer.headers["retry-after"] == "1"
            assert "3 requests wait for the model already" in answer.json()["message"]


def test_one_address_may_not_ask_without_end(session: Session) -> None:
    now = [100.0]
    rates = security.Rates(rate=2.0, burst=3, now=lambda: now[0])
    assert [rates.wait("a") for _ in range(4)] == [0, 0, 0, 0.5]
    assert rates.wait("b") == 0
    now[0] += 0.5
    assert [rates.wait("a"), rates.wait("a")] == [0, 0.5]
    for n in range(2 * security.MAX_CLIENTS):
        rates.wait(f"{n}")
    assert len(rates._buckets) == security.MAX_CLIENTS
    with TestClient(create_app(session, limits=Limits(rate=0.1, burst=2)), ADDRESS) as client:
        answers = [client.get("/api/edits") for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[-1].headers["retry-after"] == "10"
        assert client.get("/healthz").status_code == 200


def test_a_slow_sender_is_not_waited_for(session: Session) -> None:
    app = create_app(session, limits=Limits(read_seconds=0.05))

    async def sent() -> httpx.Response:
        async def body() -> Any:
            yield b"{"
            await asyncio.sleep(60)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=ADDRESS) as client:
            return await client.post("/api/explain", content=body(), headers={"Content-Type": "application/json"})

    assert asyncio.run(sent()).status_code == 408


def test_the_document_describes_the_routes(session: Session) -> None:
    app = create_app(session, token=TOKEN)
    with TestClient(app, ADDRESS, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        document = client.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0" and document["info"]["version"]
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    routes = {(route.path, method) for route in app.routes for method in route.methods - {"HEAD"}}
    assert described == routes - {("/", "GET"), ("/openapi.json", "GET")}
    references = set(re.findall(r'"\$ref": "([^"]*)"', json.dumps(document)))
    schemas = document["components"]["schemas"]
    assert references == {f"#/components/schemas/{name}" for name in schemas}
    assert schemas["Order"]["required"] == ["text", "concept", "target"]
    for name, schema in schemas.items():
        bare = [field for field, of in schema["properties"].items() if not of.get("description")]
        assert not bare or name in ("TextPrediction",), f"{name}: {bare} do not stand under 'Attributes:'"
    for path, methods in document["paths"].items():
        for operation in methods.values():
            statuses = set(operation["responses"])
            assert "200" in statuses and operation["summary"]
            assert ("401" in statuses) == ("429" in statuses) == ("security" in operation) == (path != "/healthz")
            assert ("413" in statuses) == ("requestBody" in operation)
            names = re.findall(r"{(\w+)}", path)
            assert [one["name"] for one in operation.get("parameters", [])] == names
    operations = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(set(operations)) == len(operations)


def test_nothing_is_compiled_after_the_warm_up(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    assert list(session.warm_up()) == [24] and session.num_lengths == 1
    assert not session.edits
    with jax.log_compiles():
        for text in (TEXTS[3], TEXTS[2], TEXTS[1] * 20):
            pathway = session.explain(text)
            for lane in pathway.concepts:
                target = next(name for name in lane.probabilities if name != lane.predicted_class)
                asked = schemas_lib.Question(text, lane.name, target)
                edit = session.preview(asked).edit
                if edit is not None:
                    session.apply(schemas_lib.Order(text, lane.name, target, edit))
                    session.undo(edit)
    assert "Compiling" not in caplog.text


def test_every_width_of_a_text_is_warmed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_lib, "WIDTHS", (16, 32, 64))
    with contextlib.closing(Session(tiny_model(num_layers=1), tmp_path / "edits.log")) as session:
        widths = []

        def looked_at(text: str) -> DecisionPathway:
            (batch,) = text_batches(session.model, [text], batch_size=1)
            widths.append(batch.input_ids.shape[1])
            return explain(model(), TEXTS[3:])[0]

        monkeypatch.setattr(session, "explain", looked_at)
        monkeypatch.setattr(session, "_correct", lambda asked: (session_lib.Found(None, False),))
        assert list(session.warm_up()) == widths == [16, 32, 40] and session.num_lengths == 3


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model has no masks"):
        Session(tiny_model(num_layers=1, strategy="joint"), tmp_path / "edits.log")


def test_the_page_is_strict(client: TestClient) -> None:
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    assert directives["default-src"] == "'none'" and directives["connect-src"] == "'self'"
    assert directives["frame-ancestors"] == "'none'" and "unsafe" not in policy
    assert re.fullmatch(r"'sha256-[\w+/=]{44}'", directives["script-src"])
    stated = policy.removesuffix("; frame-ancestors 'none'").replace("'", "&#39;")
    assert f'http-equiv="Content-Security-Policy" content="{stated}"' in answer.text
    assert answer.headers["cache-control"] == "no-store"
    other = client.get("/api/edits").headers
    assert other["content-security-policy"].startswith("default-src 'none'")
    assert other["x-content-type-options"] == "nosniff"
