"""The page of pathways, in headless Chromium: what it holds, what it computes, who can use it, what it refuses."""

import dataclasses
import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsecbm_jax import report
from sparsecbm_jax.correction.edit_view import EditChange, KernelChange
from sparsecbm_jax.correction.report import CorrectionReport, EditorDescription, TextPrediction
from sparsecbm_jax.correction.request_file import CorrectionRequest
from sparsecbm_jax.evaluation.editing.baselines import oracle_activations
from sparsecbm_jax.explanation.pathways import DecisionPathway, explain
from sparsecbm_jax.intervention import editors
from sparsecbm_jax.report import page as page_lib

from tests.support.tiny_model import TEXTS, tiny_model

pytest.importorskip("jinja2", reason="jinja2 not here: pip install 'sparsecbm-jax[report]'")


TOLERANCE = 1e-6
SUM_TOLERANCE = 1e-5
PHONE = 390
HOSTILE = (
    '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">',
    """<!-- <script> & "quotes" 'and' {{ 7 * 7 }} {% if %} \u2028\u2029 &amp; 🎉 naïve""",
)


@pytest.fixture(scope="module")
def pathways() -> list[DecisionPathway]:
    return explain(tiny_model(num_layers=1), [*TEXTS[:2], *HOSTILE], batch_size=4)


@pytest.fixture(scope="module")
def predictor() -> page_lib.Predictor:
    return report.predictor_weights(tiny_model(num_layers=1))


@pytest.fixture(scope="module")
def comparison(pathways: list[DecisionPathway]) -> report.Comparison:
    """A correction as reports state it, without the time that a real one takes to compile."""
    before = pathways[0]
    lane = before.concepts[2]
    other = next(name for name in lane.probabilities if name != lane.predicted_class)
    shares = dict(zip(lane.probabilities, reversed(lane.probabilities.values()), strict=True))
    changed = dataclasses.replace(lane, predicted_class=other, probabilities=shares)
    after = dataclasses.replace(before, concepts=(*before.concepts[:2], changed))
    asked = CorrectionRequest(before.text, lane.name, other)
    editor = EditorDescription(*editors.describe(editors.fixed_size(0.001)))
    counts = {"num_dropped": 12, "num_grown": 12, "num_weights": 12345}
    edit: Any = None
    readings = {"before": _prediction(before), "after": _prediction(after)}
    made = CorrectionReport(asked, editor, **counts, **readings, edit=edit)
    kernel = KernelChange("layers/attention/query/kernel", dropped=(7,), grown=(5,), rows=(3,))
    change = EditChange(lane.name, 12, 12, (12,), (12,), ((7, 5),), ((5, 7),), (kernel,))
    return report.Comparison(made, before, after, change)


def _prediction(pathway: DecisionPathway) -> TextPrediction:
    return TextPrediction(
        concepts={lane.name: lane.predicted_class for lane in pathway.concepts},
        concept_probabilities={lane.name: lane.probabilities for lane in pathway.concepts},
        label=pathway.label,
        label_probabilities=pathway.label_probabilities,
    )


@pytest.fixture
def open_page(visit: Callable[[str], Any], tmp_path: Path) -> Callable[..., Any]:
    """Opens a page from disk."""

    def opened(*given: Any, **options: Any) -> Any:
        path = tmp_path / "page.html"
        report.write_page(path, *given, **options)
        return visit(path.as_uri())

    return opened


def embedded(page: Any) -> Any:
    return page.evaluate("JSON.parse(document.getElementById('data').textContent)")


def numbers(page: Any, selector: str) -> list[float]:
    """What the page states there, unrounded."""
    return page.eval_on_selector_all(f"{selector} data", "nodes => nodes.map(node => Number(node.value))")


def test_the_page_holds_what_it_was_given(
    open_page: Any, pathways: list[DecisionPathway], comparison: report.Comparison, predictor: page_lib.Predictor
) -> None:
    page = open_page(pathways, [comparison], predictor=predictor)
    given = {
        "pathways": [pathway.to_dict() for pathway in pathways],
        "corrections": [{name: part.to_dict() for name, part in comparison._asdict().items()}],
        "predictor": predictor,
    }
    assert embedded(page) == json.loads(json.dumps(given))
    page.select_option("#choice", index=2)
    assert page.text_content(".decided") == pathways[1].label
    assert page.text_content(".review") == pathways[1].text
    rows = page.locator(".tables tr", has=page.locator("td.shaded"))
    assert rows.count() == len(pathways[1].words)


def test_the_page_asks_nothing_of_a_network(
    open_page: Any, pathways: list[DecisionPathway], predictor: page_lib.Predictor
) -> None:
    page = open_page(pathways, predictor=predictor)
    page.locator("button.class").first.click()
    page.locator("summary").click()
    assert page.requests == [page.url]
    assert page.problems == []
    # Nor could it.
    for attempt in (
        "fetch('data:,x')",
        "new Promise((_, no) => { const i = new Image(); i.onerror = no; i.src = 'data:,' })",
    ):
        assert page.evaluate(f"{attempt}.then(() => 'allowed', () => 'refused')") == "refused"
    assert any("Content Security Policy" in problem for problem in page.problems)


def test_setting_a_concept_gives_the_label_that_python_gives(
    open_page: Any, pathways: list[DecisionPathway], predictor: page_lib.Predictor
) -> None:
    model, pathway = tiny_model(num_layers=1), pathways[0]
    page = open_page([pathway], predictor=predictor)
    activations = np.array([[list(lane.activations.values()) for lane in pathway.concepts]], np.float32)
    for k, lane in enumerate(pathway.concepts):
        for c, name in enumerate(lane.probabilities):
            values = activations[0, k] if name == lane.predicted_class else model.class_activations[k, c]
            (logits,) = np.asarray(oracle_activations(model.heads, activations, k, values).label_logits, np.float64)
            logits -= logits.mean()
            wanted = np.exp(logits) / np.exp(logits).sum()
            page.eval_on_selector(f".concept[data-concept='{k}'] .class[data-class='{name}']", "node => node.click()")
            np.testing.assert_allclose(numbers(page, ".share"), wanted, atol=TOLERANCE)
            assert page.text_content(".decided") == model.schema.labels[wanted.argmax()]
            *steps, logit = numbers(page, ".fall")
            assert logit == pytest.approx(logits[model.schema.labels.index(pathway.label)], abs=SUM_TOLERANCE)
            assert sum(steps) == pytest.approx(logit, abs=TOLERANCE)
            page.eval_on_selector(".reset", "node => node.click()")
    assert numbers(page, ".share") == list(pathway.label_probabilities.values())


def test_the_keyboard_alone_reaches_every_control(
    open_page: Any, pathways: list[DecisionPathway], comparison: report.Comparison, predictor: page_lib.Predictor
) -> None:
    page = open_page(pathways, [comparison], predictor=predictor)
    page.select_option("#choice", index=1)
    page.evaluate(
        """() => { const all = document.querySelectorAll("button:not(:disabled), select, summary, .review");
        all.forEach((node, n) => node.dataset.control = n); window.reached = new Set();
        addEventListener("focusin", (event) => window.reached.add(event.target.dataset.control)); }"""
    )
    num_controls = page.locator("[data-control]").count()
    for _ in range(num_controls):
        page.keyboard.press("Tab")
    assert page.evaluate("window.reached.size") == num_controls
    page.locator(".concept[data-concept='1'] .pin").focus()
    assert page.locator(".active").count() == 3  # subnetwork, concept, contribution
    assert page.locator(".links .on").count() > 2
    assert "purple words speak for ambiance" in page.text_content(".shading span:not(.absent)")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert "With ambiance = Negative the label is" in page.text_content(".status")
    page.locator(".review").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".readout data").count() == len(pathways[0].concepts)
    assert float(page.locator(".readout data").first.get_attribute("value")) == pathways[0].concepts[0].word_scores[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(
    open_page: Any,
    axe: str,
    pathways: list[DecisionPathway],
    comparison: report.Comparison,
    predictor: page_lib.Predictor,
    scheme: str,
) -> None:
    page = open_page(pathways, [comparison], predictor=predictor)
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.evaluate(axe)
    for index in (0, 1):
        page.select_option("#choice", index=index)
        page.locator(".pin").first.click()
        page.locator("button.class").last.click()
        page.locator("summary").first.click()
        found = page.evaluate("axe.run().then((result) => result.violations)")
        serious = [each for each in found if each["impact"] in ("serious", "critical")]
        assert not [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in serious]


def test_a_review_stays_text(open_page: Any, pathways: list[DecisionPathway], predictor: page_lib.Predictor) -> None:
    for pathway in pathways[2:]:
        lane = dataclasses.replace(pathway.concepts[0], name=HOSTILE[0], predicted_class="<b>")
        page = open_page([dataclasses.replace(pathway, concepts=(lane,), label="</script>"), pathway])
        assert page.text_content(".review") == pathway.text
        assert page.text_content(".pin") == HOSTILE[0]
        page.select_option("#choice", index=1)
        assert page.text_content(".review") == pathway.text
        assert page.evaluate("window.hacked") is None
        assert page.locator("script").count() == 2
        assert page.locator("img").count() == 0
        assert page.problems == []


def test_nothing_overflows_on_a_phone(
    open_page: Any, pathways: list[DecisionPathway], comparison: report.Comparison, predictor: page_lib.Predictor
) -> None:
    long = "a" * 300
    (lane, *rest) = pathways[0].concepts
    probabilities = {long: 0.9, **lane.probabilities}
    wide = dataclasses.replace(lane, name=long, predicted_class=long, probabilities=probabilities)
    (word, *words) = pathways[0].words
    word = dataclasses.replace(word, text=long, end=300)
    words = [dataclasses.replace(each, start=each.start + 300, end=each.end + 300) for each in words]
    stretched = dataclasses.replace(
        pathways[0], text=long + pathways[0].text, words=(word, *words), concepts=(wide, *rest)
    )
    page = open_page([pathways[0], stretched], [comparison])
    page.set_viewport_size({"width": PHONE, "height": 844})
    for index in range(3):
        page.select_option("#choice", index=index)
        page.locator("summary").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
        spilling = "nodes => nodes.filter(n => n.getBoundingClientRect().right > innerWidth).map(n => n.className)"
        assert page.eval_on_selector_all(".card, .fall, .share, .class, .review, h1, p", spilling) == []


def test_signed_scores_show_their_sign_and_their_method(open_page: Any) -> None:
    model = tiny_model(num_layers=1)
    (pathway,) = explain(model, TEXTS[:1], method="integrated_gradients", baseline="pad", num_steps=8)
    page = open_page([pathway])
    stated = "words by integrated_gradients (signed, from pad in 8 steps)"
    assert stated in page.text_content(".explained")
    k, lane = next((k, lane) for k, lane in enumerate(pathway.concepts) if min(lane.word_scores) < 0)
    page.locator(".pin").nth(k).click()
    assert f"purple words speak for {lane.name} = {lane.explained_class}" in page.text_content(
        ".shading span:not(.absent)"
    )
    against = [word.text for word, score in zip(pathway.words, lane.word_scores, strict=True) if score < 0]
    assert page.locator(".word.against").all_text_contents() == against
    page.locator("summary").click()
    row = page.locator(".table", has_text=f"scored for, by {stated[9:]}").locator("tbody tr").nth(k).locator("td")
    stated_numbers = (lane.explained_logit, lane.baseline_logit, sum(lane.word_scores))
    assert row.all_text_contents() == [lane.explained_class, *(f"{n:+.2f}".replace("-", "−") for n in stated_numbers)]
    cells = page.locator(".table", has_text="Score of each word").locator(f"tbody tr td:nth-child({k + 2})")
    signs = ["−" if score < 0 else "+" for score in lane.word_scores]
    assert [text[0] for text in cells.all_text_contents()] == signs
    assert page.problems == []


def test_a_dense_model_and_no_predictor(open_page: Any) -> None:
    (pathway,) = explain(tiny_model(num_layers=1), TEXTS[1:2], method="gradient_norm")
    first, *rest = pathway.concepts
    page = open_page([dataclasses.replace(pathway, concepts=(dataclasses.replace(first, subnetwork=None), *rest))])
    assert "words by gradient_norm (no sign)" in page.text_content(".explained")
    assert page.locator(".word.against").count() == 0
    assert page.text_content(".subnetwork .small") == "all weights (dense)"
    assert page.locator("button.class").count() == 0  # without the predictor nothing can be set
    assert page.problems == []


def test_a_correction_states_what_changed(open_page: Any, comparison: report.Comparison) -> None:
    page = open_page([], [comparison])
    text = page.text_content("main")
    changed = comparison.report
    assert f"Asked: {changed.request.concept} = {changed.request.target}" in text and "repaired" in text
    assert "12 weights dropped" in text and f"{100 * changed.changed_share:.4f} % of the backbone’s 12,345" in text
    after = page.locator(".pathway").last
    assert f"changed: was {changed.before.concepts['service']}" in after.text_content()
    assert "12 dropped, 12 grown" in after.text_content()
    assert page.locator(".pathway").first.locator(".changed").count() == 0
    changes = page.locator(".table", has_text="Where the mask of service changed").locator("tbody tr")
    assert changes.locator("th, td").all_text_contents() == ["attention query", "−7 +5, 3 rows"]
    # Both are taken apart for one label, at first that after the edit, and then the one that is pressed in either.
    for label in (
        None,
        next(name for name in comparison.after.label_logits if name != comparison.after.explained_label),
    ):
        if label:
            page.locator(".pathway").first.locator(".share", has_text=label).click()
        sums = page.locator(".outcome .hint").all_text_contents()
        name = label or comparison.after.explained_label
        wanted = f"Base and contributions sum to the logit of label {name}, against the average text and label."
        assert sums == [wanted] * 2
    page = open_page([], [comparison._replace(change=None)])
    assert "Where the mask" not in page.text_content("main") and page.problems == []


def test_a_page_stays_below_two_megabytes(pathways: list[DecisionPathway], tmp_path: Path) -> None:
    size = len(page_lib.embed_json(pathways[0].to_dict()).encode())
    many = [pathways[0]] * (page_lib.MAX_BYTES // size)
    num_shown = report.write_page(tmp_path / "many.html", many)
    page = (tmp_path / "many.html").read_bytes()
    assert page_lib.MAX_BYTES - 5 * size < len(page) <= page_lib.MAX_BYTES
    assert 0 < num_shown < len(many)
    assert f"The first {num_shown} of {len(many)} texts are shown" in page.decode()
    with pytest.raises(ValueError, match="at most 2,000,000 are allowed"):
        report.render_page([dataclasses.replace(pathways[0], text="a" * page_lib.MAX_BYTES)])
    with pytest.raises(ValueError, match="there is no pathway to show"):
        report.render_page([])


def test_a_notebook_shows_a_pathway(browser: Any, pathways: list[DecisionPathway]) -> None:
    shown = report.show(pathways[2])._repr_html_()
    assert html.escape(page_lib.embed_json(HOSTILE[0])) in shown
    page = browser.new_page()
    page.set_content(shown)
    assert page.frame_locator("iframe").locator(".review").text_content() == HOSTILE[0]
    page.close()


@pytest.mark.parametrize(("reference", "wanted"), [("mean", "the average text and label."), ("zero", "from zero.")])
def test_the_page_says_where_contributions_are_counted_from(open_page: Any, reference: Any, wanted: str) -> None:
    page = open_page(explain(tiny_model(num_layers=1), TEXTS[:1], reference=reference))
    assert page.text_content(".outcome .hint").endswith(wanted)
