"""`camenn`: a thin dispatcher.

Each command is a module with `main(argv)`, imported only when it is called.
"""

import atexit
import contextlib
import importlib
import logging
import os
import sys
from typing import NoReturn

from pipelines.runner.exit_codes import ExitCode, run_main
from pipelines.runner.log import set_up_logging
from pipelines.stages import STAGES

COMMANDS = {
    "simulate": ("simulator.cli", "make a data directory: a simulated city with known truth"),
    **{stage.name: (stage.command, stage.summary) for stage in STAGES.values()},
    "nightly": ("pipelines.nightly.command", "embed, shards, train if due, score and report, from one config file"),
    "runs": ("pipelines.ops.runs", "show the published run of each output, and those before it"),
    "publish": ("pipelines.ops.publish", "let readers see a finished run that is not the published one"),
    "rollback": ("pipelines.ops.rollback", "let readers see the run that was published before"),
    "gc": ("pipelines.ops.gc", "remove files that no kept run refers to"),
    "fsck": ("pipelines.ops.fsck", "compare every file with its checksum; say what to run again; repair"),
    "doctor": ("pipelines.ops.doctor", "look at this machine: versions, devices, weights, disk; say what to do"),
}


def usage() -> str:
    """Return the text of `camenn --help`."""
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return (
        "usage: camenn COMMAND [flags]\n\nMultimodal conversion prediction for intra-city retail.\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\ncamenn COMMAND --help lists a command's flags."
    )


class _QuietImport(logging.Filter):
    """A filter for Beam's message about absent client libraries.

    Beam warns on import that Google's client libraries are absent, which most users intend.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return "apitools not found" not in record.getMessage()


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("camenn"))
        return 0
    if argv[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        print(
            f"camenn: no command '{argv[0]}'" + (f"; did you mean '{near[0]}'?" if near else "") + "\n" + usage(),
            file=sys.stderr,
        )
        return 2
    set_up_logging()
    for handler in logging.getLogger().handlers:
        handler.addFilter(_QuietImport())
    # Each worker process warns that it has no directory for user-registered coders; there are none.
    logging.getLogger("apache_beam.runners.portability.local_job_service").setLevel(logging.ERROR)
    # Threads that spin while they wait make two threads on two busy cores thirty times slower than
    # one (measured: 6 against 208 examples/s). It must be set before any library that brings OpenMP
    # is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return run_main(importlib.import_module(COMMANDS[argv[0]][0]).main, argv[1:])


def console() -> NoReturn:
    """Run the console script and exit with the command's code.

    The process ends with that code whatever its threads are doing.

    A pipeline that failed leaves threads of Beam's behind, some of them inside Arrow. A thread that
    requests Python's lock during interpreter finalization is ended in the middle of C++ code, and
    that aborts the process with exit code 134 (apache/arrow#45017). So the interpreter is not
    finalized: the registered exit handlers run, then the process exits.
    """
    code: int = ExitCode.UNEXPECTED_ERROR  # of an exception that nothing catches

    def leave() -> None:
        nonlocal code
        logging.shutdown()
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            code = ExitCode.BROKEN_PIPE
        with contextlib.suppress(BrokenPipeError):
            sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)
    try:
        code = main()
    except SystemExit as ended:
        # argparse's codes are numbers; the interpreter would print a text and exit with code 1
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    except BrokenPipeError:
        # The reader of the output closed it, as `head` does: there is nothing to report and no one to read it.
        code = ExitCode.BROKEN_PIPE
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- for what the libraries still print until the end
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
        raise
    sys.exit(code)


if __name__ == "__main__":
    console()
