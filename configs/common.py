"""The defaults of every run, and the backbones of the paper's Table 2; the other config files override these.

`--config=configs/common.py` itself trains MiniLM on the embedded reviews. The values are in
`sparsecbm_jax/cli/default_config.py`, from which `sparsecbm train` starts as well.
"""

from __future__ import annotations

from sparsecbm_jax.cli.default_config import BACKBONES, BackbonePreset, get_config

__all__ = ["BACKBONES", "BackbonePreset", "get_config"]
