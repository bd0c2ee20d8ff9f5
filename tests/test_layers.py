"""Data flows one way: a package imports only from packages below it, and no two files import each other."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.paths import REPOSITORY

PACKAGE = REPOSITORY / "sparsecbm_jax"
MAX_LINES = 500
MAX_MEDIAN = 200
MAX_FUNCTION = 80
MAX_ARGUMENTS = 7

# From the bottom up. Packages of one level import only from levels below it.
LEVELS = (
    ("core", "config"),
    ("runtime",),
    ("backbones",),
    ("data",),
    ("model",),
    ("pruning", "explanation", "intervention"),
    ("correction", "evaluation"),
    ("training", "cli"),
    ("report", "planning"),
    ("app",),
    ("commands",),
)
LEVEL_OF = {package: number for number, level in enumerate(LEVELS) for package in level}

# Libraries that belong to some packages alone, wherever in a file they are imported.
OWNERS = {
    "orbax": {"runtime"},
    "optax": {"model", "training"},
    "ml_collections": {"cli"},
    "absl": {"cli", "commands"},
    "jinja2": {"report", "app"},
    "matplotlib": {"report"},
    "starlette": {"app"},
    "uvicorn": {"app", "commands"},
}
# Heavy or optional: imported inside the function that needs them, so that start-up does not pay for them.
LATE_ONLY = {"torch", "datasets", "tensorboard", "tensorboardX", "pandas", "pyarrow", "matplotlib", "transformers"}
# What these packages may import beside the standard library and packages below them.
LIBRARIES = {"config": set[str](), "core": {"jax", "numpy", "jaxtyping", "chex"}}


class Import(NamedTuple):
    """One imported module, dotted, and whether it is imported when its file is."""

    module: str
    line: int
    at_start: bool
    for_types: bool


def _files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def _package(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def _module(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def _imports(path: Path) -> Iterator[Import]:
    yield from _imports_below(ast.parse(path.read_text(), str(path)), path, at_start=True, for_types=False)


def _imports_below(node: ast.AST, path: Path, at_start: bool, for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, at_start, for_types) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"{path}:{child.lineno}: relative import; write the full name"
            module = child.module or ""
            for alias in child.names:
                inner = f"{module}.{alias.name}"
                yield Import(inner if _is_module(inner) else module, child.lineno, at_start, for_types)
        else:
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            is_types = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            late = is_function or is_types
            yield from _imports_below(child, path, at_start and not late, for_types or is_types)


def _is_module(name: str) -> bool:
    place = REPOSITORY.joinpath(*name.split("."))
    return name.startswith("sparsecbm_jax") and (place.with_suffix(".py").is_file() or place.is_dir())


def _name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def _circle(graph: Mapping[str, set[str]]) -> list[str] | None:
    """Nodes that reach each other in a ring; None where there is no such ring."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str] | None:
        if node in way:
            return way[way.index(node) :]
        if node in done:
            return None
        for following in sorted(graph.get(node, ())):
            if found := walk(following, [*way, node]):
                return found
        done.add(node)
        return None

    return next((found for node in sorted(graph) if (found := walk(node, []))), None)


def test_the_package_holds_packages_only() -> None:
    found = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert found == {*LEVEL_OF, "__init__.py", "__main__.py", "version.py", "py.typed"}


def test_every_folder_is_a_package_with_a_docstring() -> None:
    for folder in {path.parent for path in _files()}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), f"{folder} does not say what it is"


@pytest.mark.parametrize("path", _files(), ids=_name)
def test_packages_import_downwards(path: Path) -> None:
    package = _package(path)
    for module, line, _, _ in _imports(path):
        root, *parts = module.split(".")
        if root != "sparsecbm_jax" or parts == ["version"]:
            continue
        assert parts, f"{path}:{line}: imports the public face; import the module"
        other = parts[0]
        below = LEVEL_OF[other] < LEVEL_OF[package] or other == package
        assert below, f"{path}:{line}: {package} must not import {other}, which is not below it"


def test_no_circle_between_packages() -> None:
    graph: dict[str, set[str]] = {package: set() for package in LEVEL_OF}
    for path in _files():
        for module, *_ in _imports(path):
            parts = module.split(".")
            if parts[0] == "sparsecbm_jax" and parts[1] in LEVEL_OF and parts[1] != _package(path):
                graph[_package(path)].add(parts[1])
    assert _circle(graph) is None
    assert _circle({**graph, "core": {"app"}}), "the search finds a circle where there is one"


def test_no_circle_between_files() -> None:
    graph = {_module(path): set[str]() for path in _files()}
    for path in _files():
        if path.name != "__init__.py":
            graph[_module(path)] |= {module for module, *_ in _imports(path) if module in graph}
    assert _circle(graph) is None


@pytest.mark.parametrize("path", _files(), ids=_name)
def test_libraries_keep_to_their_packages(path: Path) -> None:
    package = _package(path)
    for module, line, at_start, for_types in _imports(path):
        library = module.split(".")[0]
        where = f"{path}:{line}: {package}"
        assert package in OWNERS.get(library, {package}), f"{where} must not import {library}"
        assert not (at_start and library in LATE_ONLY), f"{where} imports {library} at start-up"
        if package in LIBRARIES and not for_types:
            known = sys.stdlib_module_names | {"sparsecbm_jax"} | LIBRARIES[package]
            assert library in known, f"{where} imports {library}"


@pytest.mark.parametrize("path", _files(), ids=_name)
def test_files_stay_short(path: Path) -> None:
    count = len(path.read_text().splitlines())
    assert count <= MAX_LINES, f"{path} has {count} lines; past {MAX_LINES} it holds two things"


def test_the_median_file_is_short() -> None:
    assert statistics.median(len(path.read_text().splitlines()) for path in _files()) < MAX_MEDIAN


@pytest.mark.parametrize("path", [*_files(), *sorted((REPOSITORY / "launch").rglob("*.py"))], ids=lambda p: p.name)
def test_functions_stay_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        where = f"{path}:{node.lineno}: {node.name}"
        assert node.body[-1].end_lineno is not None
        body = node.body[1:] if ast.get_docstring(node) else node.body
        lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
        assert lines <= MAX_FUNCTION, f"{where} has {lines} lines; past {MAX_FUNCTION} it has phases with names"
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([name for name in arguments if name not in ("self", "cls")])
        assert count <= MAX_ARGUMENTS, f"{where} has {count} arguments; past {MAX_ARGUMENTS} they are a dataclass"


def test_no_drawer_for_odds_and_ends() -> None:
    assert not [path for path in _files() if path.stem in ("utils", "util", "helpers", "misc", "common")]


def test_import_is_cheap() -> None:
    loaded = _modules_after("import sparsecbm_jax")
    assert not loaded & {"jax", "flax", "torch", "datasets", "transformers"}


def test_the_whole_library_starts_without_heavy_imports() -> None:
    modules = [_module(path) for path in _files() if _package(path) not in ("cli", "report", "app", "commands")]
    loaded = _modules_after("\n".join(f"import {module}" for module in modules))
    assert not loaded & {"torch", "datasets", "tensorboard", "ml_collections", "matplotlib"}


def test_public_names_exist() -> None:
    import sparsecbm_jax

    for name in sparsecbm_jax.__all__:
        assert getattr(sparsecbm_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sparsecbm_jax.nonsense


def _modules_after(program: str) -> set[str]:
    program = f"{program}\nimport sys\nprint(*(m for m in sys.modules if '.' not in m))"
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())
