"""IMDB-C, four concepts of film reviews (Table 2, right): 20 epochs, γ = 5, batch 8.

    python launch/train.py --config=configs/imdb_c.py:bert --config.data.path=DIR --workdir=runs/imdb_c_bert
    python launch/train.py --config=configs/imdb_c.py:bert,generated --config.data.path=DIR --workdir=runs/imdb_c_gen

DIR holds the published CSV files. After the colon stands a backbone: minilm (default), distilbert, bert, roberta,
opt_125m, opt_350m, opt_1_3b (batch 1) or tiny; then, after a comma, which labels: manual (default, by people) or
generated (by a machine). Add `--config.strategy=joint` and so on for the dense baselines.

Hardware: one accelerator; MiniLM also trains on a CPU. Expected time: not yet measured. Learning rates are ours, from
the grid in the paper's Table 3.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common

LABELS = ("manual", "generated")


def get_config(choice: str = "minilm") -> ConfigDict:
    """Returns the run with one of `common.BACKBONES` and, after a comma, one of `LABELS`."""
    parts = [part.strip() for part in choice.split(",") if part.strip()]
    labels = [part for part in parts if part in LABELS] or ["manual"]
    backbones = [part for part in parts if part not in LABELS] or ["minilm"]
    if len(labels) > 1 or len(backbones) > 1:
        raise ValueError(
            f"configs/imdb_c.py:{choice} expects one backbone ({', '.join(common.BACKBONES)}) "
            f"and one kind of labels ({' or '.join(LABELS)}), as in configs/imdb_c.py:bert,generated"
        )
    config = common.get_config(backbones[0])
    config.data.preset = f"imdb_c_{labels[0]}"
    return config
