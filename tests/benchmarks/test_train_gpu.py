"""The benchmark of training on a GPU, on this machine's processor."""

from pathlib import Path

import pytest
import torch

from benchmarks.speed import train_gpu
from camenn_model.training.corpus import TrainOptions
from pipelines.runner.exit_codes import run_main
from pipelines.shards import command as shards_command
from tests.support.small_city import catalog_table, random_city, write_data, write_store


def test_pace_with_the_loader_and_from_the_device(tmp_path: Path) -> None:
    clicks, orders = random_city(7, 900, 500)
    write_store(tmp_path / "store", catalog_table())
    write_data(tmp_path / "data", clicks, orders)
    shards = ["--data", str(tmp_path / "data"), "--store", str(tmp_path / "store"), "--out", str(tmp_path / "shards")]
    assert run_main(shards_command.main, [*shards, "--max_reject_rate", "1", "--attribution_hours", "6"]) == 0
    options = TrainOptions(shards=str(tmp_path / "shards"), out=str(tmp_path / "model"), batch_size=128)
    found = train_gpu.measure(options, 4)
    assert found["loader_busy"] > 0 and found["megaflops"] > 0.1 and found["operations_per_second"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_nothing_is_measured_without_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_gpu.main([]) == 0
    assert '"device": null' in capsys.readouterr().out
