"""Makes the pictures of README.md and of the pages from a saved model; see make.sh.

    python docs/images/make_pictures.py MODEL

MODEL is the folder of a saved model that has masks, in the folder of its run, of which report.png is made. The other
pictures show the reviews below, which were written for them: no data set is shown. Needs the extra `app`, Playwright
and Chromium.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import uvicorn
from playwright import sync_api

import sparsecbm_jax
from sparsecbm_jax import editors
from sparsecbm_jax.app import Session, create_app
from sparsecbm_jax.correction import CorrectionReport, CorrectionRequest
from sparsecbm_jax.correction.edit_view import view_edit
from sparsecbm_jax.data import Examples, load_dataset
from sparsecbm_jax.model.sparse_cbm import SparseCBM
from sparsecbm_jax.report import Comparison, predictor_weights, read_report, write_page, write_report

FOLDER = Path(__file__).resolve().parent
WIDTH, HEIGHT = 1280, 900
MARGIN = 24  # pixels around what a picture shows
NUM_HELD_OUT = 64
PATIENCE = 300_000  # milliseconds, in which a page's programs are compiled
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Review(NamedTuple):
    """A review of our own, and what it says of each concept that it speaks of."""

    text: str
    concepts: Mapping[str, str]


PATHWAY_TEXT = "The food was delicious, but our waiter was slow, and the music was far too loud."
REVIEWS = (
    Review(
        "The lamb was tender and the bread still warm, but our waiter forgot us twice. Candles on every table made up "
        "for some of it.",
        {"food": "Positive", "service": "Negative", "ambiance": "Positive"},
    ),
    Review(
        "A lovely old dining room, though you have to shout across the table. The risotto was undercooked, and the "
        "staff could not have been kinder about it.",
        {"food": "Negative", "service": "Positive", "ambiance": "Positive", "noise": "Negative"},
    ),
    Review(
        "I had hoped for more from the kitchen: the soup came lukewarm and the fish was dry. At least it was quiet "
        "enough to talk, and nobody hurried us.",
        {"food": "Negative", "service": "Positive", "noise": "Positive"},
    ),
    Review(
        "You will leave neither hungry nor poor. The noodles are the best in town; the plastic chairs and the neon "
        "light are not.",
        {"food": "Positive", "ambiance": "Negative"},
    ),
)


def choose_request(model: SparseCBM) -> CorrectionRequest:
    """Returns a concept of a review that the model predicts incorrectly; of a model without one, its least sure one."""
    schema = model.schema
    predictions = sparsecbm_jax.predict(model, [review.text for review in REVIEWS])
    cells = [
        (n, schema.concepts.index(concept), target)
        for n, review in enumerate(REVIEWS)
        for concept, target in review.concepts.items()
        if concept in schema.concepts and target in schema.classes
    ]
    for n, k, target in cells:
        predicted = schema.classes[predictions.concepts[n, k]]
        if predicted != target:
            print(f"corrected: {schema.concepts[k]} of review {n + 1}, predicted as {predicted}, is {target}")
            return CorrectionRequest(REVIEWS[n].text, schema.concepts[k], target)
    ranked = np.sort(predictions.concept_probabilities, axis=-1)
    n, k, _ = min(cells, key=lambda cell: ranked[cell[0], cell[1], -1] - ranked[cell[0], cell[1], -2])
    other = schema.classes[np.argsort(predictions.concept_probabilities[n, k])[-2]]
    print(f"all concepts are correct; the least sure one is set to {other}: {schema.concepts[k]} of review {n + 1}")
    return CorrectionRequest(REVIEWS[n].text, schema.concepts[k], other)


def held_out(model: SparseCBM) -> Examples | None:
    """Returns texts of the model's own validation split; None where it is not here."""
    try:
        settings = sparsecbm_jax.from_config_dict(model.metadata["run_config"])
        rows = load_dataset(settings.data).splits["validation"]
    except (KeyError, ValueError, OSError, ImportError) as error:
        print(f"the live page's preview shows no held-out texts: {error}")
        return None
    chosen = np.unique(np.linspace(0, len(rows.texts) - 1, NUM_HELD_OUT).round().astype(int))
    return rows._replace(
        texts=tuple(rows.texts[n] for n in chosen),
        concepts=rows.concepts[chosen],
        labels=rows.labels[chosen],
        groups=None,
        row_ids=rows.row_ids[chosen],
    )


def compare(model: SparseCBM, corrected: SparseCBM, report: CorrectionReport) -> Comparison:
    """Returns both pathways of a corrected text, towards the requested class."""
    request = report.request
    target = {request.concept: request.target}
    before, after = (sparsecbm_jax.explain(one, [request.text], target)[0] for one in (model, corrected))
    return Comparison(report, before, after, view_edit(report.edit, model.config.backbone, model.schema.concepts))


class Camera:
    """Takes pictures of pages, in light colours."""

    def __init__(self, browser: sync_api.Browser, folder: Path = FOLDER) -> None:
        """Opens a window.

        Args:
            browser: Chromium.
            folder: where the pictures go.
        """
        self._folder = folder
        context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        context.set_default_timeout(PATIENCE)
        self._page = context.new_page()

    def open(self, address: str) -> sync_api.Page:
        """Opens a page."""
        self._page.goto(address)
        return self._page

    def take(self, name: str, first: str, last: str, widest: str = "") -> None:
        """Writes a picture of what is on the page from the top of one element to the bottom of another.

        Args:
            name: of the file, without ending.
            first: selector of the upper element.
            last: selector of the lower element.
            widest: selector of what has to fit in; by default the picture is as wide as the page.
        """
        self._page.mouse.move(0, 0)
        self._page.evaluate("document.activeElement?.blur()")
        start = max(0.0, self._edge(first, "top") - MARGIN)
        height = self._edge(last, "bottom") + MARGIN - start
        width = self._edge(widest, "right") + MARGIN if widest else WIDTH
        clip: Any = {"x": 0, "y": start, "width": width, "height": height}
        self._page.screenshot(path=self._folder / f"{name}.png", full_page=True, clip=clip, animations="disabled")
        print(f"{name}.png: {round(width)} × {round(height)}")

    def _edge(self, selector: str, side: str) -> float:
        """Where on the page the outermost edge is of the elements that a selector finds."""
        self._page.wait_for_selector(selector)
        script = f"found => found.map(e => e.getBoundingClientRect().{side} + {'0' if side == 'right' else 'scrollY'})"
        edges = self._page.locator(selector).evaluate_all(script)
        return min(edges) if side == "top" else max(edges)


@contextlib.contextmanager
def serving(model: SparseCBM, folder: Path) -> Iterator[str]:
    """Gives the address of a live page whose corrections are minimal."""
    with contextlib.closing(Session(model, folder / "edits.log", held_out(model), editor=editors.minimal())) as session:
        server = uvicorn.Server(uvicorn.Config(create_app(session), port=0, log_level="warning", ws="none"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started and thread.is_alive():
            thread.join(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
        server.should_exit = True
        thread.join()


def take_all(model: SparseCBM, run_folder: Path, camera: Camera, folder: Path) -> None:
    """Takes the four pictures.

    Args:
        model: with masks.
        run_folder: of its run.
        camera: of a browser.
        folder: for pages that are not kept.
    """
    predictor = predictor_weights(model)
    pathway = sparsecbm_jax.explain(model, [PATHWAY_TEXT])[0]
    write_page(folder / "pathway.html", [pathway], predictor=predictor)
    camera.open((folder / "pathway.html").as_uri())
    camera.take("pathway", ".verdict", ".lanes")

    request = choose_request(model)
    corrected, report = sparsecbm_jax.correct(model, request, editor=editors.minimal())
    write_page(folder / "correction.html", [], [compare(model, corrected, report)], predictor=predictor)
    camera.open((folder / "correction.html").as_uri())
    camera.take("correction", ".correction", ".pair .review")

    with serving(model, folder) as address:
        page = camera.open(address)
        page.fill("#text", request.text)
        page.click("button:text('Explain')")
        page.wait_for_selector(".decided")
        page.select_option("#concept", request.concept)
        page.select_option("#target", request.target)
        page.click("button:text('Preview')")
        page.wait_for_selector(".preview, .status:has-text('nothing would change')")
        camera.take("live_page", ".masthead", ".preview")

    write_report(folder / "report.html", read_report(run_folder))
    camera.open((folder / "report.html").as_uri())
    camera.take(
        "report", "main > section:has(h2:text-is('Evaluation'))", "main > section:has(h2:text-is('Evaluation'))"
    )


def main() -> None:
    """Takes the pictures of the model that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("expected one argument, the folder of a saved model")
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        sys.exit("chromium is not here; on Debian: apt-get install chromium")
    model = sparsecbm_jax.load(sys.argv[1])
    if model.masks is None:
        sys.exit(f"{sys.argv[1]} is a dense model; the pictures show subnetworks")
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, unroll_layers=False))
    with tempfile.TemporaryDirectory() as folder, sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        take_all(model, Path(sys.argv[1]).resolve().parent, Camera(browser), Path(folder))
        browser.close()


if __name__ == "__main__":
    main()
