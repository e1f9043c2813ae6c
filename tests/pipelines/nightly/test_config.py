"""The config of a night: the output of `--init` is read back as the defaults, and wrong keys are named."""

import tomllib
from pathlib import Path

import pytest

from pipelines.nightly import command as nightly_command
from pipelines.nightly import night
from pipelines.nightly.config import OWN, Keep, Retrain, example, read_config, stage_actions
from pipelines.runner.exit_codes import run_main
from pipelines.stages import STAGES
from schemas.errors import InputError


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "city.toml"
    path.write_text('data = "data"\nwork = "work"\n' + text)
    return str(path)


def test_init_writes_every_key_and_every_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(nightly_command.main, ["--init"]) == 0
    path = tmp_path / "city.toml"
    path.write_text(capsys.readouterr().out)
    config = read_config(str(path))
    assert (config.data, config.work) == (str(tmp_path / "data"), str(tmp_path / "work"))
    assert (config.retrain, config.keep, config.beam, config.on_failure) == (Retrain(), Keep(), (), ())
    for stage in STAGES:
        actions = stage_actions(stage)
        given = config.flags.get(stage, {})
        # TOML has no null: a flag without a default is there as a comment.
        assert given == {name: action.default for name, action in actions.items() if action.default is not None}
        for name, action in actions.items():
            assert action.default is not None or f"# {name} = " in example()
        assert not OWN & set(given)


def test_a_config_that_says_nothing_has_the_defaults(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, ""))
    assert config.retrain == Retrain() and config.keep == Keep() and config.stage_flags("embed") == []


def test_flags_reach_their_commands(tmp_path: Path) -> None:
    text = (
        'beam = ["--direct_num_workers=2"]\n[embed]\ngrid = 4\nallow_absolute = true\nimage_root = "photos"\n'
        "[train]\nno_alignment = false\nlearning_rate = 1\n"
    )
    config = read_config(write(tmp_path, text))
    command = night.stage_command(config, "embed")
    assert command[-6:] == ["--grid", "4", "--allow_absolute", "--image_root", str(tmp_path / "photos"), *config.beam]
    train = night.stage_command(config, "train")
    assert train[-3:] == ["--challenge", "--learning_rate", "1"]
    # Neither train nor report runs on Beam.
    assert config.beam[0] not in train + night.stage_command(config, "report")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[embed]\ngird = 4", "unknown key '[embed] gird'. Did you mean 'grid'?"),
        ("[embed]\nstore = 'x'", "[embed] store: a night sets this by itself"),
        ("[score]\nscore_date = '2026-01-01'", "[score] score_date: a night sets this by itself"),
        ("retrian = 1", "unknown key 'retrian'. Did you mean 'retrain'?"),
        ("[embed]\ngrid = 4.5", "[embed] grid: must be a whole number, not 4.5"),
        ("[embed]\ngrid = true", "[embed] grid: must be a whole number, not True"),
        ("[shards]\nattribution_hours = 'a day'", "[shards] attribution_hours: must be a number"),
        ("[score]\naudience = 'everyone'", "[score] audience: must be one of auto, stores, users"),
        ("[embed]\nallow_absolute = 1", "[embed] allow_absolute: must be true or false, not 1"),
        ("[retrain]\nevery_days = -1", "[retrain] every_days: must not be negative"),
        ("[retrain]\nevery_days = true", "[retrain] every_days: must be a number, not True"),
        ("[retrain]\non_drift = 1", "[retrain] on_drift: must be true or false, not 1"),
        ("[keep]\nruns = 2.5", "[keep] runs: must be a whole number, not 2.5"),
        ("[keep]\nrun = 2", "unknown key '[keep] run'. Did you mean 'runs'?"),
        ("on_failure = 'mail me'", "'on_failure' must be a list, not 'mail me'"),
        ("beam = [2]", "'beam' must be a list of texts, not [2]"),
        ("train = true", "'train' must be a table, not True"),
        ("[embed", "not TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, text)
    assert run_main(nightly_command.main, ["--config", path]) == 2
    error = capsys.readouterr().err
    assert said in error and path in error
    assert not (tmp_path / "work").exists()


def test_data_and_work_may_lie_on_object_stores(tmp_path: Path) -> None:
    path = tmp_path / "city.toml"
    path.write_text('data = "gs://city/data"\nwork = "s3://city/work/"\n[embed]\nimage_root = "gs://city/photos"')
    config = read_config(str(path))
    assert (config.data, config.work, config.output("store")) == (
        "gs://city/data",
        "s3://city/work/",
        "s3://city/work/store",
    )
    assert config.flags["embed"]["image_root"] == "gs://city/photos"
    path.write_text('data = "gs://city/data"\nwork = "~/work"')
    assert read_config(str(path)).data == "gs://city/data"


@pytest.mark.parametrize("name", ["data", "work"])
@pytest.mark.parametrize(
    ("address", "said"), [("hdfs://city/x", "must be a directory, gs:// or s3://"), ("s3://", "is no object's address")]
)
def test_an_address_that_no_stage_opens_is_refused(tmp_path: Path, name: str, address: str, said: str) -> None:
    path = tmp_path / "city.toml"
    given = {"data": "data", "work": "work", name: address}
    path.write_text("\n".join(f'{key} = "{value}"' for key, value in given.items()))
    with pytest.raises(InputError, match=f"{address}.*{said}|{said}.*{address}"):
        read_config(str(path))


@pytest.mark.parametrize("text", ['work = "w"', 'data = ""\nwork = "w"', "# nothing"])
def test_data_and_work_are_asked_for(tmp_path: Path, text: str) -> None:
    path = tmp_path / "city.toml"
    path.write_text(text)
    with pytest.raises(InputError, match="'data' is missing"):
        read_config(str(path))


def test_a_missing_config_names_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(nightly_command.main, ["--config", str(tmp_path / "no.toml")]) == 2
    assert "camenn nightly --init" in capsys.readouterr().err
    assert run_main(nightly_command.main, []) == 2
    assert tomllib.loads(example())["work"] == "work"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"data = 'caf\xe9'", "not TOML (a name or text in it is not UTF-8"),
        (b"x = " + b"[" * 100_000, "not TOML (nested too deeply)"),
        (b"".join(b"k%d = 1\n" % number for number in range(100_000)), "larger than 1,048,576 bytes, so not a config"),
        (b"k" * 1_000_000 + b" = 1", f"unknown key '{'k' * 100}...'"),
        (
            b"data = 'd'\nwork = 'w'\non_failure = " + b"[" * 60 + b"]" * 60,
            "must be a list of texts, not [[[[[[[...]]]]]]]",
        ),
        (
            b"data = 'd'\nwork = 'w'\ntrain = '" + b"t" * 100_000 + b"'",
            "'train' must be a table, not 'tttttttttttt...ttttttttttttt'",
        ),
        (b'data = "a\\u0000b"\nwork = "w"', "'data' has a NUL character"),
    ],
)
def test_a_config_that_is_none_is_refused_at_once(
    tmp_path: Path, data: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A million unknown keys took half a minute to refuse; a message is one readable line."""
    path = tmp_path / "city.toml"
    path.write_bytes(data)
    assert run_main(nightly_command.main, ["--config", str(path)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert said in error and str(path) in error
    assert len(error) < 700


def test_a_config_that_may_not_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(nightly_command.main, ["--config", str(tmp_path)]) == 2
    assert f"{tmp_path}: Is a directory. A file is needed there" in capsys.readouterr().err
    (tmp_path / "link.toml").symlink_to(tmp_path / "nowhere.toml")
    assert run_main(nightly_command.main, ["--config", str(tmp_path / "link.toml")]) == 2
    assert "link.toml: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(("work", "said"), [("file", "File exists"), ("file/deep", "Not a directory")])
def test_a_work_directory_that_cannot_be_is_named(
    tmp_path: Path, work: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The path stands in the config, not on the command line."""
    (tmp_path / "file").touch()
    path = tmp_path / "city.toml"
    path.write_text(f'data = "data"\nwork = "{work}"\n')
    assert run_main(nightly_command.main, ["--config", str(path)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/file" in error and said in error
