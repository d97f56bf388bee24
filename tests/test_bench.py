"""The benchmarks run, compare what is comparable, and write what they print."""

import itertools
import json

import torch

import bench
import mhkd

CPU = ["--device", "cpu", "--threads", "1"]
SMALL = ["--pairs", "resnet14:resnet8", "--batch-size", "8", "--rounds", "2"]


def run(tmp_path, *arguments):
    bench.main([*arguments, *CPU, "--json", str(tmp_path / "figures.json")])
    return json.loads((tmp_path / "figures.json").read_text())


def test_bench_step_times_steps_and_their_parts(tmp_path):
    figures = run(tmp_path, "step", *SMALL, "--methods", "kd,mhkd,rkd", "--precision", "bfloat16")
    ways = [row["ways"] for row in figures["rows"]]
    assert [list(way) for way in ways] == 3 * [["step"]]
    for found in (found for way in ways for found in way.values()):
        assert found["images_per_second"] > 0 and found["peak_bytes"] > 0
    parts = [set(row["fractions"]) for row in figures["rows"][:2]]
    assert parts[0] == {"data", "teacher", "student", "loss", "optimizer"}
    assert parts[1] == parts[0] | {"heads"}
    assert figures["environment"]["threads"] == 1


def test_bench_step_times_steps_that_store_that_read_and_of_the_student_alone(tmp_path):
    options = ["--teacher-store", "--head-width", "8", "--head-stride", "2"]
    figures = run(tmp_path, "step", *SMALL, *options)
    for row in figures["rows"]:
        assert list(row["ways"]) == ["step", "storing", "stored", "ce"]
        assert row["stored_by_ce"] > 0
    assert figures["rows"][1]["config"]["options"]["teacher_heads"] == "pretrained"


def test_steps_with_and_without_the_store_do_the_same_work(tmp_path):
    config = mhkd.Config("resnet14", "resnet8", method="kd", batch_size=8, view_seed=0)
    data = bench.random_data(config, 24, torch.device("cpu"))
    ways = [bench.Step(config, data), *bench.with_store(config, data, tmp_path).values()][:2]
    losses = [[], []]
    for batches in itertools.islice(zip(*(way.batches() for way in ways)), 4):
        for way, batch, found in zip(ways, batches, losses):
            found.append(way.step(*batch)[0].item())
    assert losses[0] == losses[1]


def test_bench_loss_compares_time_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", [(2, 4, 10)])
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    monkeypatch.setattr(bench, "ROUNDS", 2)
    figures = run(tmp_path, "loss", "--no-compile")
    plain = figures["rows"][0]
    assert plain["implementation"] == "plain PyTorch" and plain["gradient_bytes"] == 2 * 4 * 10 * 4
    assert all(row["seconds"] > 0 for row in figures["rows"])
    assert plain["peak_bytes"] > plain["gradient_bytes"]
