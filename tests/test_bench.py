"""The benchmarks run, compare what is comparable, and write what they print."""

import itertools
import json

import pytest
import torch

import bench
import mhkd

CPU = ["--device", "cpu", "--threads", "1"]
SMALL = ["--pairs", "resnet14:resnet8", "--batch-size", "8", "--rounds", "2"]


def run(tmp_path, *arguments):
    bench.main([*arguments, *CPU, "--json", str(tmp_path / "figures.json")])
    return json.loads((tmp_path / "figures.json").read_text())


def test_bench_step_times_both_ways_and_the_parts_of_ours(tmp_path, capsys):
    pytest.importorskip("torchvision")
    figures = run(tmp_path, "step", *SMALL, "--methods", "kd,mhkd,rkd", "--precision", "bfloat16")
    ways = [row["ways"] for row in figures["rows"]]
    assert [list(way) for way in ways] == [["ours", "conventional"]] * 2 + [["ours"]]
    for found in (found for way in ways for found in way.values()):
        assert found["images_per_second"] > 0 and found["peak_bytes"] > 0
    parts = [set(row["fractions"]) for row in figures["rows"][:2]]
    assert parts[0] == {"data", "teacher", "student", "loss", "optimizer"}
    assert parts[1] == parts[0] | {"heads"}
    assert figures["environment"]["threads"] == 1
    assert "keep freed memory" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["kd", "mhkd"])
def test_both_ways_of_bench_step_do_the_same_work(method):
    pytest.importorskip("torchvision")
    networks = {"teacher": "resnet14", "student": "resnet8", "method": method}
    config = mhkd.Config(**networks, batch_size=8, crop_padding=0, precision="float32")
    data = bench.random_data(config, 24, torch.device("cpu"))
    data.images[:] = data.images[0, 0, 0]  # all of one colour: crops, flips, order mean nothing
    data.labels[:] = 7
    ours = bench.Ours(config, data)
    usual = bench.Usual(config, data)
    losses = [], []
    for mine, theirs in itertools.islice(zip(ours.batches(), usual.batches()), 3):
        losses[0].append(ours.step(*mine)[0].item())
        losses[1].append(usual.step(*theirs)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]


def test_bench_loss_compares_time_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", [(2, 4, 10)])
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    monkeypatch.setattr(bench, "ROUNDS", 2)
    figures = run(tmp_path, "loss", "--no-compile")
    plain = figures["rows"][0]
    assert plain["implementation"] == "plain PyTorch" and plain["gradient_bytes"] == 2 * 4 * 10 * 4
    assert all(row["seconds"] > 0 for row in figures["rows"])
    assert plain["peak_bytes"] > plain["gradient_bytes"]
