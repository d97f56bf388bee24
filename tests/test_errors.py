"""Bad input ends with one clear sentence on stderr and a non-zero exit; nothing is overwritten."""

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ALONE, HEADS, PAIR, SCRIPT, TINY, listing, no_access, script

import mhkd

pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")
MHKD = [*PAIR, *TINY, *HEADS]


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs what makes no sense: asserts how it ends, and gives the sentence."""

    def check(*arguments):
        before = contents(tmp_path)
        capsys.readouterr()
        assert mhkd.main([*map(str, arguments), "--out", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert error.startswith("mhkd.py: ") and error.endswith("\n")
        assert error.count("\n") == 1, error
        assert len(error) < 700
        after = contents(tmp_path)
        assert {p: after.get(p) for p in before} == before  # nothing overwritten, nothing gone
        check.made = sorted(set(after) - set(before))
        return error

    return check


def contents(folder):
    return {path: entry and entry[0] for path, entry in listing(folder).items()}


def assert_says(sentence, *parts):
    assert all(part in sentence for part in parts), sentence


# Names and the command line


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


@pytest.mark.parametrize("arguments, parts", [
    (["--teacher", "resnet14", *TINY], ["--student"]),
    (["--student", "resnet8", *TINY], ["--teacher"]),
    ([*ALONE, "--epoch", "3"], ["--epoch:", "did you mean --epochs"]),
    ([*ALONE, "stray"], ["stray"]),
    ([*ALONE, "--epochs", "many"], ["--epochs", "many"]),
    ([*ALONE, "--lr"], ["--lr"]),
    ([*ALONE, "--tau", "2"], ["--tau is an option of --method", "kd", "mhkd", "not of ce"]),
    ([*ALONE, "--negatives", "2"], ["--negatives is an option of --method crd, not of ce"]),
    ([*MHKD, "--nagatives", "2"], ["there is no option --nagatives"]),
], ids=lambda value: str(value[-1]))  # fmt: skip
def test_a_command_line_that_cannot_be_understood_names_the_option(arguments, parts, refused):
    assert_says(refused(*arguments), *parts)
    assert refused.made == []


@pytest.mark.parametrize("option, value", [
    ("--tau", "0"), ("--tau", "-1"), ("--tau", "nan"), ("--tau", "inf"), ("--tau", "1e300"),
    ("--alpha", "nan"), ("--alpha", "1.5"), ("--alpha", "-0.1"), ("--beta", "nan"),
    ("--beta", "-1"), ("--beta", "inf"), ("--batch-size", "0"), ("--batch-size", "1"),
    ("--batch-size", "-4"), ("--epochs", "0"), ("--epochs", "99999999999"), ("--lr", "0"),
    ("--lr", "nan"), ("--lr", "inf"), ("--lr", "1e300"), ("--lr-steps", "3,2"),
    ("--lr-steps", "-1"), ("--lr-decay", "0"), ("--momentum", "1"), ("--momentum", "nan"),
    ("--weight-decay", "-1"), ("--weight-decay", "nan"), ("--weight-decay", "1e300"),
    ("--head-width", "0"), ("--head-width", "99999999999"), ("--head-stride", "0"),
    ("--crop-padding", "-1"), ("--crop-scale", "0"), ("--image-size", "15"),
    ("--image-size", "100000"), ("--subset", "0"), ("--val-fraction", "1"), ("--seed", "-1"),
    ("--seed", "9" * 30), ("--teacher-seed", "-1"), ("--units", "4"), ("--units", "0"),
    ("--units", "1,1"), ("--units", ""), ("--backend", "quick"), ("--precision", "half"),
    ("--teacher-weights", ""), ("--student-init", "imagenet"),
])  # fmt: skip
def test_a_value_that_makes_no_sense_is_named_with_what_it_must_be(option, value, refused):
    sentence = refused(*MHKD, option, value)
    if option == "--units" and value == "4":
        assert_says(sentence, "has no unit 4")
    else:
        words, _, shown = sentence.removesuffix("\n").rpartition(", not ")
        assert f"{option} must be " in words
        assert shown == value or float(shown) == float(value)
    assert refused.made == []


def test_the_sentence_for_a_seed_that_is_too_large_says_so(refused):
    assert_says(refused(*ALONE, "--seed", 2**62), "between 0 and 2^62")


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named(device, refused):
    assert_says(refused(*ALONE, "--device", device), "--device", device)
    assert refused.made == []


def test_a_precision_that_the_device_has_not_is_refused(refused):
    assert_says(refused(*ALONE, "--precision", "tf32"), "--precision tf32 is for CUDA", "cpu")
    assert refused.made == []


def test_the_fused_backend_is_refused_where_it_is_not_installed(refused, monkeypatch):
    monkeypatch.setattr(mhkd, "loss_backend", lambda: "reference (fused kernel not installed)")
    assert_says(refused(*MHKD, "--backend", "fused"), "--backend fused", "not installed")
    assert refused.made == []


def test_what_asks_for_more_memory_than_there_is_says_how_much(refused):
    sentence = refused(*MHKD, "--head-width", "2000000000")
    assert_says(sentence, "not enough memory", "1152000000000 bytes")


def test_a_batch_larger_than_the_data_is_refused_with_both_sizes(refused):
    sentence = refused(*ALONE, "--subset", "30", "--batch-size", "31")
    assert_says(sentence, "31", "30", "--batch-size")
    assert refused.made == []


@pytest.mark.parametrize("role, units", [("teacher", "layer1,layer9"), ("student", "layer9,fc")])
def test_a_unit_that_does_not_exist_is_named_with_those_that_do(role, units, refused):
    other = {"teacher": "--student-units", "student": "--teacher-units"}[role]
    sentence = refused(*MHKD, f"--{role}-units", units, other, "layer1,layer2")
    assert_says(sentence, "'layer9'", "layer1", "layer2", "layer3")
    assert refused.made == []  # before a teacher is trained for hours


def test_a_unit_that_gives_no_feature_is_named_before_anything_is_trained(refused):
    assert_says(refused(*MHKD, "--teacher-units", "layer1", "--student-units", "fc"), "'fc'")
    assert refused.made == []


def test_lists_of_units_that_differ_in_length_are_refused(refused):
    sentence = refused(*MHKD, "--teacher-units", "layer1,layer2", "--student-units", "layer1")
    assert_says(sentence, "--teacher-units", "--student-units")


# A folder of images


def make_folder(root, classes=(("a", "b"), ("a", "b")), parts=("train", "test")):
    for part, names in zip(parts, classes):
        (root / part).mkdir(parents=True)
        for name in names:
            (root / part / name).mkdir()
            for i in range(4):
                array = np.random.RandomState(i).randint(0, 256, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(array).save(root / part / name / f"{i}.png")
    return root


def of_folder(root):
    options = ["--dataset", "folder", "--data", root, "--image-size", "16", "--batch-size", "4"]
    return ["--student", "resnet8", "--method", "ce", *options, "--epochs", "1", "--device", "cpu"]


@pytest.fixture
def images(tmp_path):
    return make_folder(tmp_path / "images")


def test_a_good_folder_of_images_is_not_refused(images, tmp_path):
    assert mhkd.main([*map(str, of_folder(images)), "--out", str(tmp_path / "out")]) == 0


def test_a_missing_data_folder_is_named(refused, tmp_path):
    nowhere = tmp_path / "nowhere"
    assert_says(refused(*of_folder(nowhere)), str(nowhere), "--data", "train")


@pytest.mark.parametrize("missing", ["train", "test"])
def test_a_data_folder_without_one_of_its_parts_names_it(missing, refused, images):
    shutil.rmtree(images / missing)
    assert_says(refused(*of_folder(images)), str(images / missing), "train/", "test/")


@pytest.mark.parametrize("classes, parts", [
    (((), ()), ["'{}/train'", "0 class folders", "needs two"]),
    ((("a", "b", "extra"), ("a", "b", "other")), ["extra", "other", "differ"]),
    ((("a",), ("a",)), ["1 class folders", "needs two"]),
])  # fmt: skip
def test_folders_that_make_no_classes_are_named(classes, parts, refused, tmp_path):
    root = make_folder(tmp_path / "images", classes=classes)
    assert_says(refused(*of_folder(root)), *(part.format(root) for part in parts))


def test_a_class_without_images_is_named(refused, images):
    for path in (images / "test" / "b").iterdir():
        path.unlink()
    assert_says(refused(*of_folder(images)), str(images / "test" / "b"), "no images")


def broken(path):
    path.write_bytes(b"this is no picture\nat all")


@pytest.mark.parametrize("make", [
    broken, lambda path: path.symlink_to("nothing"), lambda path: path.symlink_to(path.name),
    lambda path: os.mkfifo(path),
], ids=["no picture", "dangling link", "link to itself", "fifo"])  # fmt: skip
def test_an_image_that_cannot_be_read_is_named(make, refused, images):
    make(images / "train" / "a" / "bad.png")
    sentence = refused(*of_folder(images))
    assert_says(sentence, str(images / "train" / "a" / "bad.png"), "remove it")


@pytest.mark.parametrize("place", ["train", "train/a", "train/a/deeper"])
def test_a_folder_that_cannot_be_read_is_named_and_nothing_left_out(
    place, refused, images, monkeypatch
):
    (images / place).mkdir(exist_ok=True)
    shutil.copy(images / "test" / "a" / "0.png", images / place)
    with no_access(monkeypatch, images / place):
        assert_says(refused(*of_folder(images)), str(images / place), "ermission denied")


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
        assert "weights_only" not in sentence
        return sentence

    return check


def state(name, classes=10):
    return {"model": mhkd.build_model(name, classes).state_dict()}


def test_a_missing_checkpoint_is_named(with_weights):
    assert_says(with_weights(None), "there is no checkpoint")


def test_a_truncated_checkpoint_is_named(with_weights, tmp_path):
    torch.save(state("resnet14"), tmp_path / "whole.pt")
    assert_says(with_weights((tmp_path / "whole.pt").read_bytes()[:5000]), "damaged")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint\nat all\n", b"\x80\x02}q\x00."])
def test_a_file_that_is_no_checkpoint_is_named(content, with_weights):
    with_weights(content)


def test_a_flipped_bit_in_the_weights_is_seen(with_weights, tmp_path):
    torch.save(state("resnet14"), tmp_path / "whole.pt")
    content = bytearray((tmp_path / "whole.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "whole.pt") as file:  # in the middle of the largest tensor
        largest = max(file.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 1
    assert_says(with_weights(bytes(content)), "damaged", "checksum")


def test_the_state_of_a_run_is_told_from_its_student(with_weights):
    assert_says(with_weights({"epoch": 3, "distiller": {}}), "student.pt")


def test_a_checkpoint_of_another_network_says_which(with_weights):
    assert_says(with_weights(state("resnet20")), "resnet20")


def test_a_checkpoint_of_a_network_of_nobody_knows_names_an_entry(with_weights):
    assert_says(with_weights({"model": torch.nn.Linear(3, 4).state_dict()}), "conv1.weight")


def test_a_checkpoint_of_another_number_of_classes_says_both_numbers(with_weights):
    assert_says(with_weights(state("resnet14", 100)), "100", "10", "classes")


@pytest.mark.parametrize("change", [
    lambda t: t.to("meta"), lambda t: t.to_sparse(), lambda t: t.to(torch.complex64),
    lambda t: "a word", lambda t: [t],
], ids=["meta", "sparse", "complex", "no tensor", "list"])  # fmt: skip
def test_a_checkpoint_of_odd_tensors_is_refused(change, with_weights):
    content = state("resnet14")
    content["model"]["fc.weight"] = change(content["model"]["fc.weight"])
    assert_says(with_weights(content), "no state dict")


def test_a_checkpoint_with_odd_names_or_an_odd_normalisation_is_refused(with_weights):
    with_weights({"model": {3: torch.zeros(3)}})
    odd = {"mean": "abc", "std": [0.0], "classes": ["a"], "name": "resnet14", "image_size": 16}
    assert_says(with_weights(state("resnet14") | odd), "mean")


def test_a_checkpoint_that_wants_to_run_code_is_refused_in_one_sentence(with_weights, tmp_path):
    class Harm:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'harm')!r}, 'w')",))

    assert_says(with_weights(state("resnet14") | {"harm": Harm()}), "could run code")
    assert not (tmp_path / "harm").exists()


# Run folders


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A run folder with a checkpoint after the first of two epochs."""
    forward, steps = mhkd.CrossEntropy.final_terms, []

    def stop(self, *arguments):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(mhkd.CrossEntropy, "final_terms", stop)
        assert mhkd.main([*ALONE, "--out", str(tmp_path / "out")]) == 130
    (folder,) = (tmp_path / "out").glob("digits*")
    return folder


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    mhkd.write_json(path, content)


def test_a_run_folder_of_another_configuration_says_which_values_differ(interrupted, refused):
    other = {"momentum": 0.123, "lr": 0.077}
    rewrite(interrupted / "config.json", lambda content: content["config"].update(other))
    sentence = refused(*ALONE)
    assert_says(sentence, str(interrupted), "momentum 0.123 there, 0.9 now", "lr 0.077 there, 0.05")
    assert "weight_decay" not in sentence


def test_a_run_folder_of_other_data_is_refused(interrupted, refused):
    rewrite(interrupted / "config.json", lambda content: content.update(data_sha256="0" * 64))
    assert_says(refused(*ALONE), str(interrupted), "data_sha256")


def test_a_finished_run_of_another_configuration_is_refused_though_its_config_json_is_gone(
    interrupted, refused
):
    shutil.copy(interrupted / "config.json", interrupted / "result.json")
    (interrupted / "config.json").unlink()
    rewrite(interrupted / "result.json", lambda content: content["config"].update(lr=0.123))
    assert_says(refused(*ALONE), "lr 0.123 there")


@pytest.mark.parametrize("content", ['{"a": 1}', "[1]", "[]", "{", "", "\x00", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_damaged_record_is_named_and_left_alone(name, content, interrupted, refused):
    (interrupted / name).write_text(content)
    assert_says(refused(*ALONE), name, "is damaged")


def test_a_record_edited_by_hand_is_not_believed(interrupted, refused):
    path = interrupted / "config.json"
    path.write_text(path.read_text().replace('"teacher_accuracy": null', '"teacher_accuracy": 99'))
    assert_says(refused(*ALONE), str(path), "its checksum is not that of its content")


@pytest.mark.parametrize("keep", [0, 0.3, 0.9])
def test_a_truncated_checkpoint_in_a_run_folder_is_named(keep, interrupted, refused):
    checkpoint = interrupted / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(keep * len(whole))])
    assert_says(refused(*ALONE), str(checkpoint), "damaged", "remove it")


def test_a_checkpoint_of_another_run_in_a_run_folder_is_refused(interrupted, refused):
    torch.save({"model": {}}, interrupted / "checkpoint.pt")
    assert_says(refused(*ALONE), "checkpoint.pt", "remove it")


def test_out_that_is_a_file_is_named(refused, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert_says(refused(*ALONE), str(tmp_path / "out"))


# The same from outside, by a real process


def test_the_script_exits_with_an_error_status_and_one_line(tmp_path):
    done = script(*ALONE, "--student", "resnet9", "--out", tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "resnet8" in done.stderr


@pytest.mark.parametrize("number, status, word", [
    (signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"),
])  # fmt: skip
def test_a_signal_ends_with_a_sentence_and_its_status(number, status, word, tmp_path):
    command = [sys.executable, str(SCRIPT), *ALONE, "--epochs", "200", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as in the foreground
    )  # fmt: skip
    for line in process.stdout:
        if " epoch 1/" in line:
            break
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert error.count("\n") == 1 and word in error and "goes on" in error


def test_a_signal_is_no_error_that_somebody_catches(monkeypatch, with_weights, tmp_path, capsys):
    monkeypatch.setattr(zipfile, "is_zipfile", lambda path: os.kill(os.getpid(), signal.SIGTERM))
    torch.save(state("resnet14"), tmp_path / "a.pt")
    options = [*MHKD, "--teacher-weights", str(tmp_path / "a.pt"), "--out", str(tmp_path)]
    assert mhkd.main(options) == 143


@pytest.mark.parametrize("arguments", [ALONE, ["--version"]], ids=lambda a: a[0])
def test_output_that_nobody_takes_ends_without_a_traceback(arguments, tmp_path):
    with open("/dev/full", "w") as full:
        done = script(*arguments, "--out", tmp_path, stdout=full)
    assert done.returncode != 0 and done.stderr.count("\n") == 1, done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = script(*arguments, "--out", tmp_path, stdout=writer)
    os.close(writer)
    assert done.returncode != 0 and done.stderr.count("\n") == 1, done.stderr
