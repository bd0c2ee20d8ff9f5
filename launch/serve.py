"""Serves the live page of a saved model: type a text, see its pathway, correct a concept, preview, apply, undo.

python launch/serve.py --model=runs/quickstart/model
python launch/serve.py --model=runs/quickstart/model --port=8080 --edits=runs/quickstart/edits.log
SPARSECBM_TOKEN=... python launch/serve.py --model=runs/quickstart/model --host=0.0.0.0

Wants the extra `app`. Corrections are kept in --edits, a log that `launch/edits.py` and `launch/intervene.py --log`
read, too; each is on disk before it is acknowledged, and made again when the server starts. Each keeps those before it
in force, whose texts stand in --lasting, which `launch/intervene.py` reads, too; on two CPU cores it takes some ten
seconds. With --lasting= each is as small as repairs its concept, looks at no other, and takes about a second.
Only this machine reaches the server, unless --host says otherwise: then a token is wanted, that of the variable
SPARSECBM_TOKEN or one that is made and printed. It travels in the clear: put a proxy that speaks TLS before the server,
or use an SSH tunnel.
Programs are compiled before the first request; with JAX_COMPILATION_CACHE_DIR=FOLDER, they are kept for the next start.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import typing
from pathlib import Path

from absl import flags

from sparsecbm_jax.cli import command_line, saved_runs

if typing.TYPE_CHECKING:
    from sparsecbm_jax.app.session import ContinualSetup
    from sparsecbm_jax.data.schema import Examples
    from sparsecbm_jax.model.sparse_cbm import SparseCBM

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(command_line)
flags.DEFINE_string("model", None, "Folder of the saved model, such as runs/quickstart/model.")
flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; beyond loopback, a token is wanted.")
flags.DEFINE_integer("port", 8000, "Port to listen at; 0 for a free one.", lower_bound=0, upper_bound=65535)
flags.DEFINE_string("edits", None, "File of edits; by default edits.log beside the model's folder.")
flags.DEFINE_string(
    "lasting",
    None,
    "JSONL file of corrections to keep in force; by default corrections.jsonl beside the edits; empty for none.",
)
flags.DEFINE_integer(
    "sample", 64, "Held-out texts of the model's own data that previews read; 0 for none.", lower_bound=0
)
flags.DEFINE_list("allowed_hosts", [], "Names, beside localhost and addresses, that the server may be called by.")

TOKEN = "SPARSECBM_TOKEN"


def main() -> None:
    if not FLAGS.model:
        raise ValueError("--model is missing; expected the folder of a saved model, such as runs/quickstart/model")
    # Before the model is read, so that a port in use, or a missing library, costs no time.
    from sparsecbm_jax.app import Session, create_app, is_loopback

    try:
        import uvicorn
    except ImportError:
        raise ImportError("the live page needs uvicorn: pip install 'sparsecbm-jax[app]'") from None
    with contextlib.ExitStack() as stack:
        bound = stack.enter_context(_bound(FLAGS.host, FLAGS.port))
        token = os.environ.get(TOKEN) or (None if is_loopback(FLAGS.host) else secrets.token_urlsafe(24))

        from sparsecbm_jax.model.saved_model import load
        from sparsecbm_jax.runtime.progress import progress

        model = load(FLAGS.model)
        if model.masks is None:
            raise ValueError(
                f"{FLAGS.model}: a dense model has no masks to edit; train one with --config.strategy=sparse"
            )
        path = Path(FLAGS.edits or Path(FLAGS.model).resolve().parent / "edits.log")
        path.parent.mkdir(parents=True, exist_ok=True)
        lasting = _lasting(model, path)
        desk = stack.enter_context(contextlib.closing(Session(model, path, _sample(model), lasting=lasting)))
        print(f"{_counted(len(desk.edits), 'edit')} in force in {path}", flush=True)
        if lasting is not None:
            print(f"{_counted(desk.num_kept, 'correction')} of {lasting.cases.path} kept in force", flush=True)
        for length in progress(desk.warm_up(), description="compiling", total=desk.num_lengths, unit="length"):
            print(f"compiled for texts of up to {length} tokens", flush=True)
        app = create_app(desk, token=token, host_names=[FLAGS.host, socket.gethostname(), *FLAGS.allowed_hosts])
        # Who reads this may ask at once: requests are kept until the loop runs.
        bound.listen(256)
        print(f"serving at {_address(bound, token)} (Ctrl+C ends it)", flush=True)
        uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                ws="none",
                server_header=False,
                limit_concurrency=512,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=10,
            )
        ).run(sockets=[bound])


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has its address and does not listen yet.

    Raises:
        OSError: if the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise OSError(f"--host={host} --port={port} cannot be had: {error.strerror or error}") from None
    return bound


def _address(bound: socket.socket, token: str | None) -> str:
    """What to open in a browser; it hands the browser the token."""
    host = socket.gethostname() if FLAGS.host in ("0.0.0.0", "::") else FLAGS.host
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{bound.getsockname()[1]}/" + (f"?token={token}" if token else "")


def _counted(number: int, what: str) -> str:
    return f"{number} {what if number == 1 else what + 's'}"


def _lasting(model: SparseCBM, edits: Path) -> ContinualSetup | None:
    """What keeps corrections in force; None where it is not wanted, or cannot be had and was not asked for."""
    from sparsecbm_jax.app.session import ContinualSetup
    from sparsecbm_jax.correction.corrector import ContinualCorrector
    from sparsecbm_jax.correction.request_file import RequestFile

    if FLAGS.lasting == "":
        return None
    cases = RequestFile(FLAGS.lasting or edits.with_name("corrections.jsonl"))
    anchors = saved_runs.anchors(model, FLAGS.model, is_asked=FLAGS.lasting is not None)
    if anchors is None:
        return None
    return ContinualSetup(ContinualCorrector(model.for_few_texts(), anchors), cases)


def _sample(model: SparseCBM) -> Examples | None:
    """Texts of the model's own validation split; None, and why, where it cannot be had."""
    import numpy as np

    from sparsecbm_jax.data.sources import load_dataset

    if not FLAGS.sample:
        return None
    try:
        dataset = load_dataset(saved_runs.own_run(model, FLAGS.model, "--sample=0").data)
        saved_runs.check_names(model, FLAGS.model, dataset)
    except (ValueError, OSError, ImportError) as error:
        print(f"previews read no held-out texts: {error}", flush=True)
        return None
    examples = dataset.splits["validation"]
    # Spread over the split: what stands side by side in a file may be alike.
    rows = np.unique(np.linspace(0, len(examples.texts) - 1, FLAGS.sample).round().astype(int))
    texts = tuple(examples.texts[row] for row in rows)
    return examples._replace(
        texts=texts,
        concepts=examples.concepts[rows],
        labels=examples.labels[rows],
        groups=None,
        row_ids=examples.row_ids[rows],
    )


if __name__ == "__main__":
    command_line.run(main, keeps_memory=False)
