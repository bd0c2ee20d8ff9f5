"""Backbones as three mask-ignorant pure functions over stacked layer parameters: *embed* → *layer* → *finish*."""

from sparsecbm_jax.backbones.backbone import (
    Backbone,
    Params,
    encode_dense,
    init_params,
    input_products,
    input_squares,
    make_backbone,
    maskable_paths,
)
from sparsecbm_jax.backbones.checkpoint_readers import WeightsError
from sparsecbm_jax.backbones.config import BackboneConfig, config_from_hf, config_to_hf
from sparsecbm_jax.backbones.conversion import Converted, convert
from sparsecbm_jax.backbones.dropout import dropout, fold_keys
from sparsecbm_jax.backbones.pretrained import export_pretrained, find_minilm, load_pretrained
from sparsecbm_jax.backbones.published_shapes import published_config

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Converted",
    "Params",
    "WeightsError",
    "config_from_hf",
    "config_to_hf",
    "convert",
    "dropout",
    "encode_dense",
    "export_pretrained",
    "find_minilm",
    "fold_keys",
    "init_params",
    "input_products",
    "input_squares",
    "load_pretrained",
    "make_backbone",
    "maskable_paths",
    "published_config",
]
