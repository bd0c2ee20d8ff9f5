"""Settings: every default once, with its unit and range; and the names that people type."""

from sparsecbm_jax.config import moved_names
from sparsecbm_jax.config.run_config import RunConfig, from_config_dict, key_names, to_dict

__all__ = ["RunConfig", "from_config_dict", "key_names", "to_dict"]

__getattr__ = moved_names.raise_for(__name__)
