"""OPT-350M on CEBaB, planned for v5e:1x1.

TODO
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.get_scaled_config("opt_350m", batch_size=8)
