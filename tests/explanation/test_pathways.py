"""Pathways: sums that add up, gradients that an independent model confirms, words, batches and the terminal."""

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsecbm_jax.backbones import maskable_paths
from sparsecbm_jax.data.words import read_words
from sparsecbm_jax.explanation import pathways as pathways_lib
from sparsecbm_jax.explanation.as_text import CSV_COLUMNS, csv_header, csv_rows, render_text
from sparsecbm_jax.explanation.pathways import DecisionPathway, explain, explain_stream, pathway_schema
from sparsecbm_jax.model import saved_model
from sparsecbm_jax.model.predictions import predict
from sparsecbm_jax.model.sparse_cbm import SparseCBM

from tests.runtime.test_json_schema import problem
from tests.support.mains import run_main
from tests.support.numpy_model import as_float64, complex_gradient, concept_logits, leaf_at, pooled
from tests.support.tiny_model import TEXTS, tiny_model

SUM_TOLERANCE = 1e-5
BATCH_TOLERANCE = 1e-5
# float32 gradients against complex-step derivatives in float64.
GRADIENT_TOLERANCE = 1e-4
# All concepts by name, so that those that are read as unknown have words, too.
NAMED = dict.fromkeys(("food", "ambiance", "service"), "predicted")


@pytest.fixture(scope="module", params=["sparse", "joint"])
def model(request: pytest.FixtureRequest) -> SparseCBM:
    return tiny_model(num_layers=1, strategy=request.param)


@pytest.fixture(scope="module")
def pathways(model: SparseCBM) -> list[DecisionPathway]:
    return explain(model, TEXTS)


def test_contributions_and_bias_add_up_to_the_logit(model: SparseCBM, pathways: list[DecisionPathway]) -> None:
    for pathway in pathways:
        for label, logit in pathway.label_logits.items():
            total = pathway.base[label] + sum(lane.contributions[label] for lane in pathway.concepts)
            assert total == pytest.approx(logit, abs=SUM_TOLERANCE)
        for lane in pathway.concepts:
            assert lane.contribution == lane.contributions[pathway.explained_label]


def test_a_pathway_says_what_the_model_predicts(model: SparseCBM, pathways: list[DecisionPathway]) -> None:
    predicted = predict(model, TEXTS)
    for n, pathway in enumerate(pathways):
        assert pathway.text == TEXTS[n]
        assert pathway.target == "predicted"
        assert pathway.label == pathway.explained_label == model.schema.labels[predicted.labels[n]]
        np.testing.assert_allclose(
            list(pathway.label_probabilities.values()), predicted.label_probabilities[n], atol=SUM_TOLERANCE
        )
        for k, lane in enumerate(pathway.concepts):
            assert lane.name == model.schema.concepts[k]
            assert lane.predicted_class == lane.explained_class == model.schema.classes[predicted.concepts[n, k]]
            np.testing.assert_allclose(
                list(lane.probabilities.values()), predicted.concept_probabilities[n, k], atol=SUM_TOLERANCE
            )
            assert len(lane.word_scores) == len(pathway.words)
            assert lane.shows_words == (lane.predicted_class != "unknown")


@pytest.mark.parametrize("asked", ["predicted", "Positive"])
def test_word_scores_are_those_of_an_independent_model(model: SparseCBM, asked: str) -> None:
    target = "predicted" if asked == "predicted" else dict.fromkeys(model.schema.concepts, asked)
    text = TEXTS[2]
    (pathway,) = explain(model, [text], target, method="gradient_norm")
    params, heads = as_float64(dict(model.params)), as_float64(dict(model.heads))
    token_ids = model.tokenizer(text)["input_ids"]
    words = params["embed"]["word"]["embedding"][token_ids]
    (reading,) = read_words([text], model.tokenizer, model.max_length)
    assert any(len(tokens) > 1 for tokens in reading.tokens)
    for k, lane in enumerate(pathway.concepts):
        weights = {path: leaf_at(params, path) for path in maskable_paths(model.config.backbone)}
        masks = model.masks or dict.fromkeys(weights, np.ones(3, bool))
        kernels = {path: np.where(masks[path][k], weight, 0) for path, weight in weights.items()}
        c = model.schema.classes.index(lane.explained_class)

        def logit(e: np.ndarray, k: int = k, c: int = c, kernels: Any = kernels) -> np.ndarray:
            return concept_logits(heads, k, pooled(model.config.backbone, params, kernels, e))[c]

        gradient = complex_gradient(logit, words)
        wanted = [np.linalg.norm(gradient[list(tokens)]) for tokens in reading.tokens]
        np.testing.assert_allclose(lane.word_scores, wanted, rtol=GRADIENT_TOLERANCE)


def test_a_pathway_does_not_depend_on_its_batch(model: SparseCBM, pathways: list[DecisionPathway]) -> None:
    texts = [*TEXTS[::-1], *[TEXTS[2] * 2] * 3]
    # Batches of four, of other companions and of other widths.
    for alone, together in zip(pathways, explain(model, texts, batch_size=4)[3::-1], strict=True):
        assert alone.words == together.words
        for one, other in zip(alone.concepts, together.concepts, strict=True):
            np.testing.assert_allclose(one.word_scores, other.word_scores, rtol=1e-4, atol=BATCH_TOLERANCE)
            assert one.contributions == pytest.approx(other.contributions, abs=BATCH_TOLERANCE)
            assert one.probabilities == pytest.approx(other.probabilities, abs=BATCH_TOLERANCE)


def test_a_pathway_is_json(pathways: list[DecisionPathway]) -> None:
    for pathway in pathways:
        content = json.loads(pathway.to_json())
        assert content == pathway.to_dict()
        assert "\n" not in pathway.to_json()
        assert content["words"][0].keys() == {"text", "start", "end", "is_read"}
        assert content["concepts"][0]["word_scores"] == list(pathway.concepts[0].word_scores)
        assert problem(content, pathway_schema(), pathway_schema()) is None
        assert problem({**content, "method": "guess"}, pathway_schema(), pathway_schema()) == "$.method is 'guess'"


def test_targets() -> None:
    model = tiny_model(num_layers=1)
    (pathway,) = explain(model, TEXTS[2:3], "bad")
    assert (pathway.target, pathway.explained_label) == ("bad", "bad")
    assert pathway.concepts[0].contribution == pathway.concepts[0].contributions["bad"]
    assert all(lane.explained_class == lane.predicted_class for lane in pathway.concepts)
    (pathway,) = explain(model, TEXTS[2:3], {"food": "Positive", "label": "bad"})
    assert (pathway.target, pathway.explained_label) == ("food=Positive, label=bad", "bad")
    assert pathway.concepts[0].explained_class == "Positive"
    for target, message in (
        ("goood", "there is no label 'goood'"),
        ({"foood": "Positive"}, r"there is no concept 'foood' .did you mean 'food'"),
        ({"food": "positiv"}, r"there is no class 'positiv' .did you mean 'Positive'"),
    ):
        with pytest.raises(ValueError, match=message):
            explain(model, TEXTS[:1], target)


def test_what_cannot_be_explained_is_refused() -> None:
    model = tiny_model(num_layers=1)
    for texts, message in (
        (["fine", " \t"], r"texts\[1\] is ' \\t'"),
        (["\x00"], r"texts\[0\] is '\\x00', in which the tokeniser finds nothing to read"),
        (["fine", "\udcff"], r"texts\[1\] is not valid Unicode"),
    ):
        with pytest.raises(ValueError, match=message):
            explain(model, texts)
    with pytest.raises(TypeError, match="expected a sequence of texts"):
        explain(model, "fine")
    with pytest.raises(ValueError, match="batch_size is 0"):
        explain(model, ["fine"], batch_size=0)
    with pytest.raises(ValueError, match="strategy 'standard' has no concepts to explain"):
        explain(tiny_model(num_layers=1, strategy="standard"), ["fine"])
    broken = {**model.heads, "projector": {**model.heads["projector"], "bias": np.full((3, 3), np.nan, np.float32)}}
    with pytest.raises(ValueError, match=r"the model's output for .*well-made.* is not finite"):
        explain(dataclasses.replace(model, heads=broken), TEXTS[2:3])
    assert explain(model, []) == []


def test_hostile_texts_are_explained_and_shown_escaped() -> None:
    model = tiny_model(num_layers=1)
    texts = ["\x1b[2Jgreat!!!\x07", "🎉 great", "great " * 1000, "a" * 5000]
    pathways = explain(model, texts)
    assert [pathway.is_truncated for pathway in pathways] == [False, False, True, False]
    for pathway in pathways:
        shown = render_text(pathway)
        assert all(char.isprintable() or char == "\n" for char in shown)
        assert max(map(len, shown.split("\n"))) < 400
        json.loads(pathway.to_json())
    unread = [word.is_read for word in pathways[2].words].index(False)
    assert set(pathways[2].concepts[0].word_scores[unread:]) == {0.0}


def test_render_text() -> None:
    pathway = explain(tiny_model(num_layers=1), TEXTS[2:3], {"food": "Positive"}, method="gradient_norm")[0]
    lines = render_text(pathway, top=2).split("\n")
    assert lines[0] == f'"{TEXTS[2]}"'
    assert lines[1].startswith(f"label: {pathway.label} ")
    assert lines[2] == "explained: food=Positive; words by gradient_norm (no sign)"
    assert f"base {pathway.base[pathway.label]:+.3f}" in lines[3]
    food = pathway.concepts[0]
    assert f"{food.predicted_class}" in lines[4] and f"{food.contribution:+.3f}" in lines[4]
    assert f"{food.subnetwork.density:.1%} of weights" in lines[4]
    assert lines[5].strip().startswith("for Positive: ")
    top = max(zip(food.word_scores, pathway.words, strict=True), key=lambda pair: pair[0])
    assert f"for Positive: {top[1].text} {top[0]:.3g}" in lines[5]
    assert lines[10] == f"  why {pathway.explained_label!r} and not {pathway.foil!r}: " + ", ".join(
        f"{lane.name} {lane.contrast:+.3f}" for lane in pathway.concepts
    )
    assert len(lines) == 4 + 2 * 3 + 1
    stars = dataclasses.replace(
        pathway,
        expected_label=3.25,
        concepts=tuple(dataclasses.replace(lane, effect=-0.5) for lane in pathway.concepts),
    )
    last = render_text(stars).split("\n")[-1]
    assert last == "  expected label 3.25, moved by food -0.50, ambiance -0.50, service -0.50"


def signed(pathway: DecisionPathway) -> DecisionPathway:
    """The same with every second score below zero."""
    concepts = tuple(
        dataclasses.replace(lane, word_scores=tuple((-1) ** i * s for i, s in enumerate(lane.word_scores)))
        for lane in pathway.concepts
    )
    path = {"method": "integrated_gradients", "is_signed": True, "baseline": "zero", "num_steps": 8}
    return dataclasses.replace(pathway, concepts=concepts, **path)


def test_signs_are_shown_and_do_not_change_the_order() -> None:
    (unsigned,) = explain(tiny_model(num_layers=1), TEXTS[2:3], NAMED, method="gradient_norm")
    lines = render_text(signed(unsigned), top=99).split("\n")
    assert lines[2].endswith("words by integrated_gradients (signed, from zero in 8 steps)")
    plain = [shown.split() for shown in render_text(unsigned, top=99).split("\n")[5].strip().split("  ")]
    for (word, score), shown in zip(plain, lines[5].strip().split("  "), strict=True):
        assert shown in (f"{word} +{score}", f"{word} -{score}")
    assert "-" in lines[5]


def test_csv() -> None:
    text = 'great,\n"=1+1"'
    (pathway,) = explain(tiny_model(num_layers=1), TEXTS[3:4], NAMED)
    pathway = dataclasses.replace(signed(pathway), text=text)
    assert [word.text for word in pathway.words] == ["great"]
    rows = list(csv.DictReader(io.StringIO(csv_header(2) + csv_rows(pathway, 7, 2))))
    assert list(rows[0]) == [*CSV_COLUMNS, "word_1", "score_1", "word_2", "score_2"]
    for row, lane in zip(rows, pathway.concepts, strict=True):
        assert (row["text_number"], row["text"], row["concept"], row["method"]) == (
            "7",
            text,
            lane.name,
            pathway.method,
        )
        assert float(row["probability"]) == lane.probabilities[lane.predicted_class]
        assert (row["word_1"], float(row["score_1"])) == ("great", lane.word_scores[0])
        assert (row["word_2"], row["score_2"]) == ("", "")


def test_a_stream_reads_no_further_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(num_layers=1)
    monkeypatch.setattr(pathways_lib, "WINDOW_BATCHES", 2)
    given: list[str] = []

    def endless() -> Iterator[str]:
        for text in itertools.cycle(TEXTS):
            given.append(text)
            yield text

    stream = explain_stream(model, endless(), batch_size=2)
    assert not given
    found = [pathway.text for pathway in itertools.islice(stream, 5)]
    assert found == given[:5] and len(given) == 8
    stream = explain_stream(model, iter([*TEXTS, "fine", " "]), batch_size=2)
    assert [next(stream).text for _ in TEXTS] == list(TEXTS)
    with pytest.raises(ValueError, match=r"texts\[5\] is ' '"):
        next(stream)
    # What is asked is looked at before any text.
    with pytest.raises(ValueError, match="there is no label 'goood'"):
        explain_stream(model, endless(), "goood")
    with pytest.raises(TypeError, match="expected a sequence of texts"):
        explain_stream(model, "fine")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model.save(tiny_model(num_layers=1), tmp_path_factory.mktemp("saved") / "model")


def test_launch_explain(saved: Path, tmp_path: Path) -> None:
    reviews = tmp_path / "reviews.txt"
    reviews.write_text(f"{TEXTS[0]}\n\n{TEXTS[1]}\r\n", encoding="utf-8")
    output = tmp_path / "pathways.jsonl"
    done = run_main(
        "explain.py",
        f"--model={saved}",
        "--text=great 🎉",
        f"--file={reviews}",
        "--format=json",
        f"--output={output}",
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (0, f"3 explained: {output}\n"), done.stderr
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    wanted = explain(tiny_model(num_layers=1), ["great 🎉", *TEXTS[:2]])
    assert [pathway["text"] for pathway in found] == [pathway.text for pathway in wanted]
    assert [pathway["label"] for pathway in found] == [pathway.label for pathway in wanted]


def test_launch_explain_as_a_table(saved: Path, tmp_path: Path) -> None:
    named = [f"--target={concept}=predicted" for concept in NAMED]
    asked = ("--format=csv", "--method=gradient_x_input", "--top=1", *named)
    done = run_main("explain.py", f"--model={saved}", f"--text={TEXTS[3]}", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["concept"] for row in rows] == ["food", "ambiance", "service"]
    assert {row["method"] for row in rows} == {"gradient_x_input"}
    assert {row["word_1"] for row in rows} == {"great"} and all(float(row["score_1"]) for row in rows)


def test_launch_explain_as_a_page(saved: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "pathways.html"
    asked = ("--format=html", f"--output={page}", "--method=integrated_gradients", "--baseline=pad", "--num_steps=4")
    done = run_main("explain.py", f"--model={saved}", "--text=great 🎉", f"--text={TEXTS[3]}", *asked, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"2 explained: {page}\n"), done.stderr
    written = page.read_text(encoding="utf-8")
    assert "great 🎉" in written
    assert '"method":"integrated_gradients","is_signed":true,"baseline":"pad","num_steps":4' in written


def test_launch_explain_prints_the_schema(tmp_path: Path) -> None:
    done = run_main("explain.py", "--schema", cwd=tmp_path)
    assert json.loads(done.stdout) == pathway_schema(), done.stderr


def test_launch_explain_prints_the_subnetworks(saved: Path, tmp_path: Path) -> None:
    output = tmp_path / "subnetworks.json"
    done = run_main("explain.py", f"--model={saved}", "--subnetworks", f"--output={output}", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"written: {output}\n"), done.stderr
    assert [one["name"] for one in json.loads(output.read_text())["concepts"]] == ["food", "ambiance", "service"]


def test_launch_benchmark_explanation(saved: Path, tmp_path: Path) -> None:
    output = tmp_path / "explanation.json"
    asked = ("--num_texts=3", "--num_rounds=1", "--parts=speed,memory,completeness", "--num_steps=4")
    data = "--config=configs/quickstart.py:tiny"
    done = run_main("benchmarks/explanation.py", f"--model={saved}", data, *asked, f"--output={output}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in (
        "3 texts of synthetic",
        "round 1/1: forward",
        "explanation / forward: ",
        "MB after 3 texts",
        "zero           4",
    ):
        assert part in done.stdout
    report = json.loads(output.read_text())
    assert report["speed"]["ratio"] == report["speed"]["explanation"][0] / report["speed"]["forward"][0]
    assert len(report["completeness"]["zero, 4"]["apart"]) == 3 * 3


def test_launch_intervene(saved: Path, tmp_path: Path) -> None:
    done = run_main(
        "intervene.py",
        f"--model={saved.relative_to(saved.parent)}",
        f"--text={TEXTS[0]}",
        "--concept=service",
        "--target=Negative",
        "--editor=fixed_size",
        "--drop_fraction=0.02",
        f"--save={tmp_path / 'corrected'}",
        f"--html={tmp_path / 'correction.html'}",
        cwd=saved.parent,
    )
    assert done.returncode == 0, done.stderr
    assert f"page: {tmp_path / 'correction.html'}" in done.stdout
    assert '"target":"service=Negative"' in (tmp_path / "correction.html").read_text(encoding="utf-8")
    assert "asked: service = Negative; repaired" in done.stdout
    assert f"saved: {tmp_path / 'corrected'}" in done.stdout
    corrected = saved_model.load(tmp_path / "corrected")
    assert predict(corrected, TEXTS[:1]).concepts[0, 2] == 0


def test_a_model_without_known_texts_is_corrected_by_the_minimal_edit(saved: Path, tmp_path: Path) -> None:
    asked = [f"--model={saved}", f"--text={TEXTS[0]}", "--concept=service", "--target=Negative"]
    done = run_main("intervene.py", *asked, "--log=edits.log", cwd=tmp_path)
    assert done.returncode == 0 and "(minimal: " in done.stdout, done.stderr
    assert "the minimal edit is made, which looks at no other text: " in done.stderr
    assert not (tmp_path / "corrections.jsonl").exists()
    refused = run_main("intervene.py", *asked, "--editor=continual", cwd=tmp_path)
    assert refused.returncode == 2 and "does not say what data it was trained on" in refused.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("explain.py", ["--text=fine"], "--model is missing"),
        ("explain.py", ["--model=MODEL"], "nothing to explain"),
        ("explain.py", ["--model=MODEL", "--file=absent.txt"], "absent.txt"),
        ("explain.py", ["--schema", "--subnetworks"], "--schema and --subnetworks are two things to print"),
        (
            "explain.py",
            ["--model=MODEL", "--subnetworks", "--format=csv"],
            "--subnetworks and --format=csv are two things",
        ),
        ("explain.py", ["--model=MODEL", "--text=fine", "--format=html"], "--output is missing"),
        ("explain.py", ["--model=MODEL", "--texts=fine"], "did you mean --text?"),
        ("intervene.py", ["--model=MODEL", "--find", "--config=x"], "error: unknown flag --config\n"),
        ("intervene.py", ["--model=MODEL", "--find", "--text=fine"], "it goes with --concept, not --text"),
        ("intervene.py", ["--find", "--concept=food", "--target=x"], "--model is missing"),
        (
            "intervene.py",
            ["--model=MODEL", "--find", "--concept=food", "--target=x"],
            "it goes with --concept, not --target",
        ),
        ("intervene.py", ["--model=MODEL", "--text=fine", "--concept=food"], "--target missing"),
        ("intervene.py", ["--model=MODEL", "--find", "--margin=1"], "--margin is read with --editor=minimal only"),
        (
            "intervene.py",
            ["--model=MODEL", "--find", "--concept=servic"],
            "there is no concept 'servic' (did you mean 'service'?)",
        ),
    ],
)
def test_launch_mistakes_end_with_one_line(
    saved: Path, tmp_path: Path, name: str, arguments: list[str], message: str
) -> None:
    done = run_main(name, *(argument.replace("MODEL", str(saved)) for argument in arguments), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.strip().split("\n")) == 1
