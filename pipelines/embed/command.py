"""`camenn embed`: flags, checks, closing table."""

import argparse
import re
import sys

from pipelines.runner.exit_codes import run_main
from pipelines.runner.flags import add_common_flags, add_encoder_flags, new_parser, parse_with_beam
from schemas.errors import InputError


def build_parser() -> argparse.ArgumentParser:
    """Build the parser with the flags of `camenn embed`."""
    parser = new_parser(
        "embed",
        "Encode every distinct photo (on grid patches) and title of the catalog, once: by InceptionV4 and BERT, or by "
        "encoders that are named.",
    )
    parser.add_argument("--data", required=True, help="data directory with the table `catalog`")
    parser.add_argument("--store", required=True, help="embedding store; made if it is not there")
    parser.add_argument("--image_root", help="directory that image_uri is relative to (default: --data)")
    parser.add_argument(
        "--allow_absolute",
        action="store_true",
        help="let image_uri be an absolute path or any gs:// or s3:// address, or leave --image_root",
    )
    add_encoder_flags(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto (default %(default)s)")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "bf16"),
        help="of both encoders; auto = bf16 where the device has it (default %(default)s)",
    )
    parser.add_argument(
        "--compile",
        default="auto",
        choices=("auto", "on", "off"),
        help=(
            "compile InceptionV4 for this processor: other kernels, so other last bits; auto = where a run has "
            "photos enough to pay for compiling (default %(default)s)"
        ),
    )
    parser.add_argument(
        "--plan", action="store_true", help="print what a run would encode and how long that takes, and encode nothing"
    )
    parser.add_argument(
        "--accelerator",
        help=(
            "GPU of the workers that encode, on Dataflow only, as in "
            "type:nvidia-l4;count:1;install-nvidia-driver (default: none)"
        ),
    )
    add_common_flags(parser)
    return parser


def check_workers(device: str, precision: str, accelerator: str | None, dataflow: bool) -> None:
    """Hold the flags about the encoders' machines against each other.

    Raises:
        InputError: on Dataflow, where the submitting machine encodes nothing, the workers' device
            must be named. Elsewhere there is no accelerator to ask for.
    """
    if dataflow and "auto" in (device, precision):
        raise InputError(
            f"--device {device} --precision {precision}: 'auto' looks at this machine, but Dataflow's workers are "
            "others. "
            "Name both: --device cuda --precision bf16, or --device cpu --precision fp32."
        )
    if accelerator is None:
        return
    if not dataflow:
        raise InputError(
            f"--accelerator {accelerator}: only DataflowRunner gives GPUs to a step, and elsewhere the hint would "
            "only end fusion. Leave it out; --device cuda asks for a GPU."
        )
    if not re.fullmatch(r"type:[^;]+;count:\d+(;[^;]+)*", accelerator):
        raise InputError(
            f"--accelerator {accelerator}: not an accelerator. Write it as "
            "'type:nvidia-l4;count:1;install-nvidia-driver', in quotes."
        )
    if device == "cpu":
        raise InputError(
            f"--accelerator {accelerator}: with --device cpu its GPUs would be paid for and not used. Give "
            "--device cuda."
        )


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, resolve the encoders once, run and print."""
    arguments, beam_flags = parse_with_beam(build_parser(), argv)
    from camenn_model.encoders.spec import ImageSpec, TextSpec
    from pipelines.embed.options import STAGE, EmbedOptions
    from pipelines.embed.stage import plan, run
    from pipelines.inputs.photo_files import check_root_scheme
    from pipelines.io import files
    from pipelines.runner.beam import is_dataflow
    from pipelines.runner.console import closing_table

    check_workers(arguments.device, arguments.precision, arguments.accelerator, is_dataflow(beam_flags))
    check_root_scheme(arguments.image_root or arguments.data)
    image = ImageSpec.resolve(
        arguments.image_weights,
        grid=arguments.grid,
        patch_size=arguments.patch_size,
        device=arguments.device,
        precision=arguments.precision,
        compile=arguments.compile,
        model=arguments.image_model,
    )
    text = TextSpec.resolve(
        arguments.text_encoder,
        max_tokens=arguments.max_tokens,
        device=arguments.device,
        precision=arguments.precision,
    )
    options = EmbedOptions(
        data=files.absolute(arguments.data),
        store=files.absolute(arguments.store),
        image_root=files.absolute(arguments.image_root or arguments.data),
        allow_absolute=arguments.allow_absolute,
        image=image,
        text=text,
        max_reject_rate=arguments.max_reject_rate,
        accelerator=arguments.accelerator,
    )
    closing_table(STAGE, (plan if arguments.plan else run)(options, beam_flags), as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
