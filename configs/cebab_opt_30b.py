"""OPT-30B on CEBaB, planned for v5p:2x2x4.

TODO
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.get_scaled_config("opt_30b", batch_size=16, fsdp=4, tensor=4, fisher_gib=40)
