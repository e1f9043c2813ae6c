"""Write the generated documentation from the code.

docs/reference/tables.md comes from the schemas, docs/reference/flags.md from the parsers,
docs/reference/exit_codes.md from `ExitCode`, and the rooms in docs/architecture.md from the
imports.

A test holds all of them to the code: run `make docs` after a change.
"""

import ast
import importlib
import os
from pathlib import Path

from pipelines.cli import COMMANDS
from pipelines.runner.exit_codes import FURTHER_CODES, ExitCode
from schemas.audience import AUDIENCE, CANDIDATES
from schemas.catalog import CATALOG
from schemas.contract import Contract
from schemas.embeddings import EMBEDDED_ITEMS, embedding_keys, image_embeddings, title_embeddings
from schemas.events import CLICKS, ORDERS
from schemas.reasons import Reason
from schemas.rejects import DEFECTS, REJECTS
from schemas.scores import LISTING_QUALITY, SCORES
from schemas.training import EXAMPLES, ITEMS
from schemas.users import STORES, USERS

HERE = Path(__file__).parent
INPUTS = (CATALOG, CLICKS, ORDERS, USERS, STORES, AUDIENCE, CANDIDATES)
OUTPUTS = (SCORES, LISTING_QUALITY, REJECTS, DEFECTS)
EMBEDDINGS = (image_embeddings(16, 1536), title_embeddings(16, 384))
BETWEEN = (EMBEDDED_ITEMS, *EMBEDDINGS, *map(embedding_keys, EMBEDDINGS), ITEMS, EXAMPLES)

READING = (
    "**Blank is missing.** In every column named here, a text that is empty or nothing but white space counts as "
    "null: a row whose required id is blank is a reject (`null_user_id` and so on) like one whose id is null, a "
    "listing with a blank `store_id` is in all stores, a blank `user_id` of the audience is anybody. Other texts "
    "are taken as they are, white space around them included: `' a'` and `'a'` are two ids.",
    "",
    "**Texts are UTF-8.** A row of catalog, clicks or orders with a text in another encoding is a reject "
    "(`not_utf8`); in the other tables it ends the run with file, row and column.",
    "",
    "**Files.** A table is `NAME.parquet` or a directory `NAME/` (or `NAME.parquet/`) with `.parquet` files at "
    "any depth, symbolic links included. Below the table's directory, files and directories whose names begin "
    "with `_` or `.` are passed over, and names that end with `._COPYING_`: what writers have under way "
    "(`_temporary`, `.spark-staging-1`) or keep beside (`_SUCCESS`, `_delta_log`). As in Spark, a name with `=` "
    "that begins with `_` is a partition and is read (`_x=1/`). Two columns of one name, a file that is cut off "
    "or damaged, a directory that may not be read and a link that leads nowhere end the run with the file's name;"
    " page checksums are verified where the writer wrote them.",
)


SHAPES = (
    "The shapes of `embedding` are examples, those of the demo: 4 × 4 patches of InceptionV4's 1,536 numbers, 16 "
    "tokens of a small BERT's 384. Widths are the encoders' own, patches are `--grid` squared, tokens `--max_tokens`: "
    "64 and 32 by default. `train` reads the shapes from the shard set, so both profiles take any of them.",
    "",
)


def table_section(contract: Contract) -> str:
    """Return one table as Markdown."""
    lines = [
        f"### `{contract.name}`",
        "",
        contract.doc,
        "",
        f"Key: {', '.join(f'`{name}`' for name in contract.key)}.",
        "",
        "| column | type | null | what |",
        "|---|---|---|---|",
    ]
    for column in contract.columns:
        null = "column may be absent" if column.optional else "yes" if column.nullable else "no"
        lines.append(f"| `{column.name}` | {column.type} | {null} | {column.doc} |")
    if contract.extra_columns:
        lines.append("| *others* | any | yes | further columns are allowed |")
    return "\n".join([*lines, ""])


def tables() -> str:
    """Return docs/reference/tables.md."""
    parts = [
        "# Tables",
        "",
        "Written by `make docs` from `schemas/`. Times are `timestamp[us]`, UTC; zoned ones are converted. "
        "Ids are strings; integers are widened. They join as they are written: case, blanks and leading zeros "
        "count. Gates report ids that differ only in these ([nightly](../guides/nightly.md#gates)).",
        "",
        *READING,
        "",
    ]
    for title, contracts in (("What you bring", INPUTS), ("What comes out", OUTPUTS), ("What lies between", BETWEEN)):
        parts += [
            f"## {title}",
            "",
            *(SHAPES if contracts is BETWEEN else ()),
            *(table_section(contract) for contract in contracts),
        ]
    return "\n".join(parts).rstrip() + "\n"


def flags() -> str:
    """Return docs/reference/flags.md."""
    # argparse wraps help to the terminal's width.
    os.environ["COLUMNS"] = "110"
    os.environ["NO_COLOR"] = "1"
    parts = ["# Flags", "", "Written by `make docs` from the parsers.", ""]
    for command, (module, text) in COMMANDS.items():
        parser = importlib.import_module(module).build_parser()
        parts += [
            f"## `camenn {command}`",
            "",
            f"{text[0].upper()}{text[1:]}.",
            "",
            "```",
            parser.format_help().rstrip(),
            "```",
            "",
        ]
    return "\n".join(parts).rstrip() + "\n"


def exit_codes() -> str:
    """Return docs/reference/exit_codes.md."""
    further = {code for codes in FURTHER_CODES.values() for code in codes}
    every = ", ".join(str(code.value) for code in ExitCode if code not in further)
    lines = [
        "# Exit codes",
        "",
        "Written by `make docs` from `pipelines/runner/exit_codes.py`.",
        "",
        "| code | name | what happened | what to do |",
        "|---|---|---|---|",
        *(f"| {code.value} | `{code.name}` | {code.meaning} | {code.remedy} |" for code in ExitCode),
        "",
        "Whatever the code, readers see the run before or the new one, never a part of it. "
        "What each code means to a night: [Every night, unattended](../guides/nightly.md#exit-codes).",
        "",
        f"Every command can end with {every}. These end with others too:",
        "",
        "| command | further codes |",
        "|---|---|",
    ]
    for command in COMMANDS:
        if command in FURTHER_CODES:
            lines.append(f"| `camenn {command}` | {', '.join(str(code.value) for code in FURTHER_CODES[command])} |")
    return "\n".join(lines) + "\n"


def reasons() -> str:
    """Return docs/reference/reasons.md."""
    lines = [
        "# Reasons",
        "",
        "Written by `make docs` from `schemas/reasons.py`. Reasons stay as they are from version to version: "
        "filter alerts and dashboards by them. Each row has file, row, column and value in `detail`.",
    ]
    for table, text in (
        ("rejects", "Rows that were dropped. Above `--max_reject_rate` of a table they end the run."),
        ("defects", "Listings that were kept without their photo."),
    ):
        lines += ["", f"## `{table}`", "", text, "", "| reason | what is wrong | what to do |", "|---|---|---|"]
        lines += [f"| `{one}` | {one.meaning} | {one.remedy} |" for one in Reason if one.table == table]
    return "\n".join(lines) + "\n"


ROOMS_BEGIN, ROOMS_END = "<!-- rooms: written by `make docs` -->", "<!-- end of rooms -->"
PACKAGES = ("pipelines", "camenn_model")


def find_rooms(package: str) -> dict[str, tuple[str, set[str]]]:
    """Find a package's rooms in its source.

    Returns {room: (what it holds, rooms of the package that its files import)}.
    """
    root = HERE.parent / package
    rooms: dict[str, tuple[str, set[str]]] = {}
    for folder in sorted(path.parent for path in root.glob("*/__init__.py")):
        doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        used: set[str] = set()
        for file in folder.glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
                    used.add((node.module or "").split(".")[1])
        rooms[folder.name] = doc.split("\n")[0], used - {folder.name}
    return {room: (doc, used & set(rooms)) for room, (doc, used) in rooms.items()}


def reduce_arrows(rooms: dict[str, tuple[str, set[str]]]) -> list[tuple[str, str]]:
    """Return the arrows between rooms, without redundant ones.

    An arrow is redundant where a longer way of arrows says the same already.
    """

    def reached(room: str) -> set[str]:
        return {below for used in rooms[room][1] for below in {used, *reached(used)}}

    return sorted(
        (room, used)
        for room, (_, all_used) in rooms.items()
        for used in all_used
        if not any(used in reached(other) for other in all_used - {used})
    )


def rooms() -> str:
    """Return the generated part of docs/architecture.md.

    It is a picture and a table of each package's rooms.
    """
    parts = []
    for package in PACKAGES:
        found = find_rooms(package)
        arrows = "\n".join(f"    {room} --> {used}" for room, used in reduce_arrows(found))
        rows = "\n".join(
            f"| `{package}/{room}/` | {doc} | {', '.join(sorted(used)) or '–'} |" for room, (doc, used) in found.items()
        )
        parts.append(
            f"### `{package}/`\n\n```mermaid\nflowchart TD\n{arrows}\n```\n\n"
            f"| room | what it holds | imports |\n|---|---|---|\n{rows}\n"
        )
    return "\n".join(parts)


def architecture() -> str:
    """Return docs/architecture.md, its generated part written again."""
    before, _, rest = (HERE / "architecture.md").read_text().partition(ROOMS_BEGIN)
    return f"{before}{ROOMS_BEGIN}\n\n{rooms()}\n{ROOMS_END}{rest.partition(ROOMS_END)[2]}"


def reference() -> dict[str, str]:
    """Return the generated pages of docs/reference by file name."""
    return {"tables.md": tables(), "flags.md": flags(), "exit_codes.md": exit_codes(), "reasons.md": reasons()}


def main() -> None:
    """Write all generated pages."""
    (HERE / "architecture.md").write_text(architecture())
    for name, text in reference().items():
        (HERE / "reference" / name).write_text(text)


if __name__ == "__main__":
    main()
