"""Says which goals the quickstart's model has met, and which it has missed: its scores, and its explanation of a text.

    python launch/quickstart_goals.py --run=runs/quickstart

A first run should convince; one that falls short should say so itself. It takes about half a minute on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from sparsecbm_jax.cli import command_line

if TYPE_CHECKING:
    from sparsecbm_jax.explanation import DecisionPathway

FLAGS = flags.FLAGS
flags.DEFINE_string("run", "runs/quickstart", "Folder of the finished run.")

TEXT = "The food was delicious, but our waiter was slow."
LEAST = {"concept": 0.85, "task": 0.60}
# Of the text: the class of a concept, whether it raises the expected label, and the words that may carry it.
READ = {
    "food": ("Positive", True, ("food", "delicious")),
    "service": ("Negative", False, ("waiter", "slow")),
}


def main() -> None:
    """Prints a line for each goal; missing one is no error."""
    from sparsecbm_jax import explain, load
    from sparsecbm_jax.evaluation.run_summary import read_metrics

    workdir = Path(FLAGS.run)
    (pathway,) = explain(load(workdir / "model").for_few_texts(), [TEXT])
    goals = [*score_goals(read_metrics(workdir)["test"]), *reading_goals(pathway)]
    for is_met, words in goals:
        print(f"{'met:   ' if is_met else 'MISSED:'} {words}")
    num_missed = sum(not is_met for is_met, _ in goals)
    print(f"{len(goals) - num_missed} of {len(goals)} goals are met." + (" This run fell short." if num_missed else ""))


def score_goals(test: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """Yields whether the scores on held-out reviews are as high as they should be, in words too."""
    for name, least in LEAST.items():
        accuracy, majority = test[name]["accuracy"], test[name]["majority_accuracy"]
        what = {"concept": "of the concepts", "task": "of the labels"}[name]
        yield (
            accuracy >= least,
            f"{accuracy:.1%} {what} are correct (goal {least:.0%}, the most frequent class {majority:.1%})",
        )


def reading_goals(pathway: DecisionPathway) -> Iterator[tuple[bool, str]]:
    """Yields whether the text is read as a person reads it, in words too."""
    from sparsecbm_jax.explanation.as_text import top_words

    lanes = {lane.name: lane for lane in pathway.concepts}
    for name, (wanted, raises, carriers) in READ.items():
        lane = lanes[name]
        yield lane.predicted_class == wanted, f"{name} is read as {lane.predicted_class} (goal {wanted})"
        assert lane.effect is not None
        direction = "raises" if lane.effect > 0 else "lowers"
        yield (
            (lane.effect > 0) == raises,
            f"{name} {direction} the expected stars by {abs(lane.effect):.2f} "
            f"(goal: it {'raises' if raises else 'lowers'} them)",
        )
        words = [word.text for word, _ in top_words(pathway, lane, 1)]
        yield (
            bool(words) and words[0] in carriers,
            f"{name} is carried most by {words[0] if words else 'no word'!r} (goal: {' or '.join(carriers)})",
        )


if __name__ == "__main__":
    command_line.run(main)
