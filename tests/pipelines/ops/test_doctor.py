import json
import os
from pathlib import Path

import pytest

from pipelines.ops import doctor
from pipelines.ops.doctor import FAIL, OK, WARN, Check
from tests.support.tiny_encoders import write_text_model


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_packages_meet_the_bounds_of_setup() -> None:
    found = by_name(doctor.check_packages())
    assert {"apache-beam", "torch", "pyarrow", "jinja2"} <= set(found)
    assert all(check.status == OK for check in found.values() if check.essential)
    assert "pytest" not in found


def test_package_below_its_bound_fails_with_the_command_that_mends_it() -> None:
    found = by_name(doctor.check_packages(["numpy>=999", "no-such-package-here>=1", "pyarrow>=1"]))
    assert found["numpy"].status == found["no-such-package-here"].status == FAIL
    assert found["numpy"].remedy == "pip install 'numpy>=999'"
    assert "not installed" in found["no-such-package-here"].found
    assert found["pyarrow"].status == OK
    assert doctor.exit_code(list(found.values())) == 1


def test_missing_extra_is_a_warning_and_other_platforms_are_left_out() -> None:
    lines = [
        "no-such-package-here>=4.5; extra == 'baselines'",
        "also-not-here; sys_platform == 'nowhere'",
        "ruff; extra == 'dev'",
    ]
    found = doctor.check_packages(lines)
    assert [(check.name, check.status) for check in found] == [("no-such-package-here", WARN)]
    assert found[0].remedy == "pip install 'camenn[baselines]'"
    assert doctor.exit_code(found) == 0


def test_old_python_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_PYTHON", (99, 0))
    assert doctor.check_python().status == FAIL


@pytest.mark.parametrize(
    ("cpuinfo", "status"),
    [("flags : avx2 avx512f avx512_bf16", OK), ("flags : avx2 amx_bf16", OK), ("flags : avx2", WARN), ("", OK)],
)
def test_processor_is_judged_by_native_bf16(cpuinfo: str, status: str) -> None:
    assert doctor.check_processor(cpuinfo).status == status


def test_compiler_missing_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    check = doctor.check_compiler()
    assert check.status == doctor.WARN and not check.essential and "g++" in check.remedy


def test_encoders_random_warns_and_missing_path_names_its_flag(tmp_path: Path) -> None:
    found = by_name(doctor.check_encoders("random:7", str(tmp_path / "none")))
    assert found["photo encoder"].status == WARN
    assert "untrained weights" in found["photo encoder"].found
    assert found["title encoder"].status == WARN
    assert "--text_encoder" in found["title encoder"].remedy


def test_encoders_ask_nothing_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with doctor.hub_offline():
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in os.environ
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with doctor.hub_offline():
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["HF_HUB_OFFLINE"] == "0"


def test_flink_jar_is_found_in_the_cache(tmp_path: Path) -> None:
    missing = doctor.check_flink_jar((tmp_path,))
    assert missing.status == WARN and "flink_local.sh fetch" in missing.remedy
    (tmp_path / "beam-runners-flink-1.20-job-server-2.77.0.jar").touch()
    assert doctor.check_flink_jar((tmp_path / "other", tmp_path)).status == OK


@pytest.mark.parametrize(
    ("answer", "status"), [('openjdk version "17.0.15" 2025', OK), ('java version "11.0.2"', OK), ("nonsense", WARN)]
)
def test_java_version_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, status: str) -> None:
    program = tmp_path / "java"
    program.write_text(f"#!/bin/sh\necho '{answer}' >&2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    check = doctor.check_java()
    assert check.status == status


def test_java_absent_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.check_java().status == WARN


def test_disk_of_a_directory_that_is_not_made_yet_is_its_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.check_disk(str(tmp_path / "a" / "b")).found.endswith(str(tmp_path))
    monkeypatch.setattr(doctor, "LEAST_DISK", 10**18)
    check = doctor.check_disk(str(tmp_path))
    assert check.status == WARN and check.remedy


def test_memory_is_at_most_the_containers_limit(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("2000000000\n")
    check = doctor.check_memory(limit)
    assert (check.status, check.found) == (WARN, "2.0 GB")
    limit.write_text("max\n")
    assert doctor.check_memory(limit).found != "2.0 GB"


def test_encoders_of_other_models_are_described(tmp_path: Path) -> None:
    text = write_text_model(tmp_path, "distilbert")
    photo, title = doctor.check_encoders("random:1", str(text), "resnet18")
    assert photo.found.startswith("resnet18: random:1") and title.status == OK
    photo, title = doctor.check_encoders("random:1", str(text / "none"), "resnet19")
    assert photo.status == title.status == WARN
    assert "did you mean resnet1" in photo.remedy and "--text_encoder" in title.remedy


def test_main_prints_json_and_exits_with_zero(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert (
        doctor.main(["--json", "--image_weights", "random:1", "--text_encoder", str(tmp_path), "--out", str(tmp_path)])
        == 0
    )
    value = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [check["name"] for check in value["checks"]]
    assert names[0] == "python" and {
        "photo encoder",
        "title encoder",
        "java",
        "free disk",
        "memory",
        "accelerator",
        "C++ compiler",
    } <= set(names)
    assert value["ok"] + value["warn"] + value["fail"] == len(names)


def test_main_prints_a_line_with_a_remedy_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show(
        [
            Check(name="a", status=FAIL, found="gone", remedy="fetch it", essential=True),
            Check(name="bb", status=OK, found="there"),
        ],
        ".",
        0.1,
        as_json=False,
    )
    lines = capsys.readouterr().out.splitlines()
    assert "  fail  a   gone" in lines
    assert any(line.strip() == "→ fetch it" for line in lines)
    assert "  1 ok, 0 to look at, 1 failed" in lines
