"""`camenn nightly`: flags."""

import argparse
import sys

from pipelines.runner.exit_codes import run_main
from pipelines.runner.flags import add_json_flag
from schemas.errors import InputError


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `camenn nightly`."""
    parser = argparse.ArgumentParser(
        prog="camenn nightly",
        description="Run embed, shards, train where it is due, score and report in order; each does only what changed.",
        epilog="exit codes: 0 all is well; 1 something unforeseen (see the traceback); 2 something "
        "to fix: input, config, a full disk; 3 a gate kept tonight's embeddings or "
        "scores from readers; "
        "4 another night is running; 5 the published scores are older than they may be. "
        "After each of them readers see tonight's scores whole, or those of before.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="TOML file; see --init")
    parser.add_argument("--init", action="store_true", help="print a config with every default, and stop")
    add_json_flag(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, run the night and print."""
    arguments = build_parser().parse_args(argv)
    if arguments.init:
        from pipelines.nightly.config import example

        print(example(), end="")
        return 0
    if arguments.config is None:
        raise InputError("--config is missing. `camenn nightly --init` prints a config to start from.")
    from pipelines.io.errors import input_error_behind
    from pipelines.nightly.config import read_config
    from pipelines.nightly.night import run_night

    config = read_config(arguments.config)
    try:
        return run_night(config, arguments.json)
    except OSError as error:
        explained = input_error_behind(error, config.words)
        if explained is None:
            raise
        raise explained from error


if __name__ == "__main__":
    sys.exit(run_main(main))
