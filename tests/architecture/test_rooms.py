"""The rules on imports between rooms, read from the source: nothing is imported here."""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("schemas", "camenn_model", "pipelines", "simulator", "benchmarks", "examples", "tests", "docs")
HEAVY = {"torch", "timm", "transformers"}
ROOMS: dict[str, dict[str, set[str]]] = {
    "pipelines": {
        "": {"runner", "stages"},  # cli.py
        "stages": set(),
        "io": set(),
        "features": set(),
        "runner": {"io"},
        "runs": {"io", "runner"},
        "inputs": {"io", "runs", "runner"},
        "embed": {"inputs", "io", "runs", "runner"},
        "shards": {"inputs", "features", "io", "runs", "runner"},
        "train": {"io", "runs", "runner"},
        "score": {"inputs", "features", "io", "runs", "runner"},
        "report": {"inputs", "io", "runs", "runner", "stages"},
        "nightly": {"io", "runs", "runner", "stages"},
        "ops": {"io", "runs", "runner"},
    },
    "camenn_model": {
        # config, batch, calibration, hashing, integrity, published, tensors. package.py has a row of
        # its own.
        "": set(),
        "package": {"", "data", "model"},
        "encoders": {""},
        "content": {""},
        "data": {"", "content"},
        "model": {"", "content", "data"},
        "scoring": {"", "model"},
        "evaluation": {"", "data", "model", "scoring", "package"},
        "training": {"", "content", "data", "model", "evaluation"},
    },
}
"""Which rooms a room may import, besides itself; `""` = files beside the rooms. Imports that are
not listed fail: a stage never imports another."""
MOST_FILES = 14
"""In a room, `__init__.py` not counted"""


def modules(package: str) -> dict[str, Path]:
    """{dotted name: file} of a package's modules."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def read_imports(name: str, path: Path, *, everywhere: bool) -> Iterator[str]:
    """Yield the dotted names that a module imports.

    Without `everywhere`, only what runs when it is imported itself: no functions, no TYPE_CHECKING
    blocks.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *([base] if base else [])]
                )
            yield base
            # `from package import module` imports the module too; names that are no module match nothing.
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif not everywhere and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif not everywhere and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def imports_of(package: str, *, everywhere: bool = True) -> Iterator[tuple[str, str]]:
    """(module, what it imports) over a package."""
    for name, path in modules(package).items():
        for imported in read_imports(name, path, everywhere=everywhere):
            yield name, imported


def top(name: str) -> str:
    return name.split(".")[0]


def is_within(imported: str, module: str) -> bool:
    return imported == module or imported.startswith(f"{module}.")


def test_schemas_import_pyarrow_and_nothing_of_ours() -> None:
    foreign = {
        (name, i)
        for name, i in imports_of("schemas")
        if top(i) not in sys.stdlib_module_names and top(i) not in ("pyarrow", "schemas")
    }
    assert not foreign


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("camenn_model", {"schemas"}),
        ("pipelines", {"schemas", "camenn_model"}),
        ("simulator", {"schemas"}),
        ("examples", {"schemas"}),
    ],
)
def test_packages_import_only_those_below_them(package: str, allowed: set[str]) -> None:
    wrong = {(name, i) for name, i in imports_of(package) if top(i) in OURS and top(i) not in allowed | {package}}
    assert not wrong


@pytest.mark.parametrize("package", ["camenn_model", "simulator", "examples", "schemas"])
def test_only_pipelines_import_beam(package: str) -> None:
    assert not {(name, i) for name, i in imports_of(package) if top(i) == "apache_beam"}


def room(name: str) -> str:
    """Room of a module; `package.py` and `stages.py`, which rooms import, are one each."""
    parts = name.split(".")
    return parts[1] if len(parts) > 2 or parts[1:] in (["package"], ["stages"]) else ""


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_only_what_is_listed(package: str) -> None:
    known = modules(package)
    arrows = {(name, i) for name, i in imports_of(package) if i in known and i != package and room(name) != room(i)}
    wrong = {
        (name, i)
        for name, i in arrows
        if room(i) not in ROOMS[package][room(name)] and i not in rooms_themselves(package)
    }
    assert not wrong
    assert len(arrows) > 40, "the rooms are no longer where this test looks for them"


def rooms_themselves(package: str) -> set[str]:
    """Dotted names of a package's rooms: `from pipelines.io import files` names the room before the file."""
    return {f"{package}.{name}" for name in ROOMS[package]}


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_are_small_and_listed(package: str) -> None:
    files: dict[str, list[str]] = {}
    for name, path in modules(package).items():
        if path.name == "__init__.py":
            body = ast.parse(path.read_text()).body
            assert len(body) == 1 and isinstance(body[0], ast.Expr), f"{path} holds more than a docstring"
        else:
            files.setdefault(room(name), []).append(name)
    assert set(files) == set(ROOMS[package])
    assert max(map(len, files.values())) <= MOST_FILES, files


@pytest.mark.parametrize("package", ROOMS)
def test_neither_files_nor_rooms_import_in_circles(package: str) -> None:
    known = {name for name, path in modules(package).items() if path.name != "__init__.py"}
    files: dict[str, set[str]] = {name: set() for name in known}
    rooms: dict[str, set[str]] = {name: set() for name in ROOMS[package]}
    for name, imported in imports_of(package):
        if imported in known and imported != name:
            files[name].add(imported)
            if room(name) != room(imported):
                rooms[room(name)].add(room(imported))
    for graph in (files, rooms):
        graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
    assert sum(map(len, rooms.values())) <= 40


def test_only_embed_imports_beams_inference() -> None:
    wrong = {
        (name, i) for name, i in imports_of("pipelines") if is_within(i, "apache_beam.ml") and room(name) != "embed"
    }
    assert not wrong


def test_building_a_pipeline_loads_no_torch() -> None:
    """Neither a pipelines module nor anything that it imports at its top imports torch, timm or transformers there."""
    graph: dict[str, set[str]] = {}
    for package in ("pipelines", "camenn_model", "schemas"):
        for name, path in modules(package).items():
            graph[name] = set(read_imports(name, path, everywhere=False)) | ({package} if name != package else set())
    for start in modules("pipelines"):
        seen = {start}
        waiting: list[tuple[str, tuple[str, ...]]] = [(start, (start,))]
        while waiting:
            name, way = waiting.pop()
            for imported in sorted(graph[name]):
                assert top(imported) not in HEAVY, " → ".join((*way, imported))
                if imported in graph and imported not in seen:
                    seen.add(imported)
                    waiting.append((imported, (*way, imported)))


def test_read_imports_sees_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(
        "import a.b\nfrom . import sibling\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import hidden\n"
        "try:\n    import tried\nexcept ImportError:\n    pass\n"
        "class C:\n    import inner\n    def f(self):\n        import lazy\n"
    )
    now = set(read_imports("p.m", path, everywhere=False))
    assert {"a.b", "p.sibling", "tried", "inner"} <= now
    assert not {"lazy", "hidden"} & now
    assert {"lazy", "hidden"} <= set(read_imports("p.m", path, everywhere=True))
