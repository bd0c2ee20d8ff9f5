"""Pruning on a mesh makes the masks that pruning on one device makes."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparsecbm_jax.backbones import BackboneConfig
from sparsecbm_jax.config.run_config import PrunerConfig
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core import sharding
from sparsecbm_jax.model.sparse_cbm import ModelArrays
from sparsecbm_jax.pruning.pruner import PruningOptions, prune

from tests.model.test_forward import build, random_batch


def test_masks_on_a_mesh_are_those_of_one_device(tiny_backbone_config: BackboneConfig) -> None:
    config, params, masks, heads = build(tiny_backbone_config, k=4)
    batches = [random_batch(seed, rows=8, k=4) for seed in range(4)]
    options = PruningOptions(PrunerConfig(num_grads=4, block_size=16))
    expected = prune(config, ModelArrays(params, masks, heads), batches, 0.7, options)
    mesh = sharding.make_mesh(data=2, fsdp=2, concept=2)
    places = {
        path: NamedSharding(mesh, P(None, *sharding.spec_for(path, leaf.ndim - 1))) for path, leaf in masks.items()
    }
    on_mesh = ModelArrays(sharding.put(params, mesh), jax.device_put(masks, places), sharding.put(heads, mesh))
    got = prune(config, on_mesh, batches, 0.7, options)
    same = np.concatenate([(np.asarray(got[path]) == np.asarray(expected[path])).ravel() for path in masks])
    assert same.mean() >= 0.999, "gradients are summed in another order"
    assert masks_lib.total_density(got) == pytest.approx(masks_lib.total_density(expected), abs=0)
