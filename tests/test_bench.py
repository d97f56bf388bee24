"""The benchmarks run, compare what is comparable, and write what they print."""

import itertools
import json

import pytest
import torch

import bench
import mhkd
import mhkd_report
import mhkd_runs

CPU = ["--device", "cpu", "--threads", "1"]
SMALL = ["--pairs", "resnet14:resnet8", "--batch-size", "8", "--rounds", "2"]


def run(tmp_path, *arguments):
    assert bench.main([*arguments, *CPU, "--json", str(tmp_path / "figures.json")]) == 0
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
        assert row["stored_by_ce"] > 0 and row["storing_epoch"] > 0
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


def test_bench_networks_stores_milliseconds_that_the_report_shows_for_these_weights(
    tmp_path, capsys
):
    pytest.importorskip("sklearn")
    out = tmp_path / "runs"
    settings = {"teacher": "resnet14", "student": "resnet8", "method": "kd", "dataset": "digits"}
    settings |= {"epochs": 1, "subset": 64, "out": str(out), "device": "cpu"}
    result = mhkd.train(mhkd.Config(**settings))
    (teacher,) = out.glob("*-resnet14-ce-*")
    folders = [str(teacher), str(out / result["name"])]
    before = mhkd_report.report(out)
    part = before.partition("# Networks")[2].partition("\n# ")[0]
    assert "| parameters | multiply-adds | MB | test accuracy, % |" in part
    assert all(folder in part.partition("bench.py networks")[2] for folder in folders)
    run(tmp_path, "networks", *folders, "--rounds", "2")
    speed = mhkd_runs.read_json(out / result["name"] / "speed.json")
    assert {*speed["milliseconds"]} == {"1", "64"} and min(speed["milliseconds"].values()) > 0
    assert speed["environment"]["threads"] == 1
    part = mhkd_report.report(out).partition("# Networks")[2].partition("\n# ")[0]
    assert "ms (batch 1) | ms (batch 64) |" in part and "bench.py" not in part
    assert speed["environment"]["hardware"] in part
    student = [line for line in part.splitlines() if line.startswith("| resnet8, kd")][0]
    assert f"{speed['milliseconds']['64']:.3g}" in student
    (out / result["name"] / "speed.json").write_text(json.dumps(speed | {"student_sha256": "x"}))
    part = mhkd_report.report(out).partition("# Networks")[2].partition("\n# ")[0]
    assert f"| {speed['milliseconds']['64']:.3g} |" not in part  # of other weights
    capsys.readouterr()
    assert bench.main(["networks", str(tmp_path / "nowhere"), *CPU]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_parameters_and_multiply_adds_are_those_of_the_network():
    parameters, multiply_adds = mhkd_report.size_of("resnet8", 100, 32)
    assert parameters == sum(p.numel() for p in mhkd.build_model("resnet8", 100).parameters())
    by_hand = 27 * 16 + 2 * 144 * 16  # at 32 x 32
    by_hand = by_hand * 1024 + (144 * 32 + 288 * 32 + 16 * 32) * 256
    by_hand += (288 * 64 + 576 * 64 + 32 * 64) * 64 + 64 * 100
    assert multiply_adds == by_hand
    assert mhkd_report.size_of("timm:no_such_network", 100, 32) is None
