"""Serves the live page of a saved model: type a text, see its pathway, correct a concept, preview, apply, undo.

sparsecbm serve --model=runs/quickstart/model
sparsecbm serve --model=runs/quickstart/model --port=8080 --edits=runs/quickstart/edits.log
SPARSECBM_TOKEN=... sparsecbm serve --model=runs/quickstart/model --host=0.0.0.0

Needs the extra `app`. Corrections are stored in --edits, a log that `sparsecbm edits` and `sparsecbm correct --log`
read as well; each is on disk before it is acknowledged, and made again when the server starts. By default each
preserves those before it, whose texts are in --requests, which `sparsecbm correct` reads as well; on two CPU cores it
takes some ten seconds. With --editor=minimal each changes as few weights as repair its concept, looks at no other text,
and takes about a second.

Only this machine reaches the server, unless --host says otherwise: then a token is needed, that of the variable
SPARSECBM_TOKEN or one that is made and printed. It travels in the clear: put a proxy that speaks TLS before the server,
or use an SSH tunnel. Programs are compiled before the first request; with JAX_COMPILATION_CACHE_DIR=FOLDER, the next
start finds them there.
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
    from sparsecbm_jax.correction.request_file import RequestFile
    from sparsecbm_jax.data.schema import Examples
    from sparsecbm_jax.intervention.editors import Editor
    from sparsecbm_jax.model.sparse_cbm import SparseCBM

FLAGS = flags.FLAGS
command_line.define_model()
command_line.define_former_flags(lasting="--lasting=FILE is now --requests=FILE, and --lasting= is --editor=minimal")
flags.adopt_module_key_flags(command_line)
flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; beyond loopback, a token is needed.")
flags.DEFINE_integer("port", 8000, "Port to listen at; 0 for a free one.", lower_bound=0, upper_bound=65535)
flags.DEFINE_string("edits", None, "File of edits; by default edits.log next to the model's folder.")
flags.DEFINE_enum("editor", None, ["continual", "minimal"], "How masks are edited; by default continual.")
flags.DEFINE_string(
    "requests", None, "continual: JSONL file of earlier corrections; by default corrections.jsonl next to the edits."
)
flags.DEFINE_integer(
    "sample", 64, "Held-out texts of the model's own data that previews read; 0 for none.", lower_bound=0
)
flags.DEFINE_list("allowed_hosts", [], "Names, other than localhost and addresses, that the server may be called by.")

TOKEN = "SPARSECBM_TOKEN"


def main() -> None:
    """Runs the command."""
    folder = command_line.model_folder()
    # Before the model is read, so that a port in use, or a missing library, costs no time.
    from sparsecbm_jax.app import Session, create_app, is_loopback

    try:
        import uvicorn
    except ImportError:
        raise ImportError("the live page needs uvicorn: pip install 'sparsecbm-jax[app]'") from None
    with contextlib.ExitStack() as stack:
        bound = stack.enter_context(_bound(FLAGS.host, FLAGS.port))
        token = os.environ.get(TOKEN) or (None if is_loopback(FLAGS.host) else secrets.token_urlsafe(24))

        from sparsecbm_jax.runtime.progress import progress

        model, _ = saved_runs.read_sparse()
        path = Path(FLAGS.edits or Path(folder).resolve().parent / "edits.log")
        path.parent.mkdir(parents=True, exist_ok=True)
        editor, requests = _editor(model, path)
        session = stack.enter_context(
            contextlib.closing(Session(model, path, _sample(model), editor=editor, requests=requests))
        )
        print(f"{_counted(len(session.edits), 'active edit')} in {path}", flush=True)
        if requests is not None:
            print(f"{_counted(session.num_kept, 'earlier correction')} of {requests.path} kept", flush=True)
        for length in progress(session.warm_up(), description="compiling", total=session.num_lengths, unit="length"):
            print(f"compiled for texts of up to {length} tokens", flush=True)
        app = create_app(session, token=token, host_names=[FLAGS.host, socket.gethostname(), *FLAGS.allowed_hosts])
        # Who reads this may ask at once: requests wait until the loop runs.
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
    """Returns a socket that has its address and does not listen yet.

    Raises:
        OSError: The address is not free, or not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise OSError(f"--host={host} --port={port} cannot be used: {error.strerror or error}") from None
    return bound


def _address(bound: socket.socket, token: str | None) -> str:
    """Returns what to open in a browser; it hands the browser the token."""
    host = socket.gethostname() if FLAGS.host in ("0.0.0.0", "::") else FLAGS.host
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{bound.getsockname()[1]}/" + (f"?token={token}" if token else "")


def _counted(number: int, what: str) -> str:
    return f"{number} {what if number == 1 else what + 's'}"


def _editor(model: SparseCBM, edits: Path) -> tuple[Editor, RequestFile | None]:
    """Returns the editor of `--editor`, and the file of earlier corrections for a continual one."""
    from sparsecbm_jax.correction.request_file import RequestFile
    from sparsecbm_jax.intervention import editors

    if FLAGS.editor == "minimal":
        return editors.minimal(), None
    anchors = saved_runs.anchors(model, FLAGS.model, is_asked=FLAGS.editor == "continual")
    if anchors is None:
        return editors.minimal(), None
    editor = editors.continual(anchors, original=model.arrays)
    return editor, RequestFile(FLAGS.requests or edits.with_name("corrections.jsonl"))


def _sample(model: SparseCBM) -> Examples | None:
    """Returns texts of the model's own validation split; None, and says why, where it cannot be read."""
    import numpy as np

    if not FLAGS.sample:
        return None
    try:
        dataset = saved_runs.own_data(model, FLAGS.model, "--sample=0")
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
