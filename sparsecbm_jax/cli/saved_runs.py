"""A saved model, and the data that a config names or that it was trained on: what several commands share."""

from __future__ import annotations

import sys
import typing
from pathlib import Path

from absl import flags

from sparsecbm_jax.cli import command_line

if typing.TYPE_CHECKING:
    from sparsecbm_jax.config.run_config import RunConfig
    from sparsecbm_jax.core.masks import Masks
    from sparsecbm_jax.data.batches import Batch, Tokenized
    from sparsecbm_jax.data.schema import Dataset
    from sparsecbm_jax.model.sparse_cbm import SparseCBM


FLAGS = flags.FLAGS


class Saved(typing.NamedTuple):
    """A model for a few passes, and the data's splits in its tokens."""

    model: SparseCBM
    dataset: Dataset
    splits: dict[str, Tokenized]

    def scores(self, run: RunConfig, split: str, masks: Masks | None) -> dict[str, typing.Any]:
        """Returns the scores of the model with other masks on a split; see `evaluation.evaluate`."""
        from sparsecbm_jax.data import eval_batches
        from sparsecbm_jax.evaluation import scores

        batches = eval_batches(self.splits[split], batch_size=run.training.eval_batch_size)
        model = self.model
        return scores.evaluate(model.config, model.arrays._replace(masks=masks), batches, self.dataset.schema)

    def measured(self, run: RunConfig, masks: Masks) -> dict[str, typing.Any]:
        """Returns the metadata that follow from a model's predictions, as the model with other masks has them.

        They are the mean activations of the training texts, and where predictions for those of validation are unsure.
        """
        import jax
        import numpy as np

        from sparsecbm_jax.core.masks import pack
        from sparsecbm_jax.data import eval_batches
        from sparsecbm_jax.model.forward import make_forward
        from sparsecbm_jax.model.mean_activations import mean_activations
        from sparsecbm_jax.model.reliability import measure_reliability

        forward = make_forward(self.model.config)
        arrays = self.model.arrays._replace(masks=jax.jit(pack)(masks))

        def outputs(split: str) -> list[typing.Any]:
            parts = []
            for batch in eval_batches(self.splits[split], batch_size=run.training.eval_batch_size):
                output, real = forward(arrays, batch), np.asarray(batch.example_weight) > 0
                shares = (jax.nn.softmax(output.concept_logits), jax.nn.softmax(output.label_logits))
                leaves = (output.activations, shares[0], batch.concepts, shares[1], batch.label)
                parts.append([np.asarray(leaf)[real] for leaf in leaves])
            return [np.concatenate(leaves) for leaves in zip(*parts, strict=True)]

        activations, concepts, *_ = outputs("train")
        means = mean_activations(activations, concepts.argmax(axis=-1))
        _, concepts, gold, labels, gold_labels = outputs("validation")
        reliability = measure_reliability(concepts, gold, labels, gold_labels, run.predictor.accepted_risk)
        return means.to_metadata() | reliability.to_metadata()


def read(folder: str, run: RunConfig) -> Saved:
    """Reads a model and the config's data.

    Raises:
        ValueError: The data has other concepts or classes than the model.
    """
    from sparsecbm_jax.data import load_dataset, tokenize
    from sparsecbm_jax.model import saved_model

    model = saved_model.load(folder).for_few_texts()
    dataset = load_dataset(run.data)
    check_schema(model, folder, dataset)
    max_length = min(run.data.max_length, model.config.backbone.max_length)
    splits = {name: tokenize(examples, model.tokenizer, max_length) for name, examples in dataset.splits.items()}
    return Saved(model, dataset, splits)


def read_with_data() -> tuple[RunConfig, Saved]:
    """Reads the model of `--model` with the data of `--config`, or those that it was trained on.

    Raises:
        ValueError: `--model` is missing, the model does not say what it was trained on, or there is no such `--split`.
    """
    from sparsecbm_jax.model.saved_model import load

    folder = command_line.model_folder()
    run = command_line.run_config() if command_line.has_config() else own_run(load(folder), folder, "--config")
    found = read(folder, run)
    if FLAGS.split not in found.splits:
        raise ValueError(f"--split={FLAGS.split}: expected one of {', '.join(found.splits)}")
    return run, found


def read_sparse() -> tuple[SparseCBM, Masks]:
    """Reads the model of `--model`, which is to have masks, and returns these as well.

    Raises:
        ValueError: `--model` is missing, or names a dense model.
    """
    from sparsecbm_jax.model.saved_model import load

    folder = command_line.model_folder()
    model = load(folder)
    if model.masks is None:
        raise ValueError(f"{folder}: a dense model has no masks; train one with --config.strategy=sparse")
    return model, model.masks


def fingerprint(folder: str) -> str:
    """Tells a model from another that was written to the same folder later, without reading it."""
    written = [path.stat().st_mtime_ns for path in sorted(Path(folder).glob("*.safetensors"))]
    return f"{Path(folder).resolve()} {written}"


def own_run(model: SparseCBM, folder: str, instead: str) -> RunConfig:
    """Returns the settings that a model was trained with, and so its data.

    Args:
        model: the model.
        folder: of the model, for the message.
        instead: flags that do without.

    Raises:
        ValueError: The model does not say.
    """
    from sparsecbm_jax.config.run_config import from_config_dict

    if "run_config" not in model.metadata:
        raise ValueError(
            f"{folder}: the model does not say what data it was trained on (no 'run_config' in its metadata); "
            f"expected {instead}"
        )
    return from_config_dict(model.metadata["run_config"])


def own_data(model: SparseCBM, folder: str, instead: str) -> Dataset:
    """Reads the data that a model was trained on; arguments as for `own_run`.

    Raises:
        ValueError: The model does not say, or the data has other concepts or classes than it.
        OSError, ImportError: The data cannot be read.
    """
    from sparsecbm_jax.data import load_dataset

    dataset = load_dataset(own_run(model, folder, instead).data)
    check_schema(model, folder, dataset)
    return dataset


def anchors(model: SparseCBM, folder: str, *, is_asked: bool) -> list[Batch] | None:
    """Returns training texts that continual edits leave as they are; None, and says why, where there are none.

    Args:
        model: the model.
        folder: of the model, for messages.
        is_asked: whether somebody asked for continual edits: then it is an error that there are none.

    Raises:
        ValueError: The model does not say what it was trained on, or has other names than that has.
        OSError, ImportError: The data cannot be read.
    """
    from sparsecbm_jax.data.batches import fisher_batches

    try:
        run = own_run(model, folder, "--editor=minimal, which needs no training texts")
        return fisher_batches(read(folder, run).splits["train"], run.pruner, seed=run.seed)
    except (ValueError, OSError, ImportError) as error:
        if is_asked:
            raise
        print(f"the minimal edit is made, which looks at no other text: {error}", file=sys.stderr)
        return None


def check_schema(model: SparseCBM, folder: str, dataset: Dataset) -> None:
    """Raises ValueError where data has other concepts or classes than a model."""
    if (dataset.schema.concepts, dataset.schema.classes) != (model.schema.concepts, model.schema.classes):
        raise ValueError(
            f"{dataset.name} has concepts {dataset.schema.concepts} of classes {dataset.schema.classes}, but {folder} "
            f"was trained for {model.schema.concepts} of classes {model.schema.classes}"
        )
