"""The house's rules on who imports whom, read from the source: nothing is imported here."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("schemas", "camenn_model", "pipelines", "simulator", "benchmarks", "tests", "docs")
HEAVY = {"torch", "timm", "transformers"}
STAGES = {
    f"pipelines.{name}"
    for name in ("embed_catalog", "build_shards", "score_catalog", "train_model", "nightly", "report", "doctor")
}


def modules(package: str) -> dict[str, Path]:
    """{dotted name: file} of a package's modules."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def read_imports(name: str, path: Path, *, everywhere: bool) -> Iterator[str]:
    """Dotted names that a module imports; without `everywhere`, only what runs when it is imported itself (no functions, no TYPE_CHECKING blocks)."""
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
    [("camenn_model", {"schemas"}), ("pipelines", {"schemas", "camenn_model"}), ("simulator", {"schemas"})],
)
def test_packages_import_only_those_below_them(package: str, allowed: set[str]) -> None:
    wrong = {(name, i) for name, i in imports_of(package) if top(i) in OURS and top(i) not in allowed | {package}}
    assert not wrong


@pytest.mark.parametrize("package", ["camenn_model", "simulator", "schemas"])
def test_only_pipelines_import_beam(package: str) -> None:
    assert not {(name, i) for name, i in imports_of(package) if top(i) == "apache_beam"}


def test_stages_never_import_each_other() -> None:
    wrong = {
        (name, i)
        for name, i in imports_of("pipelines")
        if name in STAGES
        for stage in STAGES - {name}
        if is_within(i, stage)
    }
    assert not wrong
    assert len(STAGES & set(modules("pipelines"))) >= 4, "the stages are no longer where this test looks for them"


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
        "try:\n    import tried\nexcept ImportError:\n    pass\nclass C:\n    import inner\n    def f(self):\n        import lazy\n"
    )
    now = set(read_imports("p.m", path, everywhere=False))
    assert {"a.b", "p.sibling", "tried", "inner"} <= now
    assert not {"lazy", "hidden"} & now
    assert {"lazy", "hidden"} <= set(read_imports("p.m", path, everywhere=True))
