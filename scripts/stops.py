"""Count a reader's stops in a stage's run.

The reader follows `options`.

    python -m scripts.stops [--root CHECKOUT] [--made] [--list] [MODULE ...]

A stop is a call that takes the options, a field of them, or an object that holds them, beginning
with the stage's `run`. Making a plain record is none: there is nothing to read. The reader goes
into a function of the stage's own room and comes back. Functions of other rooms are contracts,
known from elsewhere. What was read once is not read again.

With `--made`, values that were computed from the options (`inputs`, `pairs`) are followed too.
"""

import argparse
import ast
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("pipelines", "camenn_model", "schemas")
STAGES = ("pipelines.embed.stage", "pipelines.shards.stage", "pipelines.train.stage", "pipelines.score.stage")
SHARED = {"manifest", "publication", "files", "tables", "options", "console", "gates"}
"""Modules of every stage while `pipelines` had no rooms (f7f002f)"""


@dataclass
class Module:
    """One source file: definitions, and origins of imported names."""

    name: str
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)


@dataclass
class Walk:
    """A reader's way: stops in order, and what was read."""

    root: Path
    made: bool
    room: str
    stops: list[str] = field(default_factory=list)
    seen: set[tuple[str, str]] = field(default_factory=set)

    def enters(self, module: Module) -> bool:
        """Return whether a module is of the stage's own room."""
        package, _, rest = module.name.partition(".")
        if package != "pipelines":
            return False
        # A checkout of before the rooms has none: what every stage shares is left out.
        return module.name.startswith(f"{self.room}.") if "." in rest else rest not in SHARED

    def locate(self, module: Module, name: str) -> tuple[Module, str] | None:
        """Return where a function or class of this project is."""
        if name in module.functions or name in module.classes:
            return module, name
        source, original = module.imported.get(name, ("", ""))
        found = read_module(self.root, source)
        if found and (original in found.functions or original in found.classes):
            return found, original
        return None

    def follow(self, module: Module, function: ast.FunctionDef, held: set[str]) -> None:
        """Count and follow the calls that take held values."""
        if (module.name, function.name) in self.seen:
            return
        self.seen.add((module.name, function.name))
        nodes = [node for node in ast.walk(function) if isinstance(node, ast.Assign | ast.Call)]
        for node in sorted(nodes, key=lambda node: (node.end_lineno or 0, node.end_col_offset or 0)):
            if isinstance(node, ast.Assign):
                self.hold(module, node, held)
            else:
                self.stop(module, function.name, node, held)

    def hold(self, module: Module, node: ast.Assign, held: set[str]) -> None:
        """Hold what was made from held values."""
        call, target = node.value, node.targets[0]
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and isinstance(target, ast.Name)):
            return
        found = self.locate(module, call.func.id)
        if found and whole_arguments(call, held) and (self.made or found[1] in found[0].classes):
            held.add(target.id)

    def stop(self, module: Module, where: str, call: ast.Call, held: set[str]) -> None:
        """Count a call, and go into what it calls."""
        called = ast.unparse(call.func)
        first, _, rest = called.partition(".")
        source = module.imported.get(first, ("", ""))[0].split(".")[0]
        ours = first in module.functions or first in module.classes or source in PACKAGES or first in held
        of_field = first in held and "." in rest
        if called == "files.join" or of_field or not ours or not (arguments(call, held) or first in held):
            return
        found = self.locate(module, first)
        if found and not rest and found[1] in found[0].classes and not is_transform(found[0].classes[found[1]]):
            return
        self.stops.append(f"{module.name}:{call.lineno} {where} -> {called}")
        passed = whole_arguments(call, held)
        if found is None or rest or not passed or not self.enters(found[0]):
            return
        target, symbol = found
        if symbol in target.functions:
            parameters = [argument.arg for argument in target.functions[symbol].args.args]
            names = {parameters[one] if isinstance(one, int) else one for one in passed}
            self.follow(target, target.functions[symbol], names)


def is_transform(node: ast.ClassDef) -> bool:
    """Return whether a class is a step of a pipeline."""
    return any("PTransform" in ast.unparse(base) or "DoFn" in ast.unparse(base) for base in node.bases)


def read_module(root: Path, name: str) -> Module | None:
    """Parse a module of this project, or return None."""
    path = root / (name.replace(".", "/") + ".py")
    if name.split(".")[0] not in PACKAGES or not path.exists():
        return None
    module = Module(name)
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            module.functions[node.name] = node
        elif isinstance(node, ast.ClassDef):
            module.classes[node.name] = node
    for inner in ast.walk(tree):
        if isinstance(inner, ast.ImportFrom) and inner.module:
            for alias in inner.names:
                module.imported[alias.asname or alias.name] = (inner.module, alias.name)
    return module


def whole_arguments(call: ast.Call, held: set[str]) -> list[int | str]:
    """Return positions and names of arguments that are held."""
    return [n for n, value in enumerate(call.args) if isinstance(value, ast.Name) and value.id in held] + [
        keyword.arg
        for keyword in call.keywords
        if keyword.arg and isinstance(keyword.value, ast.Name) and keyword.value.id in held
    ]


def arguments(call: ast.Call, held: set[str]) -> bool:
    """Return whether a call takes a held value or field."""
    for value in [*call.args, *(keyword.value for keyword in call.keywords)]:
        while isinstance(value, ast.Attribute):
            value = value.value
        if isinstance(value, ast.Name) and value.id in held:
            return True
    return False


def count(root: Path, name: str, *, made: bool) -> Walk:
    """Count the stops of one stage's `run`."""
    module = read_module(root, name)
    if module is None or "run" not in module.functions:
        raise SystemExit(f"{root}: {name} has no run()")
    walk = Walk(root, made, name.rpartition(".")[0])
    function = module.functions["run"]
    walk.follow(module, function, {function.args.args[0].arg})
    return walk


def main() -> None:
    """Print the stops of each stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=STAGES)
    parser.add_argument("--root", type=Path, default=Path(), help="checkout (default: here)")
    parser.add_argument("--made", action="store_true", help="follow what was computed from the options too")
    parser.add_argument("--list", action="store_true", help="print each stop")
    given = parser.parse_args()
    for name in given.modules:
        walk = count(given.root, name, made=given.made)
        print(f"{name}: {len(walk.stops)} stops in {len({place for place, _ in walk.seen})} files")
        if given.list:
            print("\n".join(f"    {stop}" for stop in walk.stops))


if __name__ == "__main__":
    main()
