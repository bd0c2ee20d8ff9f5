"""Loads the live page's server with many clients, kills it meanwhile, and checks that no acknowledged edit is lost.

bash launch/soak/run.sh server --model=runs/quickstart/model            # 50 clients, a minute
python launch/soak/server.py --model=runs/quickstart/model --clients=8 --seconds=10 --workdir=soak  # the log stays

Each client explains, previews, applies and undoes corrections of synthetic reviews, and sends bodies that are too
large, as fast as it gets answers; after a 429 it waits at most as long as the answer says. Every answer must be a
result, a 429 with Retry-After, a 413 where the body is too large, or a 409 that names the later edits that must be
undone first. Then the server gets SIGKILL during requests, and another is started on its log: exactly the edits that
were acknowledged and not undone must be active, apart from those of unanswered requests. Prints answers by status, time
and memory, or the error and ends with status 2. Linux or macOS; needs the extra `app`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import http.client
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import typing
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from sparsecbm_jax.cli import command_line

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(command_line)
flags.DEFINE_string("model", None, "Folder of the saved model.")
flags.DEFINE_integer("clients", 50, "Clients at once.", lower_bound=1)
flags.DEFINE_float("seconds", 60.0, "Seconds until the server is killed.", lower_bound=0.5)
flags.DEFINE_integer("seed", 0, "Seed of the clients' requests.")
flags.DEFINE_string("workdir", None, "Folder for the log and compiled programs; by default they are deleted.")

SERVE = Path(__file__).resolve().parents[1] / "serve.py"
PATIENCE = 120.0
TOO_LARGE = 100_000
# Most growth of the server's memory from a third of the time to the end: a leak of a kilobyte an answer exceeds it.
MAX_GROWTH_MB = 32.0
MOMENTS = ("after warm-up", "at a third", "at two thirds", "at the end")


def main() -> None:
    """Runs the command; see the docstring of this file."""
    if not FLAGS.model:
        raise ValueError("--model is missing; expected the folder of a saved model, such as runs/quickstart/model")
    with contextlib.ExitStack() as stack:
        folder = Path(FLAGS.workdir or stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        print(soak(folder, FLAGS.model, FLAGS.clients, FLAGS.seconds, FLAGS.seed))


class Server(typing.NamedTuple):
    """A running server."""

    process: subprocess.Popen
    port: int

    def memory(self) -> float:
        """Returns the resident memory, in MB."""
        found = subprocess.run(["ps", "-o", "rss=", "-p", str(self.process.pid)], capture_output=True, text=True)
        return int(found.stdout) / 1000


@contextlib.contextmanager
def started(folder: Path, model: str) -> Iterator[Server]:
    """Starts a server on the folder's log; kills it in the end.

    Args:
        folder: Folder of the log.
        model: Folder of the saved model.

    Raises:
        ValueError: The server does not start; the end of its output is given.
    """
    command = [sys.executable, str(SERVE), f"--model={model}", "--port=0", f"--edits={folder / 'edits.log'}"]
    # The second server reuses the programs that the first compiled.
    environment = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), **os.environ}
    with (folder / "server.txt").open("a+") as output:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=output, text=True, env=environment)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if match := re.search(r"serving at http://[^ ]+:(\d+)/", line):
                    yield Server(process, int(match[1]))
                    return
            output.seek(0)
            raise ValueError(f"the server did not start: {output.read().strip()[-2000:]}")
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@dataclasses.dataclass
class Client:
    """One client, and its answers.

    Attributes:
        number: The client's number.
        answers: Number of answers by (operation, status).
        seconds: Duration of each result.
        acknowledged: '+id' and '-id', in order.
        unknown: Change that was not answered when the server was killed, as '+' or '-id'.
        problem: Unexpected event, at which the client stops.
    """

    number: int
    answers: collections.Counter[tuple[str, int]] = dataclasses.field(default_factory=collections.Counter)
    seconds: list[float] = dataclasses.field(default_factory=list)
    acknowledged: list[str] = dataclasses.field(default_factory=list)
    unknown: str | None = None
    problem: str | None = None

    def press(self, port: int, texts: list[str], schema: dict[str, list[str]], seed: int, end: threading.Event) -> None:
        """Sends requests until the server is killed, which `end` announces.

        Args:
            port: The server's port.
            texts: Texts to send.
            schema: Names of concepts and of classes.
            seed: Seed of the requests.
            end: Set before the server is killed.
        """
        draw = random.Random(f"{seed} {self.number}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        own: list[str] = []
        while not end.is_set() and self.problem is None:
            what = draw.choices(("explain", "preview", "apply", "undo", "oversize"), (8, 3, 4, 3, 1))[0]
            if what == "undo" and not own:
                what = "apply"
            form: dict[str, str] = {"text": draw.choice(texts)}
            if what == "undo":
                form = {"edit": draw.choice(own)}
            elif what == "oversize":
                form = {"text": "a" * TOO_LARGE}
            elif what != "explain":
                form |= {name: draw.choice(names) for name, names in schema.items()}
            begun = time.monotonic()
            try:
                status, answer, wait = self._ask(connection, "explain" if what == "oversize" else what, form)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if end.is_set():
                    self.unknown = {"apply": "+", "undo": f"-{form.get('edit')}"}.get(what)
                else:
                    self.problem = f"{what}: {type(error).__name__}: {error}"
                return
            self.answers[what, status] += 1
            self._judge(what, status, answer, wait)
            if status == 200:
                self.seconds.append(time.monotonic() - begun)
            if status == 200 and what == "apply" and answer["edit"] is not None:
                own.append(answer["edit"])
                self.acknowledged.append(f"+{answer['edit']}")
            elif status == 200 and what == "undo":
                own.remove(form["edit"])
                self.acknowledged.append(f"-{form['edit']}")
            elif status == 429:
                end.wait(draw.uniform(0, wait))

    def _ask(self, connection: http.client.HTTPConnection, what: str, form: dict) -> tuple[int, typing.Any, int]:
        # Each client has an address of its own, as behind a proxy: the limit of one address is not tested here.
        headers = {"Content-Type": "application/json", "X-Forwarded-For": f"10.0.0.{self.number}"}
        connection.request("POST", f"/api/{what}", json.dumps(form), headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        return response.status, answer, int(response.headers.get("Retry-After", 0))

    def _judge(self, what: str, status: int, answer: typing.Any, wait: int) -> None:
        expected = {413, 429} if what == "oversize" else {200, 429} | ({409} if what == "undo" else set())
        if status not in expected or (status == 429 and not wait) or (status != 200 and not answer["message"]):
            self.problem = f"{what}: {status} {answer}"


def soak(folder: Path, model: str, num_clients: int, seconds: float, seed: int = 0) -> str:
    """Loads one server, kills it, starts another; returns a summary.

    Args:
        folder: Folder of the log.
        model: Folder of the saved model.
        num_clients: Number of clients at once.
        seconds: Seconds until the server is killed.
        seed: Seed of the clients' requests.

    Raises:
        ValueError: An answer was not expected, an acknowledged edit is lost, an undone one is active, or the server's
            memory grew.
    """
    from sparsecbm_jax.data.synthetic.reviews import sample_reviews

    config = json.loads((Path(model) / "config.json").read_text())["schema"]
    schema = {"concept": config["concepts"], "target": config["classes"]}
    texts = [review["description"] for review in sample_reviews()["test"]]
    clients = [Client(number) for number in range(num_clients)]
    end, memory = threading.Event(), []
    with started(folder, model) as server:
        before = active_edits(server.port)
        memory.append(server.memory())
        given = (server.port, texts, schema, seed, end)
        threads = [threading.Thread(target=client.press, args=given, daemon=True) for client in clients]
        for thread in threads:
            thread.start()
        for _ in MOMENTS[1:]:
            time.sleep(seconds / (len(MOMENTS) - 1))
            memory.append(server.memory())
        end.set()
        server.process.kill()
        for thread in threads:
            thread.join(PATIENCE)
    if problems := [f"client {client.number}: {client.problem}" for client in clients if client.problem]:
        raise ValueError("\n".join(problems))
    with started(folder, model) as server:
        num_edits, num_unknown = check(before, clients, active_edits(server.port))
    if memory[-1] - memory[1] > MAX_GROWTH_MB:
        raise ValueError(f"the server's memory grew, in MB: {dict(zip(MOMENTS, memory, strict=True))}")
    return "\n".join(_lines(clients, seconds, memory, num_edits, num_unknown))


def active_edits(port: int) -> set[str]:
    """Returns the ids of the active edits of a server."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("GET", "/api/edits")
    found = {edit["id"] for edit in json.loads(connection.getresponse().read())["edits"]}
    connection.close()
    return found


def check(before: set[str], clients: list[Client], found: set[str]) -> tuple[int, int]:
    """Checks the active edits after a restart; returns their number, and that of unanswered requests before it.

    Args:
        before: Ids active when the clients started.
        clients: The clients, with their answers.
        found: Ids active after the restart.

    Raises:
        ValueError: An acknowledged edit is lost, or there are more than unanswered requests can have made.
    """
    balance = collections.Counter(before)
    for client in clients:
        for word in client.acknowledged:
            balance[word[1:]] += 1 if word[0] == "+" else -1
    expected = {edit for edit, count in balance.items() if count > 0}
    unknown = [client.unknown for client in clients if client.unknown]
    if lost := expected - found - {word[1:] for word in unknown}:
        raise ValueError(f"acknowledged edits are lost: {sorted(lost)}")
    if len(more := found - expected) > unknown.count("+"):
        raise ValueError(f"active, though undone or never asked for: {sorted(more)}; {unknown} were on their way")
    return len(found), len(unknown)


def _lines(
    clients: list[Client], seconds: float, memory: list[float], num_edits: int, num_unknown: int
) -> Iterator[str]:
    answers = sum((client.answers for client in clients), collections.Counter[tuple[str, int]]())
    by_status = collections.Counter[int]()
    for (_, status), count in answers.items():
        by_status[status] += count
    took = sorted(second for client in clients for second in client.seconds)
    acknowledged = [word[0] for client in clients for word in client.acknowledged]
    yield f"{len(clients)} clients for {seconds:g} s: {answers.total()} requests, all answered by a result or refusal"
    yield "answers: " + ", ".join(f"{count} of status {status}" for status, count in sorted(by_status.items()))
    for what in sorted({what for what, _ in answers}):
        yield f"  {what}: " + ", ".join(
            f"{n} x {status}" for (one, status), n in sorted(answers.items()) if one == what
        )
    if took:
        half, most = took[len(took) // 2], took[int(0.95 * (len(took) - 1))]
        yield f"results took {half:.2f} s (median), {most:.2f} s (95th percentile), {took[-1]:.2f} s (most)"
    yield (
        f"edits: {acknowledged.count('+')} applied and {acknowledged.count('-')} undone, as acknowledged; "
        f"{num_edits} active after the kill and restart, none lost ({num_unknown} changes were on their way)"
    )
    stated = ", ".join(f"{value:.0f} {moment}" for moment, value in zip(MOMENTS, memory, strict=True))
    yield f"the server's memory in MB: {stated}"


if __name__ == "__main__":
    command_line.run(main, keeps_memory=False)
