"""Errors that end a command: one line where the user can fix it, a traceback where the program is wrong."""

import errno
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import apache_beam as beam
import pytest

from pipelines.io import files
from pipelines.io.errors import REMEDIES, REMEDIES_OF_PATHS, input_error_behind, reading
from pipelines.runner.beam import open_pipeline
from pipelines.runner.exit_codes import refuse_not_utf8, run_main
from schemas.errors import InputError

ANYWHERE = sorted(REMEDIES)
OF_PATHS = sorted(REMEDIES_OF_PATHS)
Wrap = Callable[[BaseException], BaseException]


def system_error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)


def flattened(error: BaseException) -> RuntimeError:
    """A worker's error as raised by a runner with workers in other processes."""
    try:
        raise error
    except BaseException:
        text = traceback.format_exc().rstrip("\n")
    return RuntimeError(f"Error received from SDK harness for instruction 4: {text} [while running 'Write']\n\n")


@pytest.mark.parametrize("wrap", [lambda error: error, flattened])
@pytest.mark.parametrize("number", ANYWHERE)
def test_system_errors_that_a_user_can_mend_are_one_line(
    number: int, wrap: Wrap, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str] | None) -> int:
        raise wrap(system_error(number, "/work/city/part-0.parquet"))

    assert run_main(main, []) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("camenn: error: /work/city/part-0.parquet: ")
    assert os.strerror(number) in said and said.endswith(".")


@pytest.mark.parametrize("wrap", [lambda error: error, flattened])
@pytest.mark.parametrize("number", OF_PATHS)
def test_what_is_not_there_is_the_users_where_they_named_it(number: int, wrap: Wrap) -> None:
    error = wrap(system_error(number, "/city/data/deep/a"))
    for given in (["--data", "/city/data"], ["--out=/city/data/deep/a"], ["--out", "/city/data/deep/a/b"]):
        reported = input_error_behind(error, given)
        assert reported is not None and str(reported).startswith(f"/city/data/deep/a: {os.strerror(number)}. ")
    for given in ([], ["--data", "/city/dat"], ["--seed", "3"]):
        assert input_error_behind(error, given) is None


PROGRAM = [
    TypeError("f() takes 1 positional argument"),
    KeyError("user_id"),
    IndexError("list index out of range"),
    AssertionError("books"),
    AttributeError("no attribute"),
    ZeroDivisionError("division by zero"),
    NotImplementedError(),
]
OTHERS = [ValueError("operands could not be broadcast"), ConnectionRefusedError(errno.ECONNREFUSED, "refused")]
HANDLED = [system_error(errno.EACCES, "/a"), InputError("not this")]


@pytest.mark.parametrize("wrap", [lambda error: error, flattened])
@pytest.mark.parametrize(
    ("error", "handled"),
    [(error, None) for error in (*PROGRAM, *OTHERS)] + [(error, handled) for error in PROGRAM for handled in HANDLED],
)
def test_errors_of_the_program_stay_what_they_are(error: Exception, handled: Exception | None, wrap: Wrap) -> None:
    """Also where one was raised while an error that a user could fix was being handled."""
    try:
        error.__context__ = handled
        raise error
    except Exception as met:
        caught = wrap(met)
    assert input_error_behind(caught, ["--data", "/a"]) is None

    def main(argv: list[str] | None) -> int:
        raise caught

    with pytest.raises(type(caught)):
        run_main(main, [])


def fail(kind: str) -> None:
    if kind == "system":
        raise system_error(errno.EROFS, "/city/shards/part-0.parquet")
    if kind == "input":
        raise InputError("clicks.parquet: row 3: column 'user_id' is wrong. Fix it.")
    nothing: dict[int, int] = {}
    try:
        raise system_error(errno.EROFS, "/city/shards/part-0.parquet")
    except OSError:
        nothing[3]


SYSTEM = "/city/shards/part-0.parquet: Read-only file system. Mount it for writing, or name another place."


@pytest.mark.parametrize(
    ("kind", "said", "elsewhere"),
    [
        ("system", SYSTEM, False),
        ("input", "clicks.parquet: row 3: column 'user_id' is wrong. Fix it.", False),
        ("program", None, False),
        ("system", SYSTEM, True),
    ],
)
def test_a_beam_workers_error_is_found(kind: str, said: str | None, elsewhere: bool) -> None:
    flags = ["--direct_num_workers=1", "--direct_running_mode=multi_processing"] if elsewhere else []
    with pytest.raises(Exception) as caught, open_pipeline(flags) as pipeline:
        _ = pipeline | beam.Create([kind]) | "Fail" >> beam.Map(fail)
    reported = input_error_behind(caught.value)
    assert (None if reported is None else str(reported)) == said


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "Expecting value"),
        (b"{'a': 1}", "Expecting property name"),
        (b"[" * 200_000, "nested too deeply"),
        ('{"a": "Jos\u00e9"}'.encode("latin-1"), "not UTF-8"),
        (b"\x00\x01", "Expecting value"),
    ],
)
def test_json_that_is_none_is_named(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "latest.json").write_bytes(data)
    with pytest.raises(
        InputError, match=rf"latest.json: not JSON \(.*{why}.*\)\. Write it again, or remove it"
    ) as caught:
        files.read_json(str(tmp_path / "latest.json"))
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 700
    with pytest.raises(InputError, match="none.json: No such file or directory"):
        files.read_json(str(tmp_path / "none.json"))
    with pytest.raises(InputError, match=f"{tmp_path}: Is a directory"):
        files.read_json(str(tmp_path))


def test_reading_lets_errors_of_the_program_pass() -> None:
    for error in (TypeError("t"), KeyError("k"), AssertionError("a"), MemoryError(), InputError("mine")):
        with pytest.raises(type(error)) as caught, reading("a.parquet", "table 'a' cannot be read"):
            raise error
        assert caught.value is error


def test_a_long_message_is_cut_to_one_line() -> None:
    with pytest.raises(InputError) as caught, reading("a.json", "not JSON"):
        raise ValueError("word \n" * 1_000)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_beams_operations_on_many_files_tell_of_each() -> None:
    error = beam.io.filesystem.BeamIOError("Delete operation failed", {"/a": system_error(errno.EACCES, "/a")})
    assert str(input_error_behind(error)).startswith("/a: Permission denied. ")
    assert input_error_behind(beam.io.filesystem.BeamIOError("Match operation failed")) is None


def test_words_that_are_not_utf8_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    refuse_not_utf8(["--data", "/caf\u00e9"])

    def main(argv: list[str] | None) -> int:
        raise AssertionError("ran")

    assert run_main(main, ["--data", os.fsdecode(b"/caf\xe9")]) == 2
    assert "/caf\\xe9: the path or flag is not UTF-8" in capsys.readouterr().err
