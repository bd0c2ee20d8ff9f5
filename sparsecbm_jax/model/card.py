"""The model card of a saved model: Markdown with YAML front matter, made from its configuration and its metrics."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparsecbm_jax.model.strategies import STRATEGIES

_SCORES = (
    ("accuracy", "accuracy"),
    ("majority_accuracy", "majority"),
    ("macro_f1", "macro-F1"),
    ("paper_macro_f1", "paper F1"),
    ("ece", "ECE"),
)


def escape(text: Any) -> str:
    r"""Escapes text so that Markdown and HTML show it as it is, on one line.

    >>> escape("a|b <i>*c*</i>\nd")
    'a\\|b &lt;i&gt;\\*c\\*&lt;/i&gt; d'
    """
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", line)


def _yaml(value: Any) -> str:
    # A JSON string is a YAML string, but for a few characters that YAML does not print.
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff\ufffe\uffff]", lambda m: f"\\u{ord(m.group()):04x}", text)


def _percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.1f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _is_report(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("task"), Mapping) and "accuracy" in value["task"]


def split_reports(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Splits metrics into reports by the name of their split; metrics that are one report are the test split's.

    Args:
        metrics: what `metrics.json` holds.
    """
    if _is_report(metrics):
        return {"test": metrics}
    return {name: value for name, value in metrics.items() if _is_report(value)}


def _rows(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    rows = [(escape(name), scores) for name, scores in report.get("concepts", {}).items()]
    rows += [("all concepts", report["concept"])] if "concept" in report else []
    return [*rows, ("task", report["task"])]


def _front_matter(name: str, config: Mapping[str, Any], reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    metadata = config["metadata"]
    lines = ["---", "library_name: sparsecbm_jax", "pipeline_tag: text-classification"]
    lines += ["tags:", "- concept-bottleneck", "- sparse", "- interpretability", "- jax"]
    if metadata.get("backbone"):
        lines += [f"base_model: {_yaml(str(metadata['backbone']))}"]
    lines += ["model-index:", f"- name: {_yaml(name)}", "  results:" if reports else "  results: []"]
    for split, report in reports.items():
        dataset = _yaml(str(metadata.get("dataset", "unknown")))
        lines += ["  - task:", "      type: text-classification", "    dataset:"]
        lines += [f"      name: {dataset}", f"      type: {dataset}", f"      split: {_yaml(split)}", "    metrics:"]
        for section in ("task", "concept"):
            for key in ("accuracy", "macro_f1", "paper_macro_f1"):
                value = report.get(section, {}).get(key)
                if value is not None and value == value:
                    title = _yaml(f"{section} {key}")
                    lines += [f"    - type: {key}", f"      name: {title}", f"      value: {value:.6f}"]
    return [*lines, "---", ""]


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(escape(name) for name in names)


def describe(config: Mapping[str, Any]) -> str:
    """Describes the kind of model, in a sentence or two.

    Args:
        config: what the model's `config.json` holds.
    """
    if not STRATEGIES[config["strategy"]].has_bottleneck:
        what = "A text classifier without concepts, fine-tuned for comparison with concept-bottleneck models."
    else:
        what = (
            "A concept-bottleneck model: it reads a text, says for each concept which class the text expresses, and "
            "predicts the label from nothing but those concepts."
        )
    if config["sparsity"] is not None:
        what += " Each concept is read by its own sparse subnetwork of one shared backbone."
    return what


_READS = {
    "log_odds": "log-odds of each concept's classes, a function of its probabilities",
    "centred": "σ(u − mean u) of each concept, a function of its probabilities",
    "sigmoid": "σ(u) of each concept, which no probability shows in full: the form of version 0.1.0",
}


def facts(config: Mapping[str, Any]) -> dict[str, str]:
    """Lists the parts of the model, by name.

    Args:
        config: what the model's `config.json` holds.
    """
    model, metadata = config["model"], config["metadata"]
    backbone = model["backbone"]
    found = {"backbone": f"{backbone['family']}, {backbone['num_layers']} layers of width {backbone['hidden_size']}"}
    if "backbone" in metadata:
        found["started from"] = str(metadata["backbone"])
    found["strategy"] = config["strategy"]
    if "dataset" in metadata:
        found["trained on"] = str(metadata["dataset"])
    if STRATEGIES[config["strategy"]].has_bottleneck:
        found["weight of the concept loss, γ"] = str(model["gamma"])
        found["the label reads"] = _READS[model.get("activation", "sigmoid")]
    for argument, function in metadata.get("functions", {}).items():
        found[f"own {argument}"] = str(function)
    if metadata.get("seed") is not None:
        found["seed"] = str(metadata["seed"])
    return {**found, "written by": f"sparsecbm_jax {config['library_version']}"}


def limits(config: Mapping[str, Any]) -> list[str]:
    """Lists the limits of the model, a sentence each.

    Args:
        config: what the model's `config.json` holds.
    """
    found = [
        f"Texts are cut at {config['max_length']} tokens.",
        "It knows only texts like those it was trained on, with their language, subject and biases.",
    ]
    if STRATEGIES[config["strategy"]].has_bottleneck:
        found += [
            "Its concepts are predictions, not facts: compare their accuracy with the majority's before use.",
            "What a text says beyond these concepts cannot reach the label.",
        ]
    return found


def render(name: str, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Renders the card as Markdown.

    Args:
        name: what to call the model.
        config: what the model's `config.json` holds.
        metrics: what its `metrics.json` holds; may be empty.
    """
    schema, sparsity, reports = config["schema"], config["sparsity"], split_reports(metrics)
    has_bottleneck = STRATEGIES[config["strategy"]].has_bottleneck
    lines = [*_front_matter(name, config, reports), f"# {escape(name)}", "", "## What it is", "", describe(config), ""]
    lines += [f"- {title}: {escape(value)}" for title, value in facts(config).items()]
    lines += ["", "## Concepts and labels", ""]
    if has_bottleneck:
        lines += [
            f"- concepts: {_quoted(schema['concepts'])}",
            f"- classes of each concept: {_quoted(schema['classes'])}",
        ]
    lines += [f"- labels: {_quoted(schema['labels'])}", "", "## Metrics", ""]
    if reports:
        lines += [
            "In percent. *majority*: accuracy of always predicting the most frequent class. *paper F1*: mean over",
            "classes of the binary macro-F1 of class against rest, which is above macro-F1. *ECE*: calibration error.",
            "",
        ]
    for split, report in reports.items():
        rows = [[title, *(_percent(scores.get(key)) for key, _ in _SCORES)] for title, scores in _rows(report)]
        lines += _table([escape(split), *(title for _, title in _SCORES)], rows)
    if not reports:
        lines += ["None were recorded when the model was saved.", ""]
    lines += ["## Sparsity", ""]
    if sparsity is None:
        lines += ["Dense: every weight serves every concept.", ""]
    else:
        rows = [[escape(c), _percent(d), _percent(1 - d)] for c, d in sparsity["density"].items()]
        lines += [f"Of {sparsity['num_weights']:,} maskable weights of the backbone, in percent:", ""]
        lines += _table(["subnetwork", "kept", "pruned"], rows)
        lines += [f"Fingerprint of the masks: `{sparsity['fingerprint']}`", ""]
    lines += ["## How to load", "", "```python", "import sparsecbm_jax", "", 'model = sparsecbm_jax.load("PATH")']
    lines += ['predictions = sparsecbm_jax.predict(model, ["The food was great but the room was loud."])', "```", ""]
    lines += ["## Limits", "", *(f"- {limit}" for limit in limits(config))]
    return "\n".join([*lines, ""])
