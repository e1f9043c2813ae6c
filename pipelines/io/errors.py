"""Report errors outside the program to users.

They are damaged files, full disks and missing rights, reported so that a user can fix them.

Two places use it. `reading` wraps the opening and reading of a file that a user supplied, so that
any error of Arrow, a parser or the system names the file. `input_error_behind` examines the error
that ended a command: an InputError, or an error of the system with a number that a user can act on,
wherever it comes from, also through a Beam worker, which may hand over no more than a traceback's
text. Errors of the program itself stay what they are.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence

import pyarrow as pa

from pipelines.io.object_client import CHANGED
from schemas.errors import InputError

REMEDIES = {
    errno.EACCES: "Give the user that runs camenn the right to it, or name another place.",
    errno.EPERM: "Give the user that runs camenn the right to it, or name another place.",
    errno.EROFS: "Mount it for writing, or name another place.",
    errno.EMFILE: "Allow more open files (`ulimit -n 4096`), or give fewer workers.",
    errno.ENFILE: "The machine has too many files open: end other programs, or raise its limit (fs.file-max).",
    errno.ENAMETOOLONG: "Name a shorter path.",
    errno.ELOOP: "Its symbolic links lead in a circle: fix them.",
    errno.ENOLCK: "The file system has no locks: name a place on a local disk, or mount it with locks.",
    errno.EIO: "The disk or its connection fails: look at the system's log, then run again.",
    errno.ESTALE: "The server of the file system has lost it: mount it again, then run again.",
    errno.EFBIG: "The file system, or `ulimit -f`, allows no file of that size: raise the limit, or name "
    "another place.",
    errno.ENOSPC: "",
    errno.EDQUOT: "",
}
"""Remedy by error number, wherever the error comes from. For full disks see `_explain`."""

REMEDIES_OF_PATHS = {
    errno.ENOENT: "Check the path, or make it.",
    errno.ENOTDIR: "A part of the path is a file, where a directory is needed: check the path.",
    errno.EISDIR: "A file is needed there: check the path.",
    errno.EEXIST: "Something else is there already: remove it, or name another place.",
}
"""Remedies for errors that a user can fix where they gave the path. On other paths these are the
program's own errors."""

PROGRAMMING = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    SyntaxError,
    TypeError,
)
"""Never for the user to fix, whatever was being handled when one of them was raised"""

_STEP = re.compile(r" ?\[while running [^\n]*")
_RAISED = re.compile(r"(?:[\w.<>]+\.)?(\w+)(?=:|\s|$)")
_NUMBERED = re.compile(r"\[Errno (\d+)\] ([^\n]*)")
_QUOTED = re.compile(r"'([^']+)'")
_MARKERS = ("InputError: ", "DamagedError: ", "WeightsError: ", "DeviceError: ")
_LONGEST = 300


@contextlib.contextmanager
def reading(path: str, what: str, *, remedy: str = "Write it again.") -> Iterator[None]:
    """Name the file in whatever goes wrong while reading.

    Args:
        path: the file.
        what: the fault, in a message's words: "table 'clicks' cannot be read", "not JSON".
        remedy: what to do about it, unless the file is encrypted.

    Raises:
        InputError: the system, Arrow or a parser refuses it. Errors of the program pass.
    """
    try:
        yield
    except (InputError, MemoryError, pa.ArrowCancelled):
        raise
    except OSError as error:
        explained = explain_system_error(error, (path,))
        raise explained or InputError(f"{path}: {what} ({one_line(error)}). {_unencrypted(error) or remedy}") from error
    except RecursionError as error:
        raise InputError(f"{path}: {what} (nested too deeply). {remedy}") from error
    except UnicodeError as error:
        raise InputError(f"{path}: {what} (a name or text in it is not UTF-8: {one_line(error)}). {remedy}") from error
    except (pa.ArrowException, ValueError) as error:
        raise InputError(f"{path}: {what} ({one_line(error)}). {remedy}") from error


def _unencrypted(error: Exception) -> str | None:
    return "Write it without encryption." if "encrypt" in str(error).lower() else None


def one_line(error: BaseException) -> str:
    """Return an error's text on one line.

    It has no full stop, and is truncated where it is very long.
    """
    text = " ".join(str(error).split()).removesuffix(".")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def input_error_behind(error: BaseException, given: Sequence[str] = ()) -> InputError | None:
    """Find the user's error behind a command's end.

    Returns None where an error of the program ended it.

    Args:
        error: what ended it, perhaps wrapped by a Beam worker in its own exceptions, or flattened
            to text.
        given: paths and other values of the command line and its config: see `REMEDIES_OF_PATHS`.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, PROGRAMMING):
            return None
        if isinstance(seen, InputError):
            # Beam's workers raise it again with the step's name behind its text.
            text = _STEP.sub("", str(seen))
            return seen if text == str(seen) else InputError(text)
        explained = explain_system_error(seen, given) if isinstance(seen, OSError) else None
        if explained is not None:
            return explained
        seen = seen.__cause__ or seen.__context__
    return _explained_in_text(str(error), given)


def _explained_in_text(text: str, given: Sequence[str]) -> InputError | None:
    """Find an input error in a traceback's text.

    A runner may have flattened a worker's exception to text.
    """
    # The exception raised last stands below the last frames.
    lines = text.rpartition("Traceback (most recent call last):")[2].splitlines()
    raised = next((line for line in lines if line.strip() and not line.startswith(" ")), "")
    # Beam's workers wrap an exception that they cannot raise again in a RuntimeError.
    raised = raised.removeprefix("RuntimeError: ")
    name = _RAISED.match(raised)
    if name and name[1] in _PROGRAMMING_NAMES:
        return None
    for marker in _MARKERS:
        if marker in text:
            return InputError(_STEP.split(text.split(marker)[-1])[0].strip().strip("'\""))
    numbered = _NUMBERED.search(raised)
    if numbered is None:
        return None
    words = _STEP.split(numbered[2])[0].strip()
    path = _QUOTED.search(words)
    return _explain(int(numbered[1]), path[1] if path else None, words, given)


_PROGRAMMING_NAMES = {"IndexError", "KeyError", "ModuleNotFoundError", "UnboundLocalError", "ZeroDivisionError"} | {
    kind.__name__ for kind in PROGRAMMING
}


def explain_system_error(error: OSError, given: Sequence[str] = ()) -> InputError | None:
    """Return the user's message about a system error.

    It is None for an error that users cannot fix.
    """
    inner = getattr(error, "exception_details", None)
    if isinstance(inner, dict):
        # Beam's operations on many files: an error for each.
        found = [explain_system_error(one, given) for one in inner.values() if isinstance(one, OSError)]
        return next((explained for explained in found if explained is not None), None)
    if error.errno is None:
        return None
    path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
    words = error.strerror or str(error)
    return _explain(error.errno, path, words if path else one_line(error), given)


def _explain(number: int, path: str | None, words: str, given: Sequence[str]) -> InputError | None:
    place = path or words
    if CHANGED in words:
        return InputError(f"{place}: {CHANGED}. Run again." if path else f"{words}. Run again.")
    if number in (errno.ENOSPC, errno.EDQUOT):
        return InputError(
            f"{place}: the disk is full ({os.strerror(number)}). "
            "Free some of it (`camenn gc` removes what no kept run refers to) and run again: "
            "what was published is as it was."
        )
    remedy = REMEDIES.get(number)
    if remedy is None and path is not None and _is_given(path, given):
        remedy = REMEDIES_OF_PATHS.get(number)
    if remedy is None:
        return None
    return InputError(f"{place}: {os.strerror(number)}. {remedy}")


def _is_given(path: str, given: Sequence[str]) -> bool:
    """Return whether a path belongs to a given one.

    It does where it equals one of the given paths, lies below one, or is a directory that contains
    one.
    """
    path = os.path.abspath(path)
    for word in given:
        # A flag and its value may be one argument.
        for part in (word, word.partition("=")[2]):
            place = os.path.abspath(os.path.expanduser(part)) if part else ""
            if place and (f"{path}/".startswith(f"{place}/") or f"{place}/".startswith(f"{path}/")):
                return True
    return False
