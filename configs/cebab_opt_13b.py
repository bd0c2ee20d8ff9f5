"""OPT-13B on CEBaB, planned for v5p:2x2x2.

TODO
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.get_scaled_config("opt_13b", batch_size=16, fsdp=8, fisher_gib=40)
