"""The changes of an edit of a concept's mask, counted by kernel, layer and head."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsecbm_jax.backbones import BackboneConfig
from sparsecbm_jax.explanation.subnetworks import head_axis
from sparsecbm_jax.intervention.mask_edit import MaskEdit
from sparsecbm_jax.intervention.stored_edit import StoredEdit, positions_of


@dataclasses.dataclass(frozen=True)
class KernelChange:
    """Numbers of weights of a kernel that an edit changed.

    Attributes:
        path: Path of the kernel.
        dropped, grown: For each layer, weights kept before and pruned now, and the reverse.
        rows: For each layer, the number of rows with a changed weight.
    """

    path: str
    dropped: tuple[int, ...]
    grown: tuple[int, ...]
    rows: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class EditChange:
    """The changes of a concept's subnetwork by an edit.

    Attributes:
        concept: Name of the concept.
        num_dropped, num_grown: Numbers of changed weights.
        dropped_per_layer, grown_per_layer: The same for each transformer layer.
        dropped_per_head, grown_per_head: For each layer, those of each head's query, key, value and output weights.
        kernels: One entry for each kernel with a change.
    """

    concept: str
    num_dropped: int
    num_grown: int
    dropped_per_layer: tuple[int, ...]
    grown_per_layer: tuple[int, ...]
    dropped_per_head: tuple[tuple[int, ...], ...]
    grown_per_head: tuple[tuple[int, ...], ...]
    kernels: tuple[KernelChange, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the change as nested dicts and tuples, ready for JSON."""
        return dataclasses.asdict(self)


def view_edit(edit: MaskEdit | StoredEdit, config: BackboneConfig, concepts: Sequence[str]) -> EditChange:
    """Counts an edit's changes by kernel, layer and head.

    Args:
        edit: The edit, as computed or as stored.
        config: The backbone's shape, for its heads.
        concepts: The model's concepts, in order.
    """
    if isinstance(edit, StoredEdit):
        concept, positions = edit.concept, edit.positions
    else:
        concept, positions = concepts[int(edit.concept)], positions_of(edit)
    layers, heads = np.zeros((2, config.num_layers), int), np.zeros((2, config.num_layers, config.num_heads), int)
    kernels = []
    for path, one in sorted(positions.items()):
        num_layers, *shape = one.shape if len(one.shape) == 3 else (1, *one.shape)
        of_kernel = np.zeros((2, num_layers), int)
        for side, flat in enumerate((one.dropped, one.grown)):
            layer, *at = np.unravel_index(flat, (num_layers, *shape))
            np.add.at(of_kernel[side], layer, 1)
            if (axis := head_axis(path)) is not None:
                np.add.at(heads[side], (layer, at[axis] * config.num_heads // shape[axis]), 1)
        if path.startswith("layers/"):
            layers += of_kernel
        # A row is [layer, input] in one number.
        rows = np.unique(np.concatenate([one.dropped, one.grown]) // shape[-1])
        of_rows = np.bincount(rows // shape[-2], minlength=num_layers)
        kernels.append(KernelChange(path, *(tuple(counts.tolist()) for counts in (*of_kernel, of_rows))))
    return EditChange(
        concept=concept,
        num_dropped=sum(sum(one.dropped) for one in kernels),
        num_grown=sum(sum(one.grown) for one in kernels),
        dropped_per_layer=tuple(layers[0].tolist()),
        grown_per_layer=tuple(layers[1].tolist()),
        dropped_per_head=tuple(map(tuple, heads[0].tolist())),
        grown_per_head=tuple(map(tuple, heads[1].tolist())),
        kernels=tuple(kernels),
    )
