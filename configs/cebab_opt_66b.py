"""OPT-66B on CEBaB, planned for v5p:2x4x4.

TODO
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.get_scaled_config("opt_66b", batch_size=16, fsdp=16, tensor=4, fisher_gib=40)
