"""Training from the command line: what a run leaves, what survives a kill, what is used again."""

import dataclasses
import datetime
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ALONE,
    MHKD,
    PAIR,
    ROOT,
    SCRIPT,
    end_of,
    environments,
    folder_of,
    fork,
    half,
    listing,
    log_of,
    outcome,
    python,
    read,
    run,
    script,
    start,
    weights_of,
)

import mhkd
import mhkd_record
import mhkd_runs

pytest.importorskip("sklearn")
FILES = {"config.json", "log.jsonl", "student.pt", "result.json"}
DIGITS = {"dataset": "digits", "subset": 200, "epochs": 1, "batch_size": 40}
RECORDED = [f.name for f in dataclasses.fields(mhkd.Config) if f.metadata.get("group") != "runtime"]
EPOCHS = 4
DISTIL = [*MHKD, "--epochs", EPOCHS]
KD = [*PAIR, "--epochs", EPOCHS, "--method", "kd"]
TEACHER = ["--student", "resnet14", "--method", "ce"]


def student_folder(out):
    return folder_of(out, "resnet14-resnet8", "mhkd")


def teacher_folders(out):
    return sorted(out.glob("*-ce-*"))


def outcomes(out):
    """Those of the teacher and of the student."""
    (teacher,) = teacher_folders(out)
    return outcome(teacher), outcome(student_folder(out))


def epochs_said(text, network):
    return [line for line in text.splitlines() if line.startswith(f"{network} epoch ")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A teacher and a student that nobody disturbed, made by the script: (--out, its output)."""
    out = tmp_path_factory.mktemp("finished")
    done = script(*DISTIL, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


# What a finished run leaves


def test_the_teacher_is_trained_first_and_each_run_leaves_its_four_files_alone(finished):
    out, done = finished
    (teacher,) = teacher_folders(out)
    assert {*out.iterdir()} == {teacher, student_folder(out)}
    for folder in out.iterdir():
        assert {path.name for path in folder.iterdir()} == FILES
    said = done.stdout.splitlines()
    assert "teacher resnet14" in said[0] and "its own run in" in said[0]
    assert any(str(teacher) in line for line in said)


def test_the_log_has_a_line_for_each_epoch_with_the_metrics_of_each_head(finished):
    log = log_of(student_folder(finished[0]))
    assert [entry["epoch"] for entry in log] == list(range(1, EPOCHS + 1))
    wanted = {"lr", "loss", "mhkd", "train_accuracy", "test_accuracy"}
    wanted |= {f"{term}_{unit}" for term in ("kl", "ce") for unit in range(4)}
    assert all(entry.keys() >= wanted for entry in log)


def test_output_that_is_no_terminal_has_one_line_for_each_epoch_and_the_training_learns(finished):
    for folder, network in zip(sorted(finished[0].iterdir()), ("resnet8 mhkd", "resnet14 ce")):
        assert len(epochs_said(finished[1].stdout, network)) == EPOCHS
        losses = [entry["loss"] for entry in log_of(folder)]
        assert losses == sorted(losses, reverse=True)
    assert finished[1].stderr == ""


def test_config_json_holds_every_value_used_the_environment_and_the_teachers_checksum(finished):
    record = read(student_folder(finished[0]) / "config.json")
    settings = DIGITS | {"epochs": EPOCHS, "options": {"head_width": 8}}
    config = mhkd.Config("resnet14", "resnet8", **settings)
    wanted = {name: getattr(config, name) for name in RECORDED} | {"processes": 1}
    assert record["config"] == json.loads(json.dumps(wanted))
    assert record["differs"] == dict(subset=200, epochs=4, batch_size=40, head_width=8)
    assert record["units"]["student"] == {"1": "layer1", "2": "layer2", "3": "layer3"}
    teacher = (teacher_folders(finished[0])[0] / "student.pt").read_bytes()
    assert record["teacher_sha256"] == hashlib.sha256(teacher).hexdigest()
    (here,) = record["environments"]
    assert (here["torch"], here["device"], here["threads"]) == (torch.__version__, "cpu", 1)
    git = ["git", "-C", ROOT, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert (here["commit"] or "").startswith(commit)


def test_the_commit_is_none_for_a_copy_in_another_repository_and_marked_where_csrc_changed(
    tmp_path, monkeypatch
):
    config = mhkd.Config(student="resnet8", method="ce")

    def commit(*added):
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", tmp_path]
        for command in (["init", "-q"], ["add", *added], ["commit", "-qm", "a"]) if added else ():
            subprocess.run([*git, *command], check=True)
        return mhkd_record.environment(config, torch.device("cpu"))["commit"]

    monkeypatch.setattr(mhkd, "__file__", str(shutil.copy(SCRIPT, tmp_path)))
    source = tmp_path / "csrc" / "a.cpp"
    source.parent.mkdir()
    source.write_text("int a;")
    assert commit("csrc") is None
    assert len(commit("mhkd.py")) == 40
    source.write_text("int b;")
    assert commit().endswith(" with changes")


def test_the_result_is_the_last_epoch_and_the_best_one_is_labelled(finished):
    for folder in finished[0].iterdir():
        result, log = read(folder / "result.json"), log_of(folder)
        best = max(log, key=lambda entry: entry["test_accuracy"])
        assert result["accuracy"] == log[-1]["test_accuracy"]
        assert result["best_test_epoch"] == best["epoch"]
        assert result["best_test_accuracy"] == best["test_accuracy"]


def test_the_saved_student_in_the_plain_network_gives_the_reported_accuracies(finished):
    folder = student_folder(finished[0])
    data = mhkd.load_data(mhkd.Config(student="resnet8", method="ce", **DIGITS))
    student = mhkd.build_model("resnet8", 10).eval()
    student.load_state_dict(weights_of(folder))  # strictly: no heads are left
    labels, result = data.labels[data.test], read(folder / "result.json")
    with torch.no_grad():
        order = student(data.center_crop(data.test)).argsort(dim=1, descending=True)
    correct = order[:, 0] == labels
    of_class = {name: 100 * correct[labels == i].double().mean().item() for i, name in
                enumerate(data.classes)}  # fmt: skip
    top5 = (order[:, :5] == labels[:, None]).any(dim=1)
    assert result["accuracy"] == pytest.approx(100 * correct.double().mean().item())
    assert result["top5_accuracy"] == pytest.approx(100 * top5.double().mean().item())
    assert result["class_accuracy"] == pytest.approx(of_class)
    assert result["mean_class_accuracy"] == pytest.approx(sum(of_class.values()) / 10)


def test_a_finished_run_is_not_repeated_and_its_files_stay_untouched(finished, capsys):
    before = listing(finished[0])
    assert run(finished[0], *DISTIL) == 0
    assert listing(finished[0]) == before
    said = capsys.readouterr().out
    assert " epoch " not in said and "trained" not in said
    assert said.count("already finished") == 2


def test_the_best_epoch_is_chosen_on_held_out_images_where_there_are_some(tmp_path, monkeypatch):
    accuracies, evaluate = iter((90.0, 10.0, 30.0, 20.0, 20.0, 10.0)), mhkd.evaluate

    def told(model, data, part=None):  # test and validation, epoch after epoch; then the result
        found = evaluate(model, data, part)
        return found | {"accuracy": next(accuracies, found["accuracy"])}

    monkeypatch.setattr(mhkd, "evaluate", told)
    assert run(tmp_path, *ALONE, "--epochs", "3", "--val-fraction", "0.2") == 0
    result = read(folder_of(tmp_path) / "result.json")
    assert [entry["val_accuracy"] for entry in log_of(folder_of(tmp_path))] == [10.0, 20.0, 10.0]
    assert (result["best_val_epoch"], result["best_val_accuracy"]) == (2, 20.0)
    assert result["test_accuracy_at_best_val_epoch"] == 30.0 and result["best_test_epoch"] == 1


def test_on_a_terminal_a_bar_shows_rate_and_time_left(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(tmp_path, *ALONE) == 0
    said = capsys.readouterr()
    assert all(part in said.err for part in ("images/s", "%|", "00:00<"))
    assert len(epochs_said(said.out, "resnet8 ce")) == 2


def test_ce_trains_the_network_alone_and_says_that_a_teacher_has_no_effect(tmp_path, capsys):
    before = torch.get_rng_state()
    assert run(tmp_path, *ALONE, "--epochs", "1", "--teacher", "resnet14") == 0
    assert [*tmp_path.iterdir()] == [folder_of(tmp_path, method="ce")]
    assert "resnet14" not in folder_of(tmp_path).name
    assert "no effect" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), before)  # that of the caller


def test_in_bfloat16_the_record_says_so_and_the_student_is_saved_in_float32(tmp_path):
    assert run(tmp_path, *MHKD, "--epochs", "1", "--precision", "bfloat16") == 0
    for folder in tmp_path.iterdir():
        assert read(folder / "result.json")["differs"]["precision"] == "bfloat16"
        dtypes = {tensor.dtype for tensor in weights_of(folder).values()}
        assert dtypes == {torch.float32, torch.int64}


def test_pytorchs_switch_for_tf32_is_set_in_a_run_and_put_back(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with mhkd.runtime(mhkd.Config(student="vgg8", method="ce", precision="float32")):
        assert torch.backends.cudnn.allow_tf32 is False
    assert torch.backends.cudnn.allow_tf32 is True


def test_tensorboard_shows_the_log_once_also_after_an_interruption(tmp_path):
    accumulators = "tensorboard.backend.event_processing.event_accumulator"
    EventAccumulator = pytest.importorskip(accumulators).EventAccumulator
    options = [*ALONE, "--epochs", "3", "--tensorboard"]
    assert run(half(tmp_path, *options), *options) == 0
    folder = folder_of(tmp_path)
    events, log = EventAccumulator(str(folder)).Reload(), log_of(folder)
    for name in ("loss", "lr", "train_accuracy", "test_accuracy"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(entry["epoch"], pytest.approx(entry[name])) for entry in log]


# Interruption


def test_a_run_killed_again_and_again_ends_as_the_undisturbed_one_and_leaves_no_half_file(
    finished, tmp_path
):
    for die in (("fsync", 4), ("replace", 4), ("replace", 3), ("fsync", 12)):  # while it writes
        assert end_of(start(*DISTIL, "--out", tmp_path, die=die)) == -signal.SIGKILL, die
    process = start(*DISTIL, "--out", tmp_path)
    time.sleep(random.uniform(0, 2))
    process.kill()
    end_of(process)
    assert run(tmp_path, *DISTIL) == 0
    assert outcomes(tmp_path) == outcomes(finished[0])
    for folder in tmp_path.iterdir():
        assert {path.name for path in folder.iterdir()} == FILES


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("unexpected pos")])
def test_a_full_disk_keeps_the_previous_checkpoint_and_the_run_goes_on_from_it(
    error, tmp_path, capsys
):
    folder = folder_of(half(tmp_path, *ALONE, error=error))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "checkpoint.pt" in said
    assert {path.name for path in folder.iterdir()} == {"config.json", "log.jsonl", "checkpoint.pt"}
    assert run(tmp_path, *ALONE) == 0
    assert "continues after epoch 1" in capsys.readouterr().out
    assert run(tmp_path / "undisturbed", *ALONE) == 0
    assert outcome(folder) == outcome(folder_of(tmp_path / "undisturbed"))


def test_a_run_goes_on_in_a_folder_that_was_moved_and_notes_it(tmp_path, capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    half(here, *ALONE).rename(there)
    capsys.readouterr()
    assert run(there, *ALONE) == 0
    shown = capsys.readouterr().out
    assert f"{here} -> {there}" in shown and "after epoch 1" in shown
    environments = read(folder_of(there) / "result.json")["environments"]
    assert [surroundings["out"] for surroundings in environments] == [str(here), str(there)]


def test_a_loss_that_is_not_finite_stops_the_run_with_epoch_and_step_and_keeps_the_last_checkpoint(
    tmp_path, monkeypatch, failing
):
    assert "not finite in epoch 1, step " in failing(tmp_path / "high", *ALONE, "--lr", "1e30")
    steps, forward = [], mhkd.CrossEntropy.final_terms

    def poisoned(self, *arguments):
        steps.append(1)
        factor = float("nan") if len(steps) == 8 else 1
        return {name: term * factor for name, term in forward(self, *arguments).items()}

    monkeypatch.setattr(mhkd.CrossEntropy, "final_terms", poisoned)
    assert "epoch 2, step 3" in failing(tmp_path, *ALONE)  # 200 images, 40 a step
    state = torch.load(folder_of(tmp_path) / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in state["distiller"].values())
    assert not (folder_of(tmp_path) / "student.pt").exists()


# Teachers that were trained here


def test_a_half_trained_teacher_is_taken_up_again_not_taken_as_finished(finished, tmp_path, capsys):
    out = half(tmp_path, *KD, *TEACHER)
    assert not (folder_of(out, "resnet14") / "result.json").exists()
    capsys.readouterr()
    assert run(out, *KD) == 0
    assert len(epochs_said(capsys.readouterr().out, "resnet14 ce")) == EPOCHS - 1
    assert outcome(teacher_folders(out)[0]) == outcomes(finished[0])[0]


def test_a_student_that_was_changed_or_is_missing_is_trained_again_and_kept(
    finished, tmp_path, capsys
):
    shutil.copytree(
        student_folder(finished[0]), mine := tmp_path / student_folder(finished[0]).name
    )
    for teacher in teacher_folders(finished[0]):
        shutil.copytree(teacher, tmp_path / teacher.name)
    (mine / "student.pt").write_bytes(b"of the user")
    for said in ("has changed and will be renamed", "is missing"):
        assert run(tmp_path, *DISTIL) == 0
        assert f"student.pt' {said}: the run is repeated" in capsys.readouterr().out
        assert outcome(mine) == outcome(student_folder(finished[0]))
        assert (mine / "student-changed-1.pt").read_bytes() == b"of the user"
        (mine / "student.pt").unlink()


def test_a_finished_run_of_another_normalisation_is_not_taken(tmp_path, monkeypatch, failing):
    assert run(tmp_path, *ALONE) == 0
    mhkd_data = mhkd.sibling("mhkd_data")
    other = dataclasses.replace(mhkd_data.DATASETS["digits"], statistics=((0.5,) * 3, (0.2,) * 3))
    monkeypatch.setitem(mhkd_data.DATASETS, "digits", other)
    assert "mean, std was [[" in failing(tmp_path, *ALONE)


@pytest.mark.parametrize("damage", ["student.pt is truncated", "result.json is missing"])
def test_a_teacher_that_is_not_whole_is_made_whole_first(damage, finished, tmp_path):
    (teacher,) = teacher_folders(finished[0])
    mine = shutil.copytree(teacher, tmp_path / teacher.name)
    if "truncated" in damage:
        (mine / "student.pt").write_bytes((mine / "student.pt").read_bytes()[:-100])
    else:
        (mine / "result.json").unlink()
    assert run(tmp_path, *KD) == 0
    assert outcome(mine) == outcome(teacher)
    assert read(mine / "result.json")["accuracy"] == read(teacher / "result.json")["accuracy"]


BRIEF = [*PAIR, "--subset", "80", "--epochs", "1"]


@pytest.fixture(scope="module")
def brief_teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("brief")
    assert run(out, *BRIEF, *TEACHER) == 0
    return folder_of(out, "resnet14", "ce")


@pytest.mark.parametrize("options, teachers", [
    *(["--method kd " + other, 2] for other in (
        "--epochs 2", "--teacher-lr 0.01", "--teacher-epochs 2", "--lr-steps 0", "--subset 90",
        "--batch-size 20",
        "--image-size 20", "--teacher-seed 1", "--weight-decay 0", "--momentum 0.5",
        "--crop-padding 1", "--lr-decay 0.5", "--val-fraction 0.2", "--precision float32",
    )),
    *([other, 1] for other in (
        "--method kd", "--lr 0.01", "--seed 3", "--student wrn_16_1", "--tau 2 --beta 1 --units 2",
    )),
])  # fmt: skip
def test_a_finished_teacher_is_used_again_by_students_of_the_same_data_and_recipe_alone(
    options, teachers, brief_teacher, tmp_path
):
    shutil.copytree(brief_teacher, tmp_path / brief_teacher.name)
    before = listing(tmp_path / brief_teacher.name)
    assert run(tmp_path, *BRIEF, *options.split()) == 0
    assert len(teacher_folders(tmp_path)) == teachers
    assert listing(tmp_path / brief_teacher.name) == before


def test_two_runs_that_want_the_same_teacher_at_once_train_it_once(tmp_path):
    texts = [tmp_path / f"output{seed}" for seed in "12"]
    both = [start(*KD, "--out", tmp_path, "--seed", t.name[-1], output=t) for t in texts]
    assert [end_of(process) for process in both] == [0, 0]
    said = [text.read_text() for text in texts]
    assert sorted(len(epochs_said(text, "resnet14 ce")) for text in said) == [0, EPOCHS]
    assert sum("waiting for it" in text for text in said) == 1
    assert len(teacher_folders(tmp_path)) == 1
    results = [read(path) for path in tmp_path.glob("*-kd-*/result.json")]
    assert len(results) == 2 and len({result["teacher_sha256"] for result in results}) == 1


def test_a_student_of_the_same_teacher_from_a_file_is_the_same_student_named_by_its_checksum(
    finished, tmp_path
):
    weights = teacher_folders(finished[0])[0] / "student.pt"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert run(tmp_path, *DISTIL, "--teacher-weights", weights) == 0
    assert teacher_folders(tmp_path) == []
    assert digest[:8] in student_folder(tmp_path).name
    assert read(student_folder(tmp_path) / "result.json")["teacher_sha256"] == digest
    assert outcome(student_folder(tmp_path)) == outcomes(finished[0])[1]


# Methods are compared fairly


def test_initial_weights_batches_and_augmentation_depend_on_seed_and_neither_method_nor_teacher(
    finished, tmp_path, monkeypatch
):
    forward, seen = mhkd.Distiller.forward, []

    def spy(self, images, labels, indices):
        initial = self.student.model.state_dict().values() if not seen else ()
        seen.append([tensor.numpy().tobytes() for tensor in (*initial, images, labels)])
        return forward(self, images, labels, indices)

    def steps_of(*arguments):
        """The bits of the student's initial weights and of the steps' images and labels."""
        seen.clear()
        out = tmp_path / str(len([*tmp_path.iterdir()]))
        assert run(out, *ALONE, "--epochs", "1", "--method", *arguments) == 0
        return [*seen]

    monkeypatch.setattr(mhkd.Distiller, "forward", spy)
    torch.save(mhkd.build_model("vgg8", 10).state_dict(), tmp_path / "vgg8.pt")
    teachers = {"resnet14": teacher_folders(finished[0])[0] / "student.pt"}
    teachers["vgg8"] = tmp_path / "vgg8.pt"
    wanted, other = steps_of("ce"), steps_of("ce", "--seed", "1")
    assert len(wanted) == 5
    assert wanted[0][0] != other[0][0] and wanted[1] != other[1]
    for teacher, method in ("resnet14", "kd"), ("resnet14", "crd+mhkd"), ("vgg8", "mhkd"):
        given = ["--teacher", teacher, "--teacher-weights", teachers[teacher]]
        small = [] if method == "kd" else ["--head-width", "8"]
        assert steps_of(method, *given, *small) == wanted


# Several processes


def test_two_processes_of_torchrun_killed_and_started_again_train_one_and_the_same_student(
    tmp_path,
):
    options = [*MHKD, "--method", "crd+mhkd", "--beta", "0", "--negatives", "50", "--ema", "0.9"]
    options += ["--out", tmp_path / "killed"]
    for die in (("replace", 5), ("replace", 8)):  # the teacher's epochs, the student's
        one, other = environments(2)
        first, second = (
            start(*options, die=die, environment=one),
            start(*options, environment=other),
        )
        assert end_of(first) == -signal.SIGKILL
        second.kill()
        end_of(second)
    both = [start(*options, environment=environment) for environment in environments(2)]
    assert [end_of(process) for process in both] == [0, 0]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    done = python(*torchrun, *options[:-1], tmp_path / "torchrun")
    assert done.returncode == 0, done.stderr
    assert len(epochs_said(done.stdout, "resnet8 crd+mhkd")) == 2
    (killed,) = tmp_path.glob("killed/*crd+mhkd*processes=2*")
    (wanted,) = tmp_path.glob("torchrun/*crd+mhkd*processes=2*")
    assert read(wanted / "result.json")["config"]["processes"] == 2
    assert outcome(killed) == outcome(wanted)


RANDOM_NETWORK = """
import os, random
import numpy, torch
from torch import nn

class Net(nn.Module):
    def __init__(self, K):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(48, 48) for _ in range(3))
        self.fc = nn.Linear(48, K)
        for block in self.blocks:
            block.weight.data = torch.tensor(numpy.random.randn(48, 48) / 7).float()
        self.fc.bias.data.fill_(DRAW)

    def forward(self, x):
        x = x[:, :, ::4, ::4].flatten(1)
        i = int(torch.randint(2, ())) if self.training else 0
        return self.fc(torch.relu(self.blocks[i](x)))
"""


def _weights(environment, options, folder):
    """A run as one of two processes, which saves its parameters at the end."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    finish = mhkd_record.finish

    def spy(run, config, data, distiller, *rest):
        parameters = {n: (p, p.grad is None) for n, p in distiller.named_parameters()}
        torch.save(parameters, folder / f"weights{environment['RANK']}.pt")
        return finish(run, config, data, distiller, *rest)

    mhkd_record.finish = spy
    raise SystemExit(mhkd.main([*map(str, options)]))


def test_all_processes_train_one_network_that_draws_from_numpy_and_leaves_out_layers(tmp_path):
    """Each of two equal layers has a gradient only in the processes that used it."""
    (tmp_path / "net.py").write_text(RANDOM_NETWORK.replace("DRAW", "random.random()"))
    options = [*ALONE, "--student", f"{tmp_path / 'net.py'}:Net", "--out", tmp_path / "out"]
    processes = [fork(_weights, e, options, tmp_path) for e in environments(2)]
    assert [end_of(process) for process in processes] == [0, 0]
    one, other = (torch.load(tmp_path / f"weights{i}.pt", weights_only=False) for i in range(2))
    assert all(torch.equal(one[name][0], other[name][0]) for name in one)
    unused = {name.partition("blocks.2.")[2] for name in one if one[name][1]}
    assert {"weight", "bias"} <= unused  # a layer that no process uses keeps no gradient


def test_processes_with_different_initial_weights_are_an_error(tmp_path):
    (tmp_path / "net.py").write_text(
        RANDOM_NETWORK.replace("DRAW", "os.urandom(1)[0] + os.getpid()")
    )
    options = [*ALONE, "--student", f"{tmp_path / 'net.py'}:Net", "--out", tmp_path / "out"]
    said = [tmp_path / f"{i}.txt" for i in range(2)]
    both = [start(*options, output=o, environment=e) for o, e in zip(said, environments(2))]
    assert [end_of(process) for process in both] == [1, 1]
    assert "start with different weights or epochs" in said[0].read_text()


def _impatient(environment, options):
    """A run as one of two processes that PyTorch lets wait for each other for 5 seconds only.

    Its first step takes 8 seconds.
    """
    os.environ.update(environment)
    join, limit = torch.distributed.init_process_group, datetime.timedelta(seconds=5)
    torch.distributed.init_process_group = functools.partial(join, timeout=limit)
    forward, sleep = mhkd.Distiller.forward, iter([8])

    def slow(*arguments):
        time.sleep(next(sleep, 0))
        return forward(*arguments)

    mhkd.Distiller.forward = slow
    raise SystemExit(mhkd.main(options))


def test_processes_wait_for_another_run_longer_than_pytorch_lets_them_wait_for_each_other(tmp_path):
    options = [*ALONE, "--epochs", "1", "--out"]
    processes = [start(*options, tmp_path / "one", environment=e) for e in environments(2)]
    assert [end_of(process) for process in processes] == [0, 0]
    folder = tmp_path / "two" / folder_of(tmp_path / "one").name
    with mhkd_runs.locked(folder, "for 12 seconds"):
        arguments = [*options, str(tmp_path / "two")]
        two_runs = [*environments(2), *environments(2)]
        processes = [fork(_impatient, environment, arguments) for environment in two_runs]
        for _ in range(12):
            time.sleep(1)
            assert all(process.is_alive() for process in processes)
        assert not listing(folder)
    # Now both runs want the folder at once, and one of them waits until the other has trained.
    assert [end_of(process) for process in processes] == [0, 0, 0, 0]
    assert outcome(folder) == outcome(folder_of(tmp_path / "one"))


def _spied(environment, folder):
    """A run of one epoch as one of two processes, which saves what each step saw and drew."""
    os.environ.update(environment)
    forward, seen = mhkd.Distiller.forward, []

    def spy(self, images, labels, indices):
        seen.append((images, labels, indices, torch.get_rng_state()))
        return forward(self, images, labels, indices)

    mhkd.Distiller.forward = spy
    assert mhkd.main([*ALONE, "--epochs", "1", "--out", str(folder)]) == 0
    torch.save(seen, folder / f"seen{environment['RANK']}.pt")


def test_each_of_two_processes_has_its_share_of_every_batch_and_draws_of_its_own(tmp_path):
    processes = [fork(_spied, environment, tmp_path) for environment in environments(2)]
    assert [end_of(process) for process in processes] == [0, 0]
    config = mhkd.Config(student="resnet8", method="ce", **DIGITS)
    whole = mhkd.epoch_batches(mhkd.load_data(config), config, 1)
    seen = zip(*(torch.load(tmp_path / f"seen{i}.pt") for i in range(2)), strict=True)
    for (images, labels, indices), both in zip(whole, seen, strict=True):
        assert [len(part[2]) for part in both] == [20, 20]
        assert not torch.equal(both[0][3], both[1][3])  # dropout masks, CRD's draws
        found = (torch.cat([part[i] for part in both]) for i in range(3))
        order = torch.cat([part[2] for part in both]).argsort()
        for a, b in zip(found, (images, labels, indices)):
            assert torch.equal(a[order], b[indices.argsort()])


def _biases(environment, folder):
    """A run of lsh as one of some processes, which saves the biases that it measures."""
    import mhkd_baselines

    os.environ.update(environment)
    prepare = mhkd_baselines.FeatureMimicking.prepare

    def spy(self, of_teacher):
        prepare(self, of_teacher)
        torch.save(self.bias, folder / f"bias{environment['RANK']}.pt")

    mhkd_baselines.FeatureMimicking.prepare = spy
    options = [*PAIR, "--method", "lsh", "--epochs", "1", "--out", str(folder / "out")]
    assert mhkd.main(options) == 0


def test_lsh_measures_its_biases_over_the_images_of_all_processes(tmp_path):
    processes = [fork(_biases, environment, tmp_path) for environment in environments(2)]
    assert [end_of(process) for process in processes] == [0, 0]
    one, other = (torch.load(tmp_path / f"bias{i}.pt") for i in range(2))
    assert torch.equal(one, other) and one.isfinite().all() and one.std() > 0


def test_world_size_alone_makes_no_run_one_of_several_processes_and_train_returns_its_result(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = mhkd.Config(student="resnet8", method="ce", out=str(tmp_path), device="cpu", **DIGITS)
    result = mhkd.train(config)
    assert result == read(folder_of(tmp_path) / "result.json")
    assert result["config"]["processes"] == 1 and "processes" not in result["name"]


# Recipes and names


@pytest.mark.parametrize("values, wanted", [
    ({"dataset": "cifar100"}, (240, 64, 0.05, (150, 180, 210), 0.5, 32, True)),
    (dict(student="mobilenetv2", dataset="svhn"), (150, 200, 0.001, (80, 110, 135), 5.0, 32, True)),
    ({"student": "mobilenetv2"}, (240, 64, 0.01, (150, 180, 210), 0.5, 32, True)),
    ({"student": "shufflenetv2"}, (240, 64, 0.01, (150, 180, 210), 0.5, 32, True)),
    ({"dataset": "digits"}, (30, 64, 0.05, (19, 23, 26), 0.5, 16, False)),
    ({"epochs": 24}, (24, 64, 0.05, (15, 18, 21), 0.5, 32, True)),
    ({"epochs": 24, "lr_steps": (20,)}, (24, 64, 0.05, (20,), 0.5, 32, True)),
    ({"dataset": "svhn", "epochs": 30}, (30, 200, 0.001, (16, 22, 27), 5.0, 32, True)),
    ({"options": {"beta": 0.0}, "flip": False}, (240, 64, 0.05, (150, 180, 210), 0.0, 32, False)),
], ids=str)  # fmt: skip
def test_defaults_are_the_papers_recipes_with_milestones_that_scale(values, wanted):
    c = mhkd.Config(**({"teacher": "resnet32x4", "student": "vgg8"} | values))
    assert (c.epochs, c.batch_size, c.lr, c.lr_steps) == wanted[:4]
    assert (c.options["beta"], c.image_size, c.flip) == wanted[4:]
    assert (c.options["tau"], c.options["alpha"], c.momentum, c.weight_decay) == (4, 0.9, 0.9, 5e-4)
    heads = (64, 2) if c.dataset == "digits" else (256, 1)
    assert (c.options["head_width"], c.options["head_stride"]) == heads


def test_a_recipe_of_ones_own_holds_for_all_networks_and_not_for_another_optimizer(monkeypatch):
    recipe = {"weight_decay": 1e-4, "momentum": 0.8, "lr": 0.2}
    monkeypatch.setitem(mhkd.DATASETS, "mine", mhkd.DataSet(lambda config: None, recipe))
    for student in ("resnet8", "shufflenetv2"):  # the latter usually has a lower rate
        c = mhkd.Config(student=student, method="ce", dataset="mine")
        assert {name: getattr(c, name) for name in recipe} == recipe and not c.differs
    c = mhkd.Config(student="resnet8", method="ce", dataset="mine", optimizer="adamw")
    assert (c.lr, c.weight_decay, c.momentum) == (0.001, 0.05, None)


def test_a_changed_configuration_is_filled_anew_from_the_recipe():
    config = mhkd.Config("resnet32x4", "vgg8", lr_decay=0.2).replace(student="mobilenetv2")
    assert (config.lr, config.lr_decay) == (0.01, 0.2)
    assert config.replace(dataset="svhn", epochs=30).lr_steps == (16, 22, 27)
    teacher = config.of_teacher()
    assert (teacher.student, teacher.teacher, teacher.method) == ("resnet32x4", None, "ce")
    assert (teacher.lr, teacher.lr_decay) == (0.05, 0.2)


def test_the_rate_falls_after_the_milestone_epochs(tmp_path):
    assert run(tmp_path, *ALONE, "--epochs", "4", "--lr", "0.02", "--lr-steps", "1,3") == 0
    rates = [entry["lr"] for entry in log_of(folder_of(tmp_path))]
    assert rates == pytest.approx([0.02, 0.002, 0.002, 0.0002])


UNITS = ("a", "b")
OTHER = {"teacher": "vgg13", "student": "vgg11", "method": "kd", "dataset": "cifar10"}
OTHER |= {"teacher_init": "file:a.pt", "student_init": "file:a.pt", "precision": "bfloat16"}
OTHER |= {"teacher_units": UNITS[::-1], "student_units": UNITS[::-1], "subset": 100}
OTHER |= {
    "teacher_heads": "logits",
    "val_fraction": 0.1,
    "lsh_samples": "all",
    "dhkd_head": "linear",
}
OTHER |= {"augment": "trivial", "optimizer": "adamw", "schedule": "cosine", "warmup": 1.0}
OTHER |= {"clip_grad": 1.0, "ema": 0.9, "view_seed": 1}


def changed(config, names):
    """For each of these fields or options another value."""
    values = {**vars(config), **config.options}
    for name in names:
        value = values[name]
        new = value[:-1] if isinstance(value, tuple) else not value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            new = value + 1 if isinstance(value, int) else value / 2
        yield {name: OTHER.get(name, new)}


def name_of(sha256="0" * 64, **values):
    data = mhkd.Data(*[torch.zeros(0, dtype=torch.int64)] * 5, [], 32, (), (), "f" * 64)
    if "student_units" in values or "teacher_units" in values:  # both sides need as many
        values = {"student_units": UNITS, "teacher_units": UNITS} | values
    config = mhkd.Config(**({"teacher": "resnet32x4", "student": "vgg8"} | values))
    return mhkd_record.record_of(config, data, {"teacher_sha256": sha256}, {})["name"]


def test_every_value_that_differs_gives_another_run_name():
    names = [name_of(), name_of(student_units=UNITS), name_of(method="crd+mhkd")]
    config = mhkd.Config("resnet32x4", "vgg8")
    apart = ("options", "mean", "std", "test_fraction", "keep", "teacher_store", "crop_scale")
    fields = [name for name in RECORDED if name not in apart]
    names += [name_of(val_fraction=0.3, keep=epoch) for epoch in ("last", "best")]
    names += [name_of(image_size=64, crop_scale=scale) for scale in (0.08, 0.3)]
    stored = ("float32", "float16")
    names += [name_of(method="kd", teacher_store=dtype) for dtype in stored]
    names += [name_of(mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))]
    names += [name_of(dataset="folder", test_fraction=fraction) for fraction in (None, 0.2, 0.3)]
    names += [name_of(**values) for values in changed(config, fields)]
    for method in ("mhkd", "fitnet", "cc", "rkd", "crd", "lsh", "dhkd"):
        usual = config.replace(method=method)
        names += [name_of(method=method)] if method != "mhkd" else []
        others = {*usual.options} - {"teacher_heads_epochs"}
        names += [name_of(method=method, options=o) for o in changed(usual, sorted(others))]
    heads = {"teacher_heads": "pretrained"}
    names += [name_of(options=heads), name_of(options=heads | {"teacher_heads_epochs": 7})]
    names += [name_of(teacher_weights="t.pt", sha256=digit * 64) for digit in "12"]
    assert len({*names}) == len(names) > 50


def test_a_run_name_tells_who_and_what_is_not_the_default():
    name = name_of(seed=3, options={"tau": 2.0})
    assert name == "cifar100-resnet32x4-vgg8-mhkd-seed3-tau=2.0"
    same = {"epochs": 240, "lr": 0.05, "lr_steps": (150, 180, 210), "options": {"beta": 0.5}}
    assert name_of(**same) == name_of()


def test_long_run_names_are_cut_so_that_a_file_system_takes_them_and_still_differ():
    units = ("layer" * 30, "block" * 30)
    long = [name_of(student_units=units, lr=lr) for lr in (0.1234, 0.4321)]
    assert all(150 < len(name.encode()) <= 255 for name in long)
    assert long[0] != long[1]


# Other ways to use it


def test_import_prints_nothing_and_needs_torch_alone_even_copied_elsewhere(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    code = (
        "import sys, torch; before = set(sys.modules); import mhkd;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "assert new - sys.stdlib_module_names == {'mhkd'}, new"
    )
    done = python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_version_is_shown_with_that_of_pytorch(capsys):
    assert mhkd.main(["--version"]) == 0
    shown = capsys.readouterr().out
    assert mhkd.__version__ in shown and torch.__version__ in shown
