"""Prints statistics of a data set, and whether it can be trained on.

python launch/validate_data.py --config=configs/cebab.py --config.data.path=DIR
python launch/validate_data.py --config=configs/common.py --config.data.preset=columns --config.data.path=DIR \
    --config.data.text_column=review --config.data.label_column=stars --config.data.concept_columns=food,service

Rows, labels and concepts per split (the counts of the paper's Table 1), missing shares, normalised spellings, duplicate
texts, leakage between splits by group, and lengths. Takes seconds and no accelerator. If the data cannot be trained on,
it ends with status 2 and names the file, row and column; --json prints plain data in place of tables.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence

from absl import flags

from sparsecbm_jax.cli import command_line

FLAGS = flags.FLAGS
command_line.define_config()
flags.adopt_module_key_flags(command_line)
flags.DEFINE_bool("json", False, "Print JSON in place of tables.")


def main() -> None:
    """Runs the command; see the docstring of this file."""
    config = command_line.run_config()

    from sparsecbm_jax.data.sources import check_trainable, read_dataset
    from sparsecbm_jax.data.statistics import dataset_statistics, render_statistics

    # Read without changes: the statistics distinguish missing from 'unknown', and count rows that training leaves out.
    raw = dataclasses.replace(config.data, missing_as_unknown=False, keep_unlabelled=True)
    statistics = dataset_statistics(read_dataset(raw), _token_counter(config.backbone.name))
    print(json.dumps(statistics, indent=2) if FLAGS.json else render_statistics(statistics))
    check_trainable(read_dataset(config.data))


def _token_counter(backbone: str) -> Callable[[Sequence[str]], list[int]] | None:
    from sparsecbm_jax.backbones import find_minilm
    from sparsecbm_jax.data.schema import DataError
    from sparsecbm_jax.data.tokenizers import load_tokenizer

    try:
        name = find_minilm() if backbone == "minilm" else backbone
        if name is None or name == "tiny":
            raise DataError("the backbone has no tokeniser of its own here")
        tokenizer = load_tokenizer(name)
    except DataError as error:
        print(f"lengths are in words alone, not in tokens of the backbone {backbone!r}: {error}", file=sys.stderr)
        return None
    # With its own limit the tokeniser would warn of each text that training will truncate.
    tokenizer.model_max_length = sys.maxsize
    return lambda texts: [len(ids) for ids in tokenizer(list(texts), truncation=False, padding=False)["input_ids"]]


if __name__ == "__main__":
    command_line.run(main)
