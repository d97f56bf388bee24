"""Bad input ends with one clear sentence on stderr and a non-zero exit; nothing is overwritten."""

import functools
import io
import os
import shutil
import signal
import time
import zipfile

import pytest
import torch
from conftest import (
    ALONE,
    FOLDER,
    MHKD,
    end_of,
    half,
    listing,
    pixels,
    read,
    run,
    save_image,
    script,
    start,
)

import mhkd
import mhkd_fused
import mhkd_runs

pytest.importorskip("sklearn")
pytest.importorskip("PIL")


@pytest.fixture
def refused(tmp_path, failing):
    """Runs what makes no sense: the one sentence has these parts, and no file is harmed."""

    def check(arguments, *parts, made=False):
        before = listing(tmp_path)
        sentence = failing(tmp_path / "out", *arguments)
        assert all(str(part) in sentence for part in parts), sentence
        after = listing(tmp_path)
        assert {p: after.get(p) for p in before} == before  # nothing overwritten, nothing gone
        assert made or before.keys() == after.keys()
        return sentence

    return check


# Names and the command line


@pytest.mark.parametrize("base, line, parts", [
    (MHKD, "--teacher resnet32x5", "'resnet32x5'|resnet32x4"),
    (ALONE, "--dataset cifar101", "'cifar101'|cifar100"),
    (MHKD, "--method quux", "'quux'|ce|kd|mhkd"),
    ([], "--teacher resnet14", "--student"),
    ([], "--student resnet8", "--teacher"),
    (ALONE, "--epoch 3", "--epoch:|did you mean --epochs"),
    (ALONE, "stray", "stray"),
    (ALONE, "--epochs many", "--epochs|many"),
    (ALONE, "--lr", "--lr"),
    (ALONE, "--tau 2", "--tau is an option of --method|kd|mhkd|not of ce"),
    (ALONE, "--device tpu9", "--device|tpu9"),
    (ALONE, "--device cuda:99", "--device|cuda:99"),
    (ALONE, "--device meta", "--device|meta"),
    (ALONE, "--precision tf32", "--precision tf32 is for CUDA|cpu"),
    (ALONE, "--subset 30 --batch-size 31", "31|30|--batch-size"),
    (MHKD, "--units 4", "has no unit 4"),
    (MHKD, "--teacher-units layer1,layer9 --student-units layer1,layer2", "'layer9'|layer2|layer3"),
    (MHKD, "--student-units layer9,fc --teacher-units layer1,layer2", "'layer9'|layer2|layer3"),
    (MHKD, "--teacher-units layer1 --student-units fc", "'fc'"),
    (MHKD, "--student-units layer2,layer3", "both|--teacher-units|--student-units"),
    (MHKD, "--teacher-units layer1,layer2 --student-units layer1",
     "--teacher-units|--student-units"),
])  # fmt: skip
def test_what_cannot_be_is_named_with_what_can_be_before_anything_is_made(
    base, line, parts, refused
):
    refused([*base, *line.split()], *parts.split("|"))


@pytest.mark.parametrize("option, value", [
    (option, value) for option, values in {
        "--tau": "0 -1 nan inf 1e300", "--alpha": "nan 1.5 -0.1", "--beta": "nan -1 inf",
        "--batch-size": "0 1 -4", "--epochs": "0 99999999999", "--lr": "0 nan inf 1e300",
        "--lr-steps": "3,2 -1", "--lr-decay": "0", "--momentum": "1 nan",
        "--weight-decay": "-1 nan 1e300", "--head-width": "0 99999999999", "--head-stride": "0",
        "--crop-padding": "-1", "--crop-scale": "0", "--image-size": "15 100000", "--subset": "0",
        "--val-fraction": "1", "--seed": f"-1 {'9' * 30}", "--teacher-seed": "-1",
        "--units": "0 1,1 ", "--backend": "quick", "--precision": "half", "--teacher-weights": "",
        "--student-init": "imagenet",
    }.items() for value in values.split(" ")
])  # fmt: skip
def test_a_value_that_makes_no_sense_is_named_with_what_it_must_be(option, value, refused):
    sentence = refused([*MHKD, option, value], f"{option} must be ")
    shown = sentence.removesuffix("\n").rpartition(", not ")[2]
    assert shown == value or float(shown) == float(value)


def test_the_fused_backend_is_refused_where_it_is_not_installed(refused, monkeypatch):
    monkeypatch.setattr(mhkd_fused, "_loaded", False)
    refused([*MHKD, "--backend", "fused"], "--backend fused", "not installed")


def test_out_that_is_a_file_is_named(refused, tmp_path):
    (tmp_path / "out").write_text("mine")
    refused(ALONE, tmp_path / "out")


# A folder of images


@pytest.fixture
def images(tmp_path):
    for i in range(16):
        name = f"images/{('train', 'test')[i // 8]}/{'ab'[i // 4 % 2]}/{i % 4}.png"
        save_image(tmp_path / name, pixels(16, 16, 3, seed=i))
    return tmp_path / "images"


def test_a_good_folder_of_images_is_not_refused(images, tmp_path):
    assert run(tmp_path / "out", *FOLDER, images) == 0


@pytest.mark.parametrize("gone, new, parts", [
    (".", "", "{}/train'|--data must contain train/ and test/"),
    ("train", "", "{}/train'|train/|test/"),
    ("test", "", "{}/test'|train/|test/"),
    ("train", "train", "'{}/train'|differ in their classes: a, b"),
    ("", "train/extra test/other", "extra|other|differ"),
    ("train/b test/b", "", "1 class folders|needs two"),
    ("test/b", "test/b", "{}/test/b'|no images"),
])  # fmt: skip
def test_a_folder_that_is_no_data_set_is_named_with_what_is_missing(
    gone, new, parts, refused, images
):
    for name in gone.split():
        shutil.rmtree(images / name)
    for name in new.split():
        (images / name).mkdir()
    refused([*FOLDER, images], *parts.format(images).split("|"))


@pytest.mark.parametrize("make", [
    lambda path: path.write_bytes(b"this is no picture\nat all"), os.mkfifo,
    lambda path: path.symlink_to("nothing"), lambda path: path.symlink_to(path.name),
], ids=["no picture", "fifo", "dangling link", "link to itself"])  # fmt: skip
def test_an_image_that_cannot_be_read_is_named(make, refused, images):
    make(images / "train" / "a" / "bad.png")
    refused([*FOLDER, images], images / "train" / "a" / "bad.png", "remove it", made=True)


@pytest.mark.parametrize("place", ["train", "train/a", "train/a/deeper"])
def test_a_folder_that_cannot_be_read_is_named_and_nothing_left_out(
    place, refused, images, monkeypatch
):
    save_image(images / place / "0.png", pixels(16, 16, 3))

    def refusing(find, path="."):  # root, who runs tests in containers, may read everything
        if os.fspath(path) == str(images / place):
            raise PermissionError(13, "Permission denied", str(images / place))
        return find(path)

    with monkeypatch.context() as patch:
        for find in (os.scandir, os.listdir):
            patch.setattr(os, find.__name__, functools.partial(refusing, find))
        refused([*FOLDER, images], images / place, "ermission denied", made=True)


# Checkpoints


def state(name, classes=10):
    return {"model": mhkd.build_model(name, classes).state_dict()}


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def flipped():
    content = bytearray(saved(state("resnet14")))
    content[len(content) // 2] ^= 1  # a bit of a tensor
    return content


def odd(change):
    content = state("resnet14")
    content["model"]["fc.weight"] = change(content["model"]["fc.weight"])
    return saved(content)


class Harm:
    def __reduce__(self):
        return (exec, ("open('harm', 'w')",))


@pytest.mark.parametrize("make, parts", [
    (lambda: None, "there is no checkpoint"),
    (lambda: saved(state("resnet14"))[:5000], "damaged"),
    (lambda: b"", "no checkpoint"),
    (lambda: b"not a checkpoint\nat all\n", "torch.save() has not written it"),
    (flipped, "damaged|checksum"),
    (lambda: saved({"epoch": 3, "distiller": {}}), "student.pt"),
    (lambda: saved(state("resnet20")), "another network|layer1.2.conv1.weight"),
    (lambda: saved({"model": torch.nn.Linear(3, 4).state_dict()}), "conv1.weight"),
    (lambda: saved(state("resnet14", 100)), "100|10|classes"),
    (lambda: saved({"model": {3: torch.zeros(3)}}), "no state dict"),
    (lambda: odd(lambda t: t.to("meta")), "no state dict"),
    (lambda: odd(lambda t: t.to_sparse()), "no state dict"),
    (lambda: odd(lambda t: t.to(torch.complex64)), "no state dict"),
    (lambda: odd(lambda t: "a word"), "no state dict"),
    (lambda: odd(lambda t: [t]), "no state dict"),
    (lambda: saved(state("resnet14") | {"mean": "abc", "std": [0.0], "classes": ["a"]}), "mean"),
    (lambda: saved(state("resnet14") | {"harm": Harm()}), "could run code"),
])  # fmt: skip
def test_a_checkpoint_that_is_no_network_of_that_kind_is_named_and_runs_no_code(
    make, parts, refused, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if content := make():
        (tmp_path / "given.pt").write_bytes(content)
    path = tmp_path / "given.pt"
    sentence = refused([*MHKD, "--teacher-weights", path], path, *parts.split("|"))
    assert "weights_only" not in sentence
    assert not (tmp_path / "harm").exists()


# Run folders


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    return half(tmp_path_factory.mktemp("stopped"), *ALONE)


@pytest.fixture
def interrupted(stopped, tmp_path):
    """A run folder with a checkpoint after the first of two epochs."""
    return next(shutil.copytree(stopped, tmp_path / "out").iterdir())


def rewrite(name, change):
    """Makes config.json a record of that name that another run would have written."""

    def harm(folder):
        content = read(folder / "config.json")
        change(content)
        (folder / "config.json").unlink()
        mhkd_runs.write_json(folder / name, content)

    return harm


def put(name, content):
    return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize("harm, parts", [
    (rewrite("config.json", lambda c: c["config"].update(momentum=0.123, lr=0.077)),
     "momentum was 0.123, is 0.9|lr was 0.077, is 0.05"),
    (rewrite("config.json", lambda c: c.update(data_sha256="0" * 64)), "another data: |overwrite"),
    (rewrite("result.json", lambda c: c["config"].update(lr=0.123)), "lr was 0.123"),
    (lambda folder: os.truncate(folder / "checkpoint.pt", 0), "checkpoint.pt|damaged|remove it"),
    (lambda folder: torch.save({"model": {}}, folder / "checkpoint.pt"), "checkpoint.pt|remove it"),
    *((put(name, content), f"{name}|is damaged") for name in ("config.json", "result.json")
      for content in ('{"a": 1}', "[]", "", "\x00", "[" * 100_000)),
])  # fmt: skip
def test_a_run_folder_of_another_run_or_a_damaged_one_is_named_and_left_alone(
    harm, parts, interrupted, refused
):
    harm(interrupted)
    assert "weight_decay" not in refused(ALONE, interrupted, *parts.split("|"))


# The same from outside, by a real process


@pytest.mark.parametrize("number, status, word", [
    (signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"),
])  # fmt: skip
def test_a_signal_ends_with_a_sentence_and_its_status(number, status, word, tmp_path):
    said = tmp_path / "said"
    process = start(*ALONE, "--epochs", "500", "--out", tmp_path, output=said)
    while process.is_alive() and not (said.exists() and " epoch 1/" in said.read_text()):
        time.sleep(0.01)
    os.kill(process.pid, number)
    assert end_of(process) == status
    (error,) = (line for line in said.read_text().splitlines() if line.startswith("mhkd.py: "))
    assert said.read_text().endswith(error + "\n") and word in error and "continues" in error


def test_a_signal_is_no_error_that_somebody_catches(monkeypatch, tmp_path):
    monkeypatch.setattr(zipfile, "is_zipfile", lambda path: os.kill(os.getpid(), signal.SIGTERM))
    torch.save(state("resnet14"), tmp_path / "a.pt")
    assert run(tmp_path, *MHKD, "--teacher-weights", tmp_path / "a.pt") == 143


@pytest.mark.parametrize("arguments", [ALONE, ["--version"]], ids=["a run", "--version"])
@pytest.mark.parametrize("taker", ["full disk", "closed pipe"])
def test_output_that_nobody_takes_ends_without_a_traceback(arguments, taker, tmp_path):
    reader, output = os.pipe()
    os.close(reader)
    with open("/dev/full" if taker == "full disk" else output, "w") as nobody:
        done = script(*arguments, "--out", tmp_path, stdout=nobody)
    assert done.returncode != 0 and done.stderr.count("\n") == 1, done.stderr
