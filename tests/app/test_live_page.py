"""The live page driven in Chromium, and its server killed."""

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from sparsecbm_jax.app import Session, create_app
from sparsecbm_jax.explanation.pathways import explain
from sparsecbm_jax.intervention.stored_edit import StoredEdit
from sparsecbm_jax.model import saved_model

from tests.support.tiny_model import TEXTS
from tests.support.tiny_session import HOSTILE, model, sample

pytest.importorskip("jinja2", reason="jinja2 not here: pip install 'sparsecbm-jax[report]'")
pytest.importorskip("starlette", reason="starlette not here: pip install 'sparsecbm-jax[app]'")
pytest.importorskip("uvicorn", reason="uvicorn not here: pip install 'sparsecbm-jax[app]'")


import uvicorn

from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.long


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    with contextlib.closing(Session(model(), tmp_path / "edits.log", sample())) as opened:
        yield opened


@pytest.fixture
def address(session: Session) -> Iterator[str]:
    """Of a server in a thread."""
    server = uvicorn.Server(uvicorn.Config(create_app(session), port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(60)


@pytest.fixture
def page(visit: Callable[[str], Any], address: str) -> Any:
    return visit(address)


def test_a_correction_in_the_browser(page: Any, session: Session, tmp_path: Path) -> None:
    assert "None: the model predicts as it was saved." in page.text_content(".active-edits")
    page.fill("#text", TEXTS[0])
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".decided")
    pathway = explain(model(), TEXTS[:1])[0]
    assert page.text_content(".decided") == pathway.label
    assert page.text_content(".review") == TEXTS[0]
    lane = pathway.concepts[2]
    target = next(name for name in lane.probabilities if name != lane.predicted_class)
    # Setting a class, which the page works out by itself, suggests the correction.
    page.click(f".concept[data-concept='2'] .class[data-class='{target}']")
    assert "Label, what if" in page.text_content(".verdict")
    assert page.input_value("#concept") == lane.name and page.input_value("#target") == target
    page.click("button:text('Preview')")
    page.wait_for_selector(".preview")
    assert f"Asked: {lane.name} = {target}" in page.text_content(".place")
    assert "Effect on 4 held-out texts" in page.text_content(".preview")
    assert not session.edits
    page.click("button:text('Apply')")
    page.wait_for_selector(".active-edits table")
    (edit,) = session.edits
    page.wait_for_selector(f"text=Applied: edit {edit.id}")
    corrected = page.locator(".concept[data-concept='2'] .class.predicted .name")
    assert corrected.text_content() == target
    page.set_viewport_size({"width": 390, "height": 844})
    for name in ("Undo", "Download"):
        box = page.locator(f"[aria-label='{name} edit {edit.id}']").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390, "within reach on a phone, without scrolling the table"
    page.fill("#text", TEXTS[1])
    assert "of the text as it was" in page.text_content(".status") and page.is_hidden(".correcting")
    page.fill("#text", TEXTS[0])
    assert page.is_visible(".correcting")
    with page.expect_download() as download:
        page.click("text=Download")
    assert StoredEdit.load(download.value.path()).id == edit.id
    page.reload()
    page.wait_for_selector(f"code:text('{edit.id}')")
    page.fill("#text", TEXTS[0])
    page.click("button:text('Explain')")
    page.wait_for_selector(".decided")
    page.click(f"[aria-label='Undo edit {edit.id}']")
    page.wait_for_selector(f"text=Undone: edit {edit.id}")
    assert not session.edits
    assert page.locator(".concept[data-concept='2'] .class.predicted .name").text_content() == lane.predicted_class
    assert page.problems == []


def test_what_is_typed_stays_text(page: Any) -> None:
    page.fill("#text", HOSTILE)
    page.click("button:text('Explain')")
    page.wait_for_selector(".decided")
    assert page.text_content(".review") == HOSTILE
    page.click("button:text('Preview')")
    page.wait_for_selector("main:not([aria-busy])")
    page.fill("#text", " ")
    page.click("button:text('Explain')")
    page.wait_for_selector(".problem:not(:empty)")
    assert "'text' is ' '" in page.text_content(".problem")
    assert page.get_attribute("#text", "aria-invalid") == "true"
    assert page.evaluate("window.hacked") is None
    assert page.locator("script").count() == 2 and page.locator("img").count() == 0
    assert [one for one in page.problems if "status of 400" not in one] == []


def test_axe_finds_nothing_serious_on_the_live_page(page: Any, axe: str) -> None:
    pathway = explain(model(), TEXTS[:1])[0]
    target = next(name for name in pathway.concepts[0].probabilities if name != pathway.concepts[0].predicted_class)
    page.evaluate(axe)
    page.fill("#text", TEXTS[0])
    page.click("button:text('Explain')")
    page.wait_for_selector(".decided")
    page.select_option("#target", target)
    page.click("button:text('Preview')")
    page.wait_for_selector(".preview")
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = page.evaluate("axe.run().then((result) => result.violations)")
        serious = [each for each in found if each["impact"] in ("serious", "critical")]
        assert not [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in serious]


def test_a_killed_server_loses_no_edit(tmp_path: Path) -> None:
    """A moment of `launch/soak/run.sh server`, which would say what was lost."""
    saved_model.save(model(), tmp_path / "model")
    command = [sys.executable, "launch/soak/server.py", f"--model={tmp_path / 'model'}", "--clients=4", "--seconds=2"]
    # As many devices as the tests have: what they compiled will do.
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    result = subprocess.run(
        [*command, f"--workdir={tmp_path}"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (applied,) = re.findall(r"edits: (\d+) applied", result.stdout)
    assert int(applied) > 0 and "none lost" in result.stdout
    assert "previews read no held-out texts" not in result.stderr


def test_a_server_that_forgets_is_found_out() -> None:
    from launch.soak.server import Client, check

    client = Client(0, acknowledged=["+a", "+b", "-a"])
    assert check({"c"}, [client], {"b", "c"}) == (2, 0)
    with pytest.raises(ValueError, match=r"acknowledged edits are lost: \['b'\]"):
        check({"c"}, [client], {"c"})
    with pytest.raises(ValueError, match=r"undone or never asked for: \['a'\]"):
        check({"c"}, [client], {"a", "b", "c"})
    assert check({"c"}, [client, Client(1, unknown="+"), Client(2, unknown="-b")], {"a", "c"}) == (2, 2)
