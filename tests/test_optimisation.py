"""Optimizer, schedule, clipping, averaged weights, and which epoch's student is kept."""

import math
import re

import pytest
import torch
from conftest import ALONE, MHKD, PAIR, folder_of, half, log_of, outcome, read, run, weights_of
from torch.optim.optimizer import register_optimizer_step_pre_hook

import mhkd

pytest.importorskip("sklearn")
VAL = ["--val-fraction", "0.2"]


def rates_of(tmp_path, *options):
    """The learning rate of each step of a run, and the norm of its gradient."""
    rates, norms = [], []

    def watch(optimizer, *_):
        (group,) = optimizer.param_groups
        gradients = [p.grad.flatten() for p in group["params"] if p.grad is not None]
        rates.append(group["lr"])
        norms.append(torch.cat(gradients).norm().item())

    handle = register_optimizer_step_pre_hook(watch)
    try:
        assert run(tmp_path, *ALONE, *options) == 0
    finally:
        handle.remove()
    return rates, norms


def test_the_cosine_is_that_of_pytorch_step_by_step(tmp_path):
    rates, _ = rates_of(tmp_path, "--schedule", "cosine", "--epochs", "3")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15)
    wanted = []
    for _ in range(15):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(wanted)


def test_the_warmup_rises_linearly_also_over_a_fraction_of_an_epoch(tmp_path):
    rates, _ = rates_of(tmp_path / "a", "--warmup", "0.6", "--lr-steps", "1")
    assert rates == pytest.approx([0.05 / 3, 0.1 / 3, 0.05, 0.05, 0.05] + 5 * [0.005])
    options = ["--warmup", "1.2", "--optimizer", "adamw", "--schedule", "cosine"]
    rates, _ = rates_of(tmp_path / "b", *options)
    cosine = [0.001 * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)]
    assert rates == pytest.approx([min(1, (i + 1) / 6) * cosine[i] for i in range(10)])
    assert log_of(folder_of(tmp_path / "b"))[-1]["lr"] == pytest.approx(rates[-1])


def test_adamw_is_that_of_pytorch_with_its_own_defaults(tmp_path, monkeypatch):
    made = []
    adamw = torch.optim.AdamW

    def make(*args, **keywords):
        made.append(adamw(*args, **keywords))
        return made[-1]

    monkeypatch.setattr(torch.optim, "AdamW", make)
    assert run(tmp_path, *ALONE, "--optimizer", "adamw") == 0
    (group,) = made[0].param_groups
    assert (group["lr"], group["weight_decay"]) == (0.0001, 0.05)  # after the milestones
    config = read(folder_of(tmp_path) / "result.json")["config"]
    assert (config["lr"], config["weight_decay"], config["momentum"]) == (0.001, 0.05, None)
    accuracies = [entry["train_accuracy"] for entry in log_of(folder_of(tmp_path))]
    assert accuracies[-1] > accuracies[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_gradient_of_another_memory_layout_gives_the_same_step(optimizer):
    """As DHKD's, or as the state of a run that is continued on another device."""
    config = mhkd.Config(student="resnet8", method="ce", optimizer=optimizer)
    values, gradient = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = torch.nn.Parameter(values.clone(memory_format=torch.channels_last))
        p.grad = gradient.clone(memory_format=layout)
        step = mhkd.make_optimizer(config, [p])
        for _ in range(3):
            step.step()
        found.append(p.detach())
    assert torch.equal(*found) and not torch.equal(found[0], values)


class Masked(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.linear = torch.nn.Linear(3, num_classes)
        self.register_buffer("mask", torch.full((num_classes,), -math.inf).where(
            torch.arange(num_classes) == 3, 0.0))  # fmt: skip

    def forward(self, x):
        return self.linear(x.mean(dim=(2, 3))) * self.mask.exp()


def test_an_average_that_is_not_a_number_is_an_error(tmp_path, failing):
    alone = ["--student", f"{__file__}:Masked", *ALONE[2:]]
    assert run(tmp_path / "last", *alone) == 0
    said = failing(tmp_path / "average", *alone, "--ema", "0.9")
    assert "returns NaN" in said and "leave out --ema" in said


def test_the_gradient_of_all_trained_parameters_is_clipped(tmp_path, monkeypatch):
    _, free = rates_of(tmp_path / "free")
    _, norms = rates_of(tmp_path / "clipped", "--clip-grad", "0.1")
    assert min(free) > 0.1 and max(norms) == pytest.approx(0.1, rel=1e-3)


def test_the_average_of_weights_and_buffers_is_tested_and_saved(tmp_path, monkeypatch):
    states = []
    update = mhkd.AveragedModel.update_parameters

    def watch(self, model):
        states.append({n: t.clone() for n, t in model.state_dict().items()})
        return update(self, model)

    monkeypatch.setattr(mhkd.AveragedModel, "update_parameters", watch)
    assert run(tmp_path, *ALONE, "--ema", "0.7") == 0
    average, *others = states
    for state in others:
        average = {n: 0.7 * average[n] + 0.3 * state[n] for n in state}
    saved = weights_of(folder_of(tmp_path))
    assert len(states) == 10
    for name in saved:
        if saved[name].is_floating_point():
            assert torch.allclose(saved[name], average[name], atol=1e-6), name
    entry, result = log_of(folder_of(tmp_path))[-1], read(folder_of(tmp_path) / "result.json")
    assert entry["test_accuracy"] == result["accuracy"]


def test_integer_buffers_are_not_averaged():
    module = torch.nn.BatchNorm1d(1)
    module.register_buffer("index", torch.arange(1000))
    average = mhkd.AveragedModel(module, multi_avg_fn=mhkd.moving_average(0.9995), use_buffers=True)
    for _ in range(20):
        average.update_parameters(module)
    assert torch.equal(average.module.index, torch.arange(1000))


def test_the_student_of_the_best_validation_epoch_is_kept(tmp_path, capsys):
    options = [*ALONE, *VAL, "--epochs", "12", "--lr-steps", "12"]
    assert run(tmp_path, *options, "--keep", "best") == 0
    folder, log = folder_of(tmp_path), log_of(folder_of(tmp_path))
    val = [entry["val_accuracy"] for entry in log]
    said = re.findall(r"train .* %  val (\S+) %  test ", capsys.readouterr().out)
    assert said == [f"{accuracy:.2f}" for accuracy in val]
    result = read(folder / "result.json")
    epoch = result["kept_epoch"]
    assert epoch == 1 + val.index(max(val)) < 12  # of another epoch than the last one
    assert result["accuracy"] == log[epoch - 1]["test_accuracy"]
    assert "highest validation accuracy" in result["accuracy_is"]
    net = mhkd.build_model("resnet8", 10)
    net.load_state_dict(weights_of(folder))
    settings = {"dataset": "digits", "subset": 200, "val_fraction": 0.2, "batch_size": 40}
    data = mhkd.load_data(mhkd.Config(student="resnet8", method="ce", **settings))
    assert mhkd.evaluate(net, data, data.val)["accuracy"] == max(val)


ADAMW = ["--optimizer", "adamw", "--schedule", "cosine", "--warmup", "0.5", "--clip-grad", "1"]


@pytest.mark.parametrize(
    "options", [["--ema", "0.9"], [*VAL, "--keep", "best", "--ema", "0.9"], ADAMW], ids=str
)
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, options):
    options = [*ALONE, "--epochs", "3", *options]
    half(tmp_path / "half", *options)
    assert run(tmp_path / "half", *options) == 0
    assert run(tmp_path / "whole", *options) == 0
    assert outcome(folder_of(tmp_path / "half")) == outcome(folder_of(tmp_path / "whole"))


def test_lsh_saves_a_plain_student_also_of_an_average(tmp_path):
    options = [*PAIR, "--method", "lsh", "--ema", "0.5", *VAL, "--keep", "best"]
    assert run(tmp_path, *options, "--student", "resnet8x4") == 0
    folder = folder_of(tmp_path, "resnet8x4", "lsh")
    result = read(folder / "result.json")
    assert result["accuracy"] == log_of(folder)[result["kept_epoch"] - 1]["test_accuracy"]


def test_the_teacher_gets_the_same_options_and_pretrained_heads_a_warmup_in_proportion():
    options = {"optimizer": "adamw", "schedule": "cosine", "warmup": 3.0, "ema": 0.9, "epochs": 30}
    config = mhkd.Config("resnet14", "resnet8", **options, options={"teacher_heads": "pretrained"})
    teacher = config.replace(teacher_epochs=10).of_teacher()
    assert (teacher.optimizer, teacher.schedule, teacher.ema) == ("adamw", "cosine", 0.9)
    assert (teacher.epochs, teacher.warmup, teacher.lr) == (10, 1.0, 0.001)
    heads = config.of_heads("teacher.pt")
    assert (heads.epochs, heads.warmup, heads.ema, heads.keep) == (10, 1.0, None, "last")
    assert config.replace(teacher_lr=1e-5).of_heads("teacher.pt").lr == 0.001  # the recipe's


@pytest.mark.parametrize(
    "epochs, steps", [(6, (4, 5, 6)), (2, (1, 2, 3)), (3, (2, 3, 4)), (60, (38, 45, 52))]
)
def test_milestones_that_would_coincide_are_an_epoch_apart(epochs, steps):
    assert mhkd.Config(student="resnet8", method="ce", epochs=epochs).lr_steps == steps


@pytest.mark.parametrize(
    "options, wanted",
    [
        (["--keep", "best"], "--val-fraction"),
        (["--ema", "1"], "--ema must be above 0 and below 1, not 1.0"),
        (["--warmup", "3"], "--warmup 3 is longer than the 2 epochs"),
        (["--optimizer", "adamw", "--momentum", "0.9"], "--momentum is an option of --optimizer"),
        (["--schedule", "cosine", "--lr-steps", "1"], "--schedule steps"),
        (["--optimizer", "adam"], "one of sgd, adamw"),
        (["--crop-scale", "0.5"], "--crop-scale has no effect with --image-size 16"),
        (["--image-size", "64", "--crop-padding", "3"], "--crop-padding has no effect with"),
        (["--clip-grad", "0"], "--clip-grad must be a number above 0"),
        (["--method", "heads", "--teacher", "resnet8", "--ema", "0.9"], "heads trains no student"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, failing, options, wanted):
    assert wanted in failing(tmp_path, *ALONE, *options)


def test_the_defaults_are_the_papers_and_change_no_bit(tmp_path):
    assert run(tmp_path / "a", *MHKD) == 0
    options = ["--optimizer", "sgd", "--schedule", "steps", "--warmup", "0", "--momentum", "0.9"]
    assert run(tmp_path / "b", *MHKD, *options, "--weight-decay", "0.0005") == 0
    a, b = (folder_of(tmp_path / name, method="mhkd") for name in "ab")
    assert a.name == b.name and outcome(a) == outcome(b)
