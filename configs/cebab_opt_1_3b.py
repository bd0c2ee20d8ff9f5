"""OPT-1.3B on CEBaB, planned for v5e:4x4.

TODO
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.get_scaled_config("opt_1_3b", batch_size=64, fsdp=16)
