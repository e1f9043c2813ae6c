"""Read and write the config file of `camenn nightly`.

This one file holds every setting of a night. It is read, checked key by key, and written out with
every default by `--init`.
"""

import argparse
import difflib
import json
import os
import re
import reprlib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from pipelines.io import files, objects
from pipelines.io.errors import reading
from pipelines.stages import STAGES
from schemas.errors import InputError

LARGEST = 2**20
"""Most bytes of a config"""
_LONGEST_NAME = 100

OWN = frozenset(
    [
        "help",
        "data",
        "store",
        "shards",
        "model",
        "out",
        "run",
        "json",
        "plan",
        "rerun",
        "rebuild",
        "as_of",
        "score_date",
        "challenge",
    ]
)
"""Flags of the stages that a night sets by itself, or that name one moment and would be wrong the night after."""


def _setting(default: Any, words: str) -> Any:
    return field(default=default, metadata={"words": words})


@dataclass(frozen=True, kw_only=True)
class Retrain:
    """Settings for when a night trains.

    Days are those of the logs, not of the clock.
    """

    every_days: float = _setting(
        7.0, "train when the logs have grown by so many days since the last training; 0 = never by schedule"
    )
    on_drift: bool = _setting(True, "train when the published model is not calibrated any more, at most once a day")
    drift: float = _setting(
        0.1,
        "how far predicted over observed orders may be from 1 on the latest closed days, beyond two standard errors",
    )
    challenge: bool = _setting(
        True, "a new model takes over only where it predicts the latest closed days as well as the published one"
    )


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Settings for what is kept of earlier nights."""

    runs: int = _setting(7, "runs published last that are kept of each output; 0 = remove nothing")
    retention_days: float = _setting(0.0, "keep no run that was published longer ago; 0 = however long ago")
    stale_hours: float = _setting(48.0, "scores published longer ago make the exit code 5")


@dataclass(frozen=True, kw_only=True)
class NightlyConfig:
    """A checked config."""

    path: str
    data: str
    work: str
    beam: tuple[str, ...] = ()
    on_failure: tuple[str, ...] = ()
    retrain: Retrain = field(default_factory=Retrain)
    keep: Keep = field(default_factory=Keep)
    flags: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By stage: flags other than those that a night sets by itself"""

    def output(self, name: str) -> str:
        """Return the path of an output in the working directory.

        It is one of store, shards, model or scores.
        """
        return files.join(self.work, name)

    @property
    def words(self) -> tuple[str, ...]:
        """List every path and value that the config gives."""
        values = (str(value) for flags in self.flags.values() for value in flags.values())
        return (self.path, self.data, self.work, *values)

    def stage_flags(self, stage: str) -> list[str]:
        """Return a stage's flags, as its command takes them.

        A true switch is the flag alone, a false one is left out.
        """
        found = []
        for name, value in self.flags.get(stage, {}).items():
            if isinstance(value, bool):
                found += [f"--{name}"] if value else []
            else:
                found += [f"--{name}", str(value)]
        return found


def stage_actions(stage: str) -> dict[str, argparse.Action]:
    """Return the flags that a config may set, by name.

    They are those of a stage.
    """
    parser = STAGES[stage].module().build_parser()
    return {action.dest: action for action in parser._actions if action.option_strings and action.dest not in OWN}


def read_config(path: str) -> NightlyConfig:
    """Read and check the config.

    Relative paths of data, work and the photos are resolved against the file's directory: cron
    starts in another one.

    Raises:
        InputError: not there, too large, not TOML, an unknown or missing key, or a value of the
            wrong kind.
    """
    given = _parse(path)
    known = {"data": str, "work": str, "beam": list, "on_failure": list, "retrain": dict, "keep": dict} | dict.fromkeys(
        STAGES, dict
    )
    for name, value in given.items():
        _check_name(path, name, known)
        if not isinstance(value, known[name]):
            raise InputError(f"--config {path}: '{name}' must be {_KINDS[known[name]]}, not {show(value)}.")
    for name in ("data", "work"):
        if not given.get(name):
            raise InputError(f"--config {path}: '{name}' is missing. `camenn nightly --init` shows what it is.")
        if "\0" in given[name]:
            raise InputError(f"--config {path}: '{name}' has a NUL character, which no path can have. Remove it.")
        _check_scheme(path, name, given[name])
    for name in ("beam", "on_failure"):
        if not all(isinstance(word, str) for word in given.get(name, [])):
            raise InputError(f"--config {path}: '{name}' must be a list of texts, not {show(given[name])}.")
    flags: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        if stage in given:
            actions = stage_actions(stage)
            for name, value in given[stage].items():
                _check_name(path, name, actions, stage)
                _check_flag(f"--config {path}: [{stage}] {name}", value, actions[name])
            flags[stage] = dict(given[stage])
    base = os.path.dirname(os.path.abspath(path))
    if "image_root" in flags.get("embed", {}):
        flags["embed"]["image_root"] = _beside(base, flags["embed"]["image_root"])
    return NightlyConfig(
        path=os.path.abspath(path),
        data=_beside(base, given["data"]),
        work=_beside(base, given["work"]),
        beam=tuple(given.get("beam", ())),
        on_failure=tuple(given.get("on_failure", ())),
        retrain=_read_settings(path, "retrain", Retrain, given.get("retrain", {})),
        keep=_read_settings(path, "keep", Keep, given.get("keep", {})),
        flags=flags,
    )


def _parse(path: str) -> dict[str, Any]:
    if not os.path.lexists(path):
        raise InputError(f"--config {path}: no such file. `camenn nightly --init > {path}` writes one to start from.")
    remedy = "`camenn nightly --init` prints a config to start from."
    with reading(path, "not TOML", remedy=remedy), open(path, "rb") as handle:
        data = handle.read(LARGEST + 1)
        # The parser alone would take minutes on a large table of unknown keys.
        if len(data) > LARGEST:
            raise InputError(f"--config {path}: larger than {LARGEST:,} bytes, so not a config. {remedy}")
        return tomllib.loads(data.decode())


_KINDS: dict[Any, str] = {str: "a text", list: "a list", dict: "a table", bool: "true or false", float: "a number"}


def show(value: Any) -> str:
    """Return a value as it would be written.

    It is truncated where it is long or deep.
    """
    return reprlib.repr(value)


def _check_scheme(path: str, name: str, value: str) -> None:
    """Refuse an address that no stage could open."""
    if files.is_local(value):
        return
    if not objects.is_object(value):
        raise InputError(f"--config {path}: '{name}' must be a directory, gs:// or s3://, not {show(value)}.")
    lacking = objects.missing_library(objects.split(value)[0])
    if lacking:
        raise InputError(f"--config {path}: '{name}' is {show(value)}, but {lacking}")


def _beside(base: str, path: str) -> str:
    path = os.path.expanduser(path)
    return os.path.normpath(os.path.join(base, path)) if files.is_local(path) else path


def _check_name(path: str, name: str, known: Any, table: str | None = None) -> None:
    if name in known:
        return
    shown = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
    where = f"[{table}] {shown}" if table else shown
    if table in STAGES and name in OWN:
        raise InputError(f"--config {path}: {where}: a night sets this by itself. Leave it out.")
    # The time of a comparison grows with the product of both lengths.
    near = difflib.get_close_matches(name, known, n=1) if len(name) <= _LONGEST_NAME else []
    hint = f" Did you mean '{near[0]}'?" if near else f" Known ones: {', '.join(known)}."
    raise InputError(f"--config {path}: unknown key '{where}'.{hint}")


def _check_flag(where: str, value: Any, action: argparse.Action) -> None:
    if action.nargs == 0:
        kind, fits = "true or false", isinstance(value, bool)
    elif action.type is int:
        kind, fits = "a whole number", isinstance(value, int) and not isinstance(value, bool)
    elif action.type is float:
        kind, fits = "a number", isinstance(value, int | float) and not isinstance(value, bool)
    else:
        kind, fits = "a text", isinstance(value, str)
    if not fits:
        raise InputError(f"{where}: must be {kind}, not {show(value)}.")
    if action.choices is not None and value not in action.choices:
        raise InputError(f"{where}: must be one of {', '.join(map(str, action.choices))}, not {show(value)}.")


def _read_settings(path: str, table: str, kind: type[Any], given: dict[str, Any]) -> Any:
    known = {entry.name: entry for entry in fields(kind)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        _check_name(path, name, known, table)
        wanted: type[Any] = type(known[name].default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (isinstance(value, bool) if wanted is bool else number and (wanted is float or isinstance(value, int))):
            raise InputError(f"--config {path}: [{table}] {name}: must be {_words(wanted)}, not {show(value)}.")
        if number and not value >= 0:
            raise InputError(f"--config {path}: [{table}] {name}: must not be negative.")
        values[name] = wanted(value)
    return kind(**values)


def _words(kind: type[Any]) -> str:
    return "a whole number" if kind is int else _KINDS[kind]


# --- writing one


def example() -> str:
    """Write a config with every key and its default.

    A comment describes each. Only `data` and `work` must be changed.
    """
    lines = [
        "# camenn nightly --config city.toml",
        "# Every key with its default; what is left out has it. Relative paths are those beside this file.",
        "",
        'data = "data"          # catalog, clicks, orders and so on',
        'work = "work"          # store/, shards/, model/, scores/, report/ and nights/ are made in it',
        "beam = []              # flags for Apache Beam, for example "
        '["--direct_num_workers=2", "--direct_running_mode=multi_processing"]',
        "on_failure = []        # a command and its arguments, run where the exit code is "
        "not 0; CAMENN_EXIT_CODE, CAMENN_MESSAGE and CAMENN_RECORD give the cause",
    ]
    for table, kind in (("retrain", Retrain), ("keep", Keep)):
        lines += ["", f"[{table}]"]
        lines += [_line(entry.name, entry.default, entry.metadata["words"]) for entry in fields(kind)]
    for stage in STAGES:
        actions = stage_actions(stage)
        if actions:
            lines += ["", f"[{stage}]  # flags of `camenn {stage}`"]
            lines += [_line(name, action.default, _help(action)) for name, action in actions.items()]
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any, words: str) -> str:
    if value is None:
        # TOML has no null.
        return f"# {name} =  # {words}"
    text = str(value).lower() if isinstance(value, bool) else json.dumps(value)
    return f"{name} = {text}  # {words}"


def _help(action: argparse.Action) -> str:
    words = re.sub(
        r" \(default:? %\(default\)s(: ([^)]*))?\)",
        lambda found: f" ({found[2]})" if found[2] else "",
        action.help or "",
    )
    one_of = f"; one of {', '.join(map(str, action.choices))}" if action.choices else ""
    return words + one_of


def describe(config: NightlyConfig) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of all settings.

    The record of a night lists them.
    """
    yield from (("data", config.data), ("work", config.work), ("beam", list(config.beam)))
    for name, settings in (("retrain", config.retrain), ("keep", config.keep)):
        yield name, {entry.name: getattr(settings, entry.name) for entry in fields(settings)}
    yield "flags", config.flags
