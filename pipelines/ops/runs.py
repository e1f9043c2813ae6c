"""`camenn runs`: list published runs."""

import argparse
import sys

from pipelines.runner.exit_codes import run_main


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `camenn runs`."""
    parser = argparse.ArgumentParser(
        prog="camenn runs",
        description="Show the published run of each output, and the publications before it.",
        allow_abbrev=False,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--work", help="working directory with outputs of stages: store, shards, model, scores")
    where.add_argument("--out", help="one output, as in WORK/scores")
    parser.add_argument("--last", type=int, default=7, help="publications to show (default %(default)s)")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object on the last line of stdout: by stage, the published run with its directory, "
        "files, gates and closing table, the paths for readers, and the publications",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, list and print."""
    arguments = build_parser().parse_args(argv)
    import json

    from pipelines.io import files
    from pipelines.runs.listing import list_runs
    from pipelines.stages import OUTPUT_FOLDERS
    from schemas.errors import InputError
    from schemas.manifest import LATEST

    if arguments.last < 1:
        raise InputError(f"--last {arguments.last}: must be 1 or more.")
    outs = [arguments.out]
    if arguments.out is None:
        paths = [files.join(arguments.work, folder) for folder in OUTPUT_FOLDERS.values()]
        outs = [path for path in paths if files.exists(files.join(path, LATEST))]
        if not outs:
            raise InputError(
                f"--work {arguments.work}: no stage has published there: none of {', '.join(OUTPUT_FOLDERS.values())} "
                f"has a {LATEST}. Give the directory that run_local.sh or `camenn nightly` works in, or --out."
            )
    found = [list_runs(out, arguments.last) for out in outs]
    if arguments.json:
        print(json.dumps({one["stage"]: one for one in found}, sort_keys=True))
        return 0
    for one in found:
        print(f"\n{one['stage']}  {one['out']}")
        for entry in one["publications"]:
            mark = "*" if entry["run"] == one["run"] and entry is one["publications"][-1] else " "
            notes = [f"{name.replace('_', ' ')}: {entry[name]}" for name in entry if name not in ("run", "stage", "at")]
            print(f"  {mark} {entry['at']}  {entry['run']}" + (f"  ({'; '.join(notes)})" if notes else ""))
        rows = {name: table["rows"] for name, table in one["tables"].items() if table["rows"]}
        if rows:
            print("    " + ", ".join(f"{name} {count:,} rows" for name, count in rows.items()))
        for path in one["readers"].values():
            print(f"    read it at {path}")
        for gate in one["gates"]:
            print(f"    gate {gate['name']}: {'passed' if gate['passed'] else 'FAILED'}: {gate['words']}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
