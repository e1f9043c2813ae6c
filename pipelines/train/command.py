"""`camenn train`: flags, checks, closing table."""

import argparse
import os
import sys

from camenn_model.config import DEFAULT_PROFILE, PROFILES
from pipelines.runner.exit_codes import run_main
from pipelines.runner.flags import add_json_flag


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `camenn train`."""
    parser = argparse.ArgumentParser(
        prog="camenn train",
        description="Train CameNN on a shard set, calibrate it, measure it, and write a model package.",
        allow_abbrev=False,
    )
    parser.add_argument("--shards", required=True, help="shard set that `camenn shards` wrote")
    parser.add_argument("--out", required=True, help="model directory; made if it is not there")
    parser.add_argument(
        "--profile",
        default=DEFAULT_PROFILE,
        choices=sorted(PROFILES),
        help="size of the model (default %(default)s, which predicts orders without layers and experts)",
    )
    parser.add_argument(
        "--attention",
        default="prefix",
        choices=("prefix", "full"),
        help="prefix: item and audience states can be cached (default %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=1,
        help="epochs over the training part (default %(default)s: ids overfit after about one)",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=0,
        help="examples a step; 0 = 128, or up to 1024 where an epoch has 400 such steps (default %(default)s)",
    )
    parser.add_argument(
        "--micro_batches",
        type=int,
        default=0,
        help="pieces of a step's batch whose gradients are summed: less memory, and one or more "
        "for each process; 0 = one for each process (default %(default)s)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="processes of this machine that train together, on a GPU each where there are GPUs (default %(default)s)",
    )
    parser.add_argument(
        "--by_store",
        action="store_true",
        help="fill a batch from few stores: it holds fewer distinct listings, and mixes less",
    )
    parser.add_argument(
        "--learning_rate",
        type=float,
        default=1e-3,
        help="largest learning rate of steps of "
        "128 examples; that of larger ones grows by the root of the batch (default %(default)s)",
    )
    parser.add_argument(
        "--weighting",
        default="fixed",
        choices=("fixed", "uncertainty"),
        help="how the tasks' losses are weighed (default %(default)s)",
    )
    parser.add_argument("--no_alignment", action="store_true", help="train the CVR task alone")
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw (default %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto (default %(default)s)")
    parser.add_argument(
        "--precision", default="fp32", choices=("fp32", "bf16"), help="of the forward pass (default %(default)s)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="threads for computing; 0 = half of the cores, the others gather batches (default %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="threads that gather batches; 0 = the cores that do not compute (default %(default)s)",
    )
    parser.add_argument(
        "--challenge",
        action="store_true",
        help="publish the new model only where it predicts the latest closed days as well as the "
        "published one (exit code 3 otherwise)",
    )
    parser.add_argument("--rerun", action="store_true", help="train again although neither shards nor flags changed")
    add_json_flag(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, train and print.

    With `--processes` this is one of several processes.
    """
    arguments = vars(build_parser().parse_args(argv))
    as_json = arguments.pop("json")
    from pipelines.train.options import STAGE, TrainFlags

    options = TrainFlags(**arguments)
    if options.processes > 1 and "RANK" not in os.environ:
        from pipelines.train.processes import train_in_processes

        train_in_processes(options.processes, sys.argv[1:] if argv is None else argv)
        return 0
    from pipelines.runner.console import closing_table
    from pipelines.train.stage import run

    summary = run(options)
    if summary is not None:
        closing_table(STAGE, summary, as_json=as_json)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
