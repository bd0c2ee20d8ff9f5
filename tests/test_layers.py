"""Data flows one way: a room imports only from lower floors, or from rooms above it on its own floor."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "sparsecbm_jax"
MAX_LINES = 500

# Within a floor the order counts too.
FLOORS = (
    (
        "config",
        "json_schema",
        "host_memory",
        "hlo",
        "traces",
        "chips",
        "cholesky",
        "woodfisher",
        "patterns",
        "selection",
        "masks",
        "metrics",
        "sharding",
    ),
    ("backbones", "data", "checkpoint", "edits", "edit_log"),
    ("cbm", "fisher"),
    (
        "model_card",
        "artifact",
        "blockwise",
        "criteria",
        "cutting",
        "pruning",
        "intervention",
        "minimal",
        "guards",
        "lasting",
        "correction",
        "keeping",
        "arms",
        "impact",
        "subnetworks",
        "attribution",
        "explanation",
        "rendering",
    ),
    (
        "evaluation",
        "streams",
        "logs",
        "named_arms",
        "intervention_suite",
        "steps",
        "vocabulary",
        "preparation",
        "stopping",
        "throughput",
        "finishing",
        "training",
        "programs",
        "planning",
    ),
    ("report", "app"),
)
RANK = {room: rank for rank, room in enumerate(room for floor in FLOORS for room in floor)}

# Libraries that belong to some rooms alone, wherever in a file they are imported.
OWNERS = {
    "orbax": {"checkpoint"},
    "optax": {"cbm", "steps", "training"},
    "ml_collections": set(),
    "absl": set(),
    "jinja2": {"report", "app"},
    "matplotlib": {"report"},
    "starlette": {"app"},
    "uvicorn": {"app"},
}
# Heavy or optional: imported inside the function that needs them, so that start-up does not pay for them.
LATE_ONLY = {"torch", "datasets", "tensorboard", "tensorboardX", "pandas", "pyarrow", "matplotlib", "transformers"}
FLOOR_0_LIBRARIES = {"jax", "numpy", "jaxtyping"}


class Import(NamedTuple):
    """One imported module, dotted, and whether it is imported when its file is."""

    module: str
    line: int
    at_start: bool


def _files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[Import]:
    yield from _imports_below(ast.parse(path.read_text(), str(path)), path, at_start=True)


def _imports_below(node: ast.AST, path: Path, at_start: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, at_start) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"{path}:{child.lineno}: relative import; the house imports by full name"
            module = child.module or ""
            if module == "sparsecbm_jax":
                yield from (Import(f"{module}.{alias.name}", child.lineno, at_start) for alias in child.names)
            else:
                yield Import(module, child.lineno, at_start)
        else:
            late = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
                isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            )
            yield from _imports_below(child, path, at_start and not late)


def _name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", _files(), ids=_name)
def test_rooms_keep_to_their_floors(path: Path) -> None:
    room = _room(path)
    if room == "__init__":
        return
    assert room in RANK, f"{room} stands on no floor: give it a place in FLOORS"
    for module, line, _ in _imports(path):
        parts = module.split(".")
        if parts[0] != "sparsecbm_jax" or module == "sparsecbm_jax.__version__":
            continue
        assert len(parts) > 1, f"{path}:{line}: imports the public face; import the room"
        assert parts[1] in RANK, f"{path}:{line}: {module} stands on no floor"
        assert RANK[parts[1]] <= RANK[room], f"{path}:{line}: {room} must not import {parts[1]}, which stands above it"


@pytest.mark.parametrize("path", _files(), ids=_name)
def test_libraries_keep_to_their_rooms(path: Path) -> None:
    room = _room(path)
    for module, line, at_start in _imports(path):
        library = module.split(".")[0]
        where = f"{path}:{line}: {room}"
        assert room in OWNERS.get(library, {room}), f"{where} must not import {library}"
        assert not (at_start and library in LATE_ONLY), f"{where} imports {library} at start-up"
        if room in FLOORS[0] and library not in sys.stdlib_module_names | {"sparsecbm_jax"}:
            assert room != "config", f"{where} imports {library}; only the standard library is allowed"
            assert library in FLOOR_0_LIBRARIES, f"{where} imports {library}; floor 0 is array maths alone"


@pytest.mark.parametrize("path", _files(), ids=_name)
def test_files_stay_one_room(path: Path) -> None:
    count = len(path.read_text().splitlines())
    assert count <= MAX_LINES, f"{path} has {count} lines; past {MAX_LINES} it is two rooms"


def test_no_drawer_for_odds_and_ends() -> None:
    assert not [path for path in _files() if path.stem in ("utils", "util", "helpers", "misc")]


def test_import_is_cheap() -> None:
    loaded = _modules_after("import sparsecbm_jax")
    assert not loaded & {"jax", "flax", "torch", "datasets", "transformers"}


def test_the_whole_library_starts_without_heavy_imports() -> None:
    rooms = [room for floor in FLOORS[:-1] for room in floor if (PACKAGE / room).exists() or _is_file(room)]
    loaded = _modules_after("\n".join(f"import sparsecbm_jax.{room}" for room in rooms))
    assert not loaded & {"torch", "datasets", "tensorboard", "ml_collections", "matplotlib"}


def test_public_names_exist() -> None:
    import sparsecbm_jax

    for name in sparsecbm_jax.__all__:
        assert getattr(sparsecbm_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sparsecbm_jax.nonsense


def _is_file(room: str) -> bool:
    return (PACKAGE / f"{room}.py").exists()


def _modules_after(program: str) -> set[str]:
    program = f"{program}\nimport sys\nprint(*(m for m in sys.modules if '.' not in m))"
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())
