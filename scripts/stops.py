"""Count the stops of a reader who follows `options` through a stage's run.

A stop is a call that takes the options, or an object that was made from them, beginning with the
stage's `run`. Each call is one stop. The reader then goes into the function that is called, if it
is one of this project's, and comes back. A function that was read before is not read again.

    python -m scripts.stops [--root CHECKOUT] [MODULE ...]
"""

import argparse
import ast
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("pipelines", "camenn_model", "schemas")
STAGES = ("pipelines.embed.stage", "pipelines.shards.stage", "pipelines.train.stage", "pipelines.score.stage")


@dataclass
class Module:
    """One source file: its definitions, and where its imported names come from."""

    name: str
    functions: dict[str, ast.FunctionDef | ast.AsyncFunctionDef] = field(default_factory=dict)
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)


@dataclass
class Walk:
    """What a reader has seen: stops, files, and how often the file changed."""

    stops: list[str] = field(default_factory=list)
    seen: set[tuple[str, str]] = field(default_factory=set)
    files: set[str] = field(default_factory=set)


def read_module(root: Path, name: str) -> Module | None:
    """Parse a module of this project, or return None."""
    path = root / (name.replace(".", "/") + ".py")
    if name.split(".")[0] not in PACKAGES or not path.exists():
        return None
    module = Module(name)
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            module.functions[node.name] = node
        elif isinstance(node, ast.ClassDef):
            module.classes[node.name] = node
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                module.imported[alias.asname or alias.name] = (node.module, alias.name)
    return module


def takes(call: ast.Call, held: set[str]) -> list[int | str]:
    """Return positions and names of the arguments that are held values."""

    def is_held(value: ast.expr) -> bool:
        while isinstance(value, ast.Attribute):
            value = value.value
        return isinstance(value, ast.Name) and value.id in held

    return [n for n, value in enumerate(call.args) if is_held(value)] + [
        keyword.arg for keyword in call.keywords if keyword.arg and is_held(keyword.value)
    ]


def follow(root: Path, module: Module, name: str, held: set[str], walk: Walk) -> None:
    """Follow held values through one function, or through a class's methods."""
    if (module.name, name) in walk.seen:
        return
    walk.seen.add((module.name, name))
    walk.files.add(module.name)
    if name in module.classes:
        for node in module.classes[name].body:
            if isinstance(node, ast.FunctionDef):
                follow_body(root, module, f"{name}.{node.name}", node, {"self"}, walk)
        return
    follow_body(root, module, name, module.functions[name], held, walk)


def follow_body(
    root: Path, module: Module, name: str, function: ast.FunctionDef | ast.AsyncFunctionDef, held: set[str], walk: Walk
) -> None:
    """Count the calls of one body that take held values, and follow each."""
    held = set(held)
    calls = sorted(
        (node for node in ast.walk(function) if isinstance(node, ast.Assign | ast.Call)),
        key=lambda node: (node.lineno, node.col_offset, isinstance(node, ast.Assign)),
    )
    for node in calls:
        if isinstance(node, ast.Assign):
            made = isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name)
            if made and takes(node.value, held) and isinstance(node.targets[0], ast.Name):
                held.add(node.targets[0].id)
            continue
        given = takes(node, held - {"self"})
        if not given:
            continue
        called = ast.unparse(node.func)
        if called in ("asdict", "getattr", "isinstance", "len", "str", "files.join"):
            continue
        walk.stops.append(f"{module.name}:{node.lineno} {name} -> {called}")
        target = locate(root, module, called.split(".")[0]) if isinstance(node.func, ast.Name | ast.Attribute) else None
        if target is None or "." in called:
            continue
        where, symbol = target
        if symbol in where.classes:
            follow(root, where, symbol, set(), walk)
        elif symbol in where.functions:
            parameters = dict(enumerate(argument.arg for argument in where.functions[symbol].args.args))
            names = {str(parameters.get(one, one)) if isinstance(one, int) else one for one in given}
            follow(root, where, symbol, names, walk)


def locate(root: Path, module: Module, name: str) -> tuple[Module, str] | None:
    """Return the module and name of a function or class of this project."""
    if name in module.functions or name in module.classes:
        return module, name
    if name in module.imported:
        source, original = module.imported[name]
        found = read_module(root, source)
        if found and (original in found.functions or original in found.classes):
            return found, original
    return None


def count(root: Path, name: str) -> Walk:
    """Count the stops of one stage's `run`."""
    module = read_module(root, name)
    if module is None or "run" not in module.functions:
        raise SystemExit(f"{root}: {name} has no run()")
    walk = Walk()
    follow(root, module, "run", {module.functions["run"].args.args[0].arg}, walk)
    return walk


def main() -> None:
    """Print the stops of each stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=STAGES)
    parser.add_argument("--root", type=Path, default=Path(), help="checkout (default: here)")
    parser.add_argument("--list", action="store_true", help="print each stop")
    arguments = parser.parse_args()
    for name in arguments.modules:
        walk = count(arguments.root, name)
        print(f"{name}: {len(walk.stops)} stops in {len(walk.files)} files")
        if arguments.list:
            print("\n".join(f"    {stop}" for stop in walk.stops))


if __name__ == "__main__":
    main()
