"""Converts a hub's checkpoint to safetensors, so that the hosts of a run never unpickle, and read their parts only.

python launch/convert.py --model=facebook/opt-1.3b --save=checkpoints/opt-1.3b          # needs the extra torch
python launch/train.py --config=configs/cebab_opt.py:1_3b --config.backbone.name=checkpoints/opt-1.3b --workdir=...

Reads pytorch_model.bin (without executing pickled code), flax_model.msgpack and safetensors, in one file or several,
tensor by tensor. Precision and names do not change; configuration and tokeniser are copied. All written tensors are
read again and compared before the directory gets its name.
"""

from __future__ import annotations

import contextlib
import os

from absl import flags

from sparsecbm_jax.cli import command_line

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(command_line)
flags.DEFINE_string("model", None, "Checkpoint: a directory of the hub's layout, or a name on the hub.")
flags.DEFINE_string("save", None, "Directory to write, which must not exist.")
flags.DEFINE_float("max_shard_gb", 5.0, "Values in a file, in units of 10^9 bytes.", lower_bound=1e-6)


def main() -> None:
    """Runs the command; see the docstring of this file."""
    if not FLAGS.model or not FLAGS.save:
        raise ValueError("--model and --save are needed; expected a checkpoint and the directory to write")

    from sparsecbm_jax import backbones
    from sparsecbm_jax.runtime.progress import progress

    with contextlib.closing(progress(description="convert and compare", unit="B")) as bar:

        def on_bytes(num_bytes: int, total: int) -> None:
            bar.total = total
            bar.update(num_bytes)

        found = backbones.convert(
            FLAGS.model, FLAGS.save, max_shard_bytes=int(FLAGS.max_shard_gb * 1e9), on_bytes=on_bytes
        )
    size = f"{found.num_bytes / 1e9:.3g} GB in {len(found.files)} file{'s' if len(found.files) > 1 else ''}"
    print(
        f"wrote {FLAGS.save}: {found.num_tensors} tensors, {', '.join(found.dtypes)}, {size}, compared with the source"
    )
    print(f"copied {', '.join(found.others)}")


if __name__ == "__main__":
    # Nothing is computed, so no accelerator is used.
    os.environ["JAX_PLATFORMS"] = "cpu"
    command_line.run(main, keeps_memory=False)
