"""Bad input ends with one clear sentence on stderr and a non-zero exit; no traceback, nothing overwritten."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import SCRIPT, TINY, listing, script

import mhkd

pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")
ALONE = ["--student", "resnet8", "--method", "ce", *TINY]
MHKD = ["--teacher", "resnet14", "--student", "resnet8", *TINY]


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs the command line on what makes no sense: asserts how it ends, and gives the sentence."""

    def check(*arguments):
        out = tmp_path / "out"
        before = contents(tmp_path)
        capsys.readouterr()
        assert mhkd.main([*map(str, arguments), "--out", str(out)]) not in (0, None)
        error = capsys.readouterr().err
        assert error.endswith("\n")
        assert error.count("\n") == 1, error
        assert "Traceback" not in error
        after = contents(tmp_path)
        assert {path: after.get(path) for path in before} == before  # nothing overwritten, nothing gone
        check.made = sorted(set(after) - set(before))
        return error

    return check


def contents(folder):
    return {path: entry and entry[0] for path, entry in listing(folder).items()}


def assert_says(sentence, *parts):
    assert all(part in sentence for part in parts), sentence


# Names


@pytest.mark.parametrize("option", ["--teacher", "--student"])
def test_an_unknown_network_is_named_with_the_near_ones(option, refused):
    assert_says(refused(*MHKD, option, "resnet32x5"), "'resnet32x5'", "resnet32x4")
    assert refused.made == []


def test_an_unknown_data_set_is_named_with_the_near_ones(refused):
    assert_says(refused(*ALONE, "--dataset", "cifar101"), "'cifar101'", "cifar100")
    assert refused.made == []


def test_an_unknown_method_is_named_with_those_that_exist(refused):
    assert_says(refused(*MHKD, "--method", "quux"), "'quux'", "ce", "kd", "mhkd")
    assert refused.made == []


@pytest.mark.parametrize("arguments, part", [
    (["--teacher", "resnet14", *TINY], "--student"),
    (["--student", "resnet8", *TINY], "--teacher"),
    ([*ALONE, "--epoch", "3"], "--epoch"),
    ([*ALONE, "stray"], "stray"),
    ([*ALONE, "--epochs", "many"], "many"),
    ([*ALONE, "--lr"], "--lr"),
])  # fmt: skip
def test_a_command_line_that_cannot_be_understood_names_the_option(arguments, part, refused):
    assert_says(refused(*arguments), part)


# Data


def make_folder(root, classes=(("a", "b"), ("a", "b")), parts=("train", "test")):
    for part, names in zip(parts, classes):
        (root / part).mkdir(parents=True)
        for name in names:
            (root / part / name).mkdir()
            for i in range(4):
                array = np.random.RandomState(i).randint(0, 256, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(array).save(root / part / name / f"{i}.png")
    return root


def folder_arguments(root):
    options = ["--dataset", "folder", "--data", root, "--image-size", "16", "--batch-size", "4", "--epochs", "1"]
    return ["--student", "resnet8", "--method", "ce", *options, "--device", "cpu"]


def test_a_good_folder_of_images_is_not_refused(tmp_path):
    root = make_folder(tmp_path / "images")
    assert mhkd.main([*map(str, folder_arguments(root)), "--out", str(tmp_path / "out")]) == 0


def test_a_missing_data_folder_is_named(refused, tmp_path):
    assert_says(refused(*folder_arguments(tmp_path / "nowhere")), str(tmp_path / "nowhere"), "--data", "train")


@pytest.mark.parametrize("missing", ["train", "test"])
def test_a_data_folder_without_one_of_its_parts_names_it(missing, refused, tmp_path):
    root = make_folder(tmp_path / "images")
    shutil.rmtree(root / missing)
    assert_says(refused(*folder_arguments(root)), str(root / missing), "train/", "test/", "val/")


def test_a_data_folder_without_classes_is_named(refused, tmp_path):
    root = make_folder(tmp_path / "images", classes=((), ()))
    assert_says(refused(*folder_arguments(root)), str(root / "train"), "no classes", "one folder of images")


def test_unequal_class_sets_are_named(refused, tmp_path):
    root = make_folder(tmp_path / "images", classes=(("a", "b", "extra"), ("a", "b", "other")), parts=("train", "val"))
    assert_says(refused(*folder_arguments(root)), "extra", "other", "differ")


def test_a_class_without_images_is_named(refused, tmp_path):
    root = make_folder(tmp_path / "images")
    for path in (root / "test" / "b").iterdir():
        path.unlink()
    assert_says(refused(*folder_arguments(root)), str(root / "test" / "b"), "no images")


def test_an_image_that_cannot_be_decoded_is_named(refused, tmp_path):
    root = make_folder(tmp_path / "images")
    (root / "train" / "a" / "broken.png").write_bytes(b"this is no picture\nat all")
    assert_says(refused(*folder_arguments(root)), "broken.png", "remove")


def test_a_batch_larger_than_the_data_is_refused_with_both_sizes(refused):
    assert_says(refused(*ALONE, "--subset", "30", "--batch-size", "31"), "31", "30", "--batch-size")
    assert refused.made == []


# Hyperparameters


@pytest.mark.parametrize("option, value", [
    ("--tau", "0"), ("--tau", "-1"), ("--tau", "nan"), ("--tau", "inf"), ("--alpha", "nan"), ("--alpha", "1.5"),
    ("--alpha", "-0.1"), ("--beta", "nan"), ("--beta", "-1"), ("--beta", "inf"), ("--batch-size", "0"),
    ("--batch-size", "1"), ("--batch-size", "-4"), ("--epochs", "0"), ("--lr", "0"), ("--lr", "nan"), ("--lr", "inf"),
    ("--lr-steps", "3,2"), ("--lr-steps", "-1"), ("--lr-decay", "0"), ("--momentum", "1"), ("--momentum", "nan"),
    ("--weight-decay", "-1"), ("--weight-decay", "nan"), ("--head-width", "0"), ("--head-stride", "0"),
    ("--crop-padding", "-1"), ("--image-size", "15"), ("--subset", "0"), ("--seed", "-1"), ("--teacher-seed", "-1"),
    ("--units", "4"), ("--units", "0"), ("--units", "1,1"), ("--units", ""), ("--backend", "quick"),
])  # fmt: skip
def test_a_hyperparameter_that_makes_no_sense_is_named_with_its_value(option, value, refused):
    assert_says(refused(*MHKD, option, value), option, value)
    assert refused.made == []


def test_the_fused_backend_is_refused_where_it_is_not_installed(refused):
    if mhkd.loss_backend().startswith("fused"):
        pytest.skip("it is installed")
    assert_says(refused(*MHKD, "--epochs", "1", "--subset", "80", "--backend", "fused"), "fused", "not installed")


@pytest.mark.parametrize("device", ["tpu9", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device, refused):
    assert_says(refused(*ALONE, "--device", device), "--device", device)
    assert refused.made == []


# Units


@pytest.mark.parametrize("role, units", [("teacher", "layer1,layer9"), ("student", "layer1,layer9")])
def test_a_unit_that_does_not_exist_is_named_with_those_that_do(role, units, refused):
    other = {"teacher": "--student-units", "student": "--teacher-units"}[role]
    sentence = refused(*MHKD, f"--{role}-units", units, other, "layer1,layer2")
    assert_says(sentence, "'layer9'", "layer1", "layer2", "layer3")


def test_a_unit_that_does_not_exist_is_refused_before_anything_is_trained(refused):
    refused(*MHKD, "--teacher-units", "layer1", "--student-units", "layer9")
    assert refused.made == []


def test_a_unit_that_gives_no_feature_is_named(refused):
    assert_says(refused(*MHKD, "--teacher-units", "layer1", "--student-units", "fc"), "'fc'")


def test_lists_of_units_that_differ_in_length_are_refused(refused):
    sentence = refused(*MHKD, "--teacher-units", "layer1,layer2", "--student-units", "layer1")
    assert_says(sentence, "--teacher-units", "--student-units")


# Checkpoints


@pytest.fixture
def with_weights(refused, tmp_path):
    def check(content):
        path = tmp_path / "given.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        sentence = refused(*MHKD, "--teacher-weights", path)
        assert_says(sentence, str(path))
        assert refused.made == []
        return sentence

    return check


def state(name, classes=10):
    return {"model": mhkd.build_model(name, classes).state_dict()}


def test_a_missing_checkpoint_is_named(with_weights):
    assert_says(with_weights(None), "there is no")


def test_a_truncated_checkpoint_is_named(with_weights, tmp_path):
    torch.save(state("resnet14"), tmp_path / "whole.pt")
    assert_says(with_weights((tmp_path / "whole.pt").read_bytes()[:5000]), "truncated")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint\nat all\n", b"\x80\x02}q\x00."])
def test_a_file_that_is_no_checkpoint_is_named(content, with_weights):
    with_weights(content)


def test_a_checkpoint_of_another_network_says_which(with_weights):
    assert_says(with_weights(state("resnet20")), "resnet20")


def test_a_checkpoint_of_a_network_of_nobody_knows_names_an_entry(with_weights):
    assert_says(with_weights({"model": torch.nn.Linear(3, 4).state_dict()}), "conv1.weight")


def test_a_checkpoint_of_another_number_of_classes_says_both_numbers(with_weights):
    assert_says(with_weights(state("resnet14", 100)), "100", "10", "classes")


def test_a_checkpoint_that_wants_to_run_code_is_refused(with_weights, tmp_path):
    class Harm:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'harm')!r}, 'w')",))

    with_weights(state("resnet14") | {"harm": Harm()})
    assert not (tmp_path / "harm").exists()


# Run folders


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A run folder with a checkpoint after the first of two epochs."""
    with monkeypatch.context() as patch:
        forward, steps = mhkd.CrossEntropy.final_terms, []

        def stop(self, *arguments):
            steps.append(1)
            if len(steps) == 6:
                raise KeyboardInterrupt
            return forward(self, *arguments)

        patch.setattr(mhkd.CrossEntropy, "final_terms", stop)
        assert mhkd.main([*ALONE, "--out", str(tmp_path / "out")]) == 130
    (folder,) = (tmp_path / "out").glob("digits*")
    return folder


def test_a_run_folder_of_another_configuration_says_which_values_differ(interrupted, refused):
    config = json.loads((interrupted / "config.json").read_text())
    config["config"] |= {"momentum": 0.123, "lr": 0.077}
    (interrupted / "config.json").write_text(json.dumps(config))
    sentence = refused(*ALONE)
    assert_says(sentence, str(interrupted), "momentum", "0.123", "0.9", "lr", "0.077", "0.05")
    assert "weight_decay" not in sentence


def test_a_run_folder_of_other_data_is_refused(interrupted, refused):
    config = json.loads((interrupted / "config.json").read_text())
    config["data_sha256"] = "0" * 64
    (interrupted / "config.json").write_text(json.dumps(config))
    assert_says(refused(*ALONE), str(interrupted), "data")


@pytest.mark.parametrize("keep", [0, 0.3, 0.9])
def test_a_truncated_checkpoint_in_a_run_folder_is_named(keep, interrupted, refused):
    checkpoint = interrupted / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(keep * len(whole))])
    assert_says(refused(*ALONE), "checkpoint.pt", "move")


def test_a_checkpoint_of_another_run_in_a_run_folder_is_refused(interrupted, refused):
    torch.save({"model": {}}, interrupted / "checkpoint.pt")
    assert_says(refused(*ALONE), "checkpoint.pt")


def test_a_damaged_config_json_is_named(interrupted, refused):
    (interrupted / "config.json").write_text('{"config": ')
    assert_says(refused(*ALONE), "config.json")


def test_out_that_is_a_file_is_named(refused, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert_says(refused(*ALONE), str(tmp_path / "out"))


def test_a_report_of_a_folder_without_runs_is_refused(refused, tmp_path):
    assert_says(refused("--report", tmp_path / "none"), str(tmp_path / "none"))
    assert refused.made == []


# The same from outside, by a real process


def test_the_script_exits_with_an_error_status_and_one_line(tmp_path):
    done = script(*ALONE, "--student", "resnet9", "--out", tmp_path)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "resnet8" in done.stderr


def test_an_interrupt_from_the_keyboard_ends_without_a_traceback(tmp_path):
    command = [sys.executable, str(SCRIPT), *ALONE, "--epochs", "200", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    for line in process.stdout:
        if " epoch 1/" in line:
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.count("\n") == 1
    assert "Traceback" not in error
