"""The benchmarks run, compare what is comparable, and write what they print."""

import json

import pytest

import bench

SMALL = ["--batch-size", "8", "--steps", "1", "--rounds", "1", "--workers", "1", "--device", "cpu"]


def run(tmp_path, *arguments):
    bench.main([*arguments, "--json", str(tmp_path / "figures.json")])
    return json.loads((tmp_path / "figures.json").read_text())


def test_bench_step_times_both_ways_and_how_ours_grows(tmp_path, capsys):
    pytest.importorskip("torchvision")
    pair = ["--pairs", "resnet14:resnet8", "--methods", "kd,mhkd,rkd", "--growth"]
    figures = run(tmp_path, "step", *pair, *SMALL)
    assert [list(row["ways"]) for row in figures["rows"]] == [["ours", "the usual way"]] * 2 + [["ours"]]
    ways = figures["growth"][0]["ways"]
    assert list(ways) == ["kd", "mhkd, 1 head", "mhkd, 2 heads", "mhkd, 3 heads", "mhkd, batch 2", "mhkd, batch 32"]
    for found in (ways, *(row["ways"] for row in figures["rows"])):
        assert all(way["images_per_second"] > 0 and way["peak_bytes"] > 0 for way in found.values())
    assert ways["mhkd, batch 32"]["peak_bytes"] > 2 * ways["mhkd, 3 heads"]["peak_bytes"]
    assert "neither networks nor heads" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["kd", "mhkd"])
def test_both_ways_of_bench_step_do_the_same_work(method):
    pytest.importorskip("torchvision")
    one = bench.Bench.make("resnet14:resnet8", method, bench.parse(["step", *SMALL]), crop_padding=0)
    one.data.train_images[:] = one.data.train_images[0, 0, 0]  # all of one colour: crops, flips, order mean nothing
    one.data.train_labels[:] = 7
    ours, usual = bench.our_way(one), bench.usual_way(one, 0)
    for _ in range(3):
        assert next(ours)[0].item() == pytest.approx(next(usual)[0], rel=1e-3)


def test_bench_loss_compares_time_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", [(2, 4, 10)])
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    figures = run(tmp_path, "loss", "--no-compile", "--device", "cpu")
    plain = figures["rows"][0]
    assert plain["contestant"] == "plain PyTorch" and plain["gradient_bytes"] == 2 * 4 * 10 * 4
    assert all(row["seconds"] > 0 for row in figures["rows"])
    assert plain["extra_bytes"] > plain["gradient_bytes"]
