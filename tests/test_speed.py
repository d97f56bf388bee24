"""What makes a step faster leaves its results as they are."""

import json

import pytest
import torch
from conftest import TINY
from torch import nn

import mhkd


def with_random_statistics(model):
    """In eval mode, in float64, every batch norm unlike the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_()
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 2)
    return model.double().eval()


def assert_equal_but_for_rounding(a, b):
    assert a.shape == b.shape and (a - b).abs().max() <= 1e-12 * b.abs().max()


def batch_norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", mhkd.MODELS)
def test_a_folded_network_gives_the_same_logits_and_unit_features(name):
    torch.manual_seed(0)
    model, x = with_random_statistics(mhkd.build_model(name, 10)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folded = mhkd.folded(model, mhkd.UNITS[name], torch.zeros(1, 3, 32, 32))
    ours, theirs = (
        mhkd.Tapped(network, mhkd.UNITS[name], 10, True, penultimate=True)(x) for network in (folded, model)
    )
    for a, b in ((ours.logits, theirs.logits), (ours.penultimate, theirs.penultimate)):
        assert_equal_but_for_rounding(a, b)
    for unit in mhkd.UNITS[name]:
        assert_equal_but_for_rounding(ours.features[unit], theirs.features[unit])
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    # Wide resnets put the batch norm before the convolution: only the second of each block follows one.
    left = {"wrn_16_1": 7, "wrn_16_2": 6, "wrn_40_1": 19, "wrn_40_2": 18}
    assert batch_norms(folded) == left.get(name, 0)


def test_a_convolution_whose_output_is_used_elsewhere_or_is_a_unit_is_left_alone():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.conv3, self.bn3 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.fc = nn.Linear(4, 10)

        def forward(self, x):
            x = self.conv1(x)
            x = x + self.bn1(x)  # the convolution's own output goes on, too
            return self.fc(self.bn3(self.conv3(self.bn2(self.conv2(x)))).mean(dim=(2, 3)))

    torch.manual_seed(0)
    model, x = with_random_statistics(Forked()), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for units, left in (((), {"bn1"}), (("conv2",), {"bn1", "bn2"})):
        folded = mhkd.folded(model, units, torch.zeros(1, 3, 8, 8))
        assert {name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)} == left
        torch.testing.assert_close(folded(x), model(x))


def test_a_network_whose_graph_misleads_is_left_as_it_is():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.fc = nn.Linear(3, 10)

        def forward(self, x):
            return self.fc(self.bn2(self.conv(self.bn1(self.conv(x)))).mean(dim=(2, 3)))

    torch.manual_seed(0)
    model, x = with_random_statistics(Twice()), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(mhkd.folded(model, (), torch.zeros(1, 3, 8, 8))(x), model(x))


@pytest.mark.parametrize("teacher, student", [("wrn_40_1", "resnet8"), ("resnet8x4", "shufflenetv2")])
def test_the_teacher_of_a_run_gives_what_the_network_alone_gives(teacher, student):
    torch.manual_seed(0)
    network, config = with_random_statistics(mhkd.build_model(teacher, 10)), mhkd.Config(teacher, student)
    images = torch.zeros(8, 32, 32, 3, dtype=torch.uint8)
    labels = torch.arange(8) % 10
    data = mhkd.Data(images, labels, images, labels, [""] * 10, (0.5,) * 3, (0.25,) * 3, "")
    distiller = mhkd.build_distiller(mhkd.resolve(config), network, data).double().train()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    assert_equal_but_for_rounding(distiller.teacher(x).logits, network(x))
    assert not any(p.requires_grad for p in distiller.teacher.parameters())


# torch.compile


@pytest.fixture
def long_run(monkeypatch):
    """A configuration, its data, and how long its steps take with and without compilation."""
    images, labels = torch.zeros(64, 16, 16, 3, dtype=torch.uint8), torch.arange(64) % 10
    data = mhkd.Data(images, labels, images, labels, [""] * 10, (0.5,) * 3, (0.25,) * 3, "")
    settings = {"dataset": "digits", "epochs": 240, "batch_size": 8}  # 1,920 steps

    def choose(eager, compiled, environments=(), **other):
        monkeypatch.setattr(mhkd, "step_seconds", lambda *a, compiled, **k: slow(compiled) if compiled else eager)

        def slow(_):
            if isinstance(compiled, Exception):
                raise compiled
            return compiled

        config = mhkd.resolve(mhkd.Config("resnet14", "resnet8", **settings | other))
        return mhkd.choose_compile(config, data, None, environments)

    return choose


def test_auto_compiles_where_a_trial_is_faster_and_the_run_is_long(long_run):
    assert long_run(eager=1.0, compiled=0.5)
    assert not long_run(eager=1.0, compiled=0.99)
    assert not long_run(eager=0.5, compiled=0.1)  # a quarter of an hour
    assert not long_run(eager=9.0, compiled=0.1, epochs=50)  # 400 steps
    assert not long_run(eager=1.0, compiled=RuntimeError("no compiler"))


def test_a_resumed_run_obeys_what_was_chosen_before(long_run):
    for before in (True, False):
        assert long_run(eager=1.0, compiled=2.0 if before else 0.1, environments=[{"compiled": before}]) is before


def test_compile_yes_and_no_are_obeyed_except_by_what_sets_its_own_gradients(long_run, capsys):
    assert long_run(eager=1.0, compiled=2.0, compile="yes") and not long_run(eager=1.0, compiled=0.1, compile="no")
    assert not long_run(eager=1.0, compiled=0.1, compile="yes", method="dhkd")
    assert "no effect" in capsys.readouterr().out


def test_a_compiled_run_has_the_losses_of_an_eager_one_and_says_that_it_was_compiled(tmp_path):
    pytest.importorskip("sklearn")
    losses = {}
    for compile in ("no", "yes"):
        arguments = ["--student", "resnet8", "--method", "ce", *TINY, "--epochs", "1", "--lr", "0.003"]
        assert mhkd.main([*arguments, "--compile", compile, "--out", str(tmp_path / compile)]) == 0
        (folder,) = (path.parent for path in tmp_path.glob(f"{compile}/*/config.json"))
        (environment,) = json.loads((folder / "config.json").read_text())["environments"]
        assert environment["compiled"] is (compile == "yes")
        losses[compile] = json.loads((folder / "log.jsonl").read_text())["loss"]
    assert losses["yes"] == pytest.approx(losses["no"], rel=1e-4)


def test_the_trial_of_a_compiled_step_leaves_the_run_as_it_is():
    images, labels = torch.randint(256, (40, 16, 16, 3), dtype=torch.uint8), torch.arange(40) % 10
    data = mhkd.Data(images, labels, images, labels, [""] * 10, (0.5,) * 3, (0.25,) * 3, "")
    config = mhkd.resolve(mhkd.Config("resnet14", "resnet8", dataset="digits", batch_size=20, method="kd"))
    teacher = mhkd.build_model("resnet14", 10).eval()
    state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    assert 0 < mhkd.step_seconds(config, data, teacher, compiled=False, steps=2) < 60
    assert all(torch.equal(tensor, state[name]) for name, tensor in teacher.state_dict().items())


# Precision and memory layout


def distiller_and_batch(method, **settings):
    torch.manual_seed(0)
    images, labels = torch.randint(256, (40, 16, 16, 3), dtype=torch.uint8), torch.arange(40) % 10
    data = mhkd.Data(images, labels, images, labels, [""] * 10, (0.5,) * 3, (0.25,) * 3, "")
    settings = {"dataset": "digits", "batch_size": 20, "negatives": 8, "method": method} | settings
    config = mhkd.resolve(mhkd.Config("resnet14", "resnet8", **settings))
    distiller = mhkd.build_distiller(config, mhkd.build_model("resnet14", 10), data).train()
    return distiller, next(mhkd.epoch_batches(data, config, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("method", ["ce", "kd", "mhkd", "fitnet", "cc", "rkd", "crd+mhkd", "lsh", "dhkd"])
def test_in_bfloat16_networks_and_heads_compute_in_it_and_losses_and_weights_stay_in_float32(method):
    distiller, batch = distiller_and_batch(method, precision="bfloat16")
    exact, _ = distiller_and_batch(method)
    exact.load_state_dict(distiller.state_dict())
    seen = {}
    for name, module in distiller.named_modules():
        if isinstance(module, nn.Conv2d) and name.split(".")[0] in ("student", "teacher") or "heads" in name:
            module.register_forward_hook(lambda m, args, output, name=name: seen.__setitem__(name, output.dtype))
    optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.1)
    before = [p.clone() for p in distiller.student.parameters()]
    expected, _ = exact(*batch)
    figures = mhkd.train_step(distiller, optimizer, *batch)
    assert len(seen) > 6 and set(seen.values()) == {torch.bfloat16}
    assert all(value.dtype == torch.float32 for value in figures.values())
    assert all(p.dtype == torch.float32 for p in distiller.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(before, distiller.student.parameters()))
    for name, value in expected.items():
        assert figures[name].item() == pytest.approx(value.item(), rel=0.05, abs=0.01), name


def test_precision_and_layout_are_recorded_and_the_student_is_saved_in_float32(tmp_path):
    pytest.importorskip("sklearn")
    options = ["--precision", "bfloat16", "--channels-last", "yes"]
    pair = ["--teacher", "resnet14", "--student", "resnet8", *TINY, "--epochs", "1"]
    assert mhkd.main([*pair, *options, "--out", str(tmp_path)]) == 0
    for path in tmp_path.glob("*/result.json"):
        result = json.loads(path.read_text())
        assert result["config"]["precision"] == result["environment"]["precision"] == "bfloat16"
        assert result["environment"]["channels_last"] == "yes" and "precision=bfloat16" in result["name"]
        state = torch.load(path.parent / "student.pt", weights_only=True)["model"]
        assert {tensor.dtype for tensor in state.values()} == {torch.float32, torch.int64}


def test_tf32_is_refused_where_there_is_none_and_leaves_pytorchs_switch_as_it_was(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pair = ["--student", "resnet8", "--method", "ce", *TINY, "--device", "cpu", "--out", str(tmp_path)]
    assert mhkd.main([*pair, "--precision", "tf32"]) != 0
    assert "--precision tf32 is for CUDA" in capsys.readouterr().err
    cuda = torch.device("cuda")  # only its name matters here
    meant = {name: mhkd.precision_on(cuda, mhkd.Config(precision=name)) for name in ("auto", "float32", "bfloat16")}
    assert meant == {"auto": "tf32", "float32": "float32", "bfloat16": "bfloat16"}
    before = torch.backends.cudnn.allow_tf32
    for allowed in (True, False):
        with mhkd.tf32_in_convolutions(allowed):
            assert torch.backends.cudnn.allow_tf32 is allowed
    assert torch.backends.cudnn.allow_tf32 is before


@pytest.mark.parametrize("layout, student, teacher", [("yes", True, True), ("auto", False, True), ("no", False, False)])
def test_the_memory_layout_changes_a_step_by_rounding_alone(layout, student, teacher):
    distiller, batch = distiller_and_batch("mhkd", channels_last=layout)
    other, _ = distiller_and_batch("mhkd", channels_last="no")
    other.load_state_dict(distiller.state_dict())
    for tapped, wanted in ((distiller.student, student), (distiller.teacher, teacher)):
        feature = tapped(batch[0]).features["layer1"]
        assert feature.is_contiguous(memory_format=torch.channels_last) is wanted
    losses = []
    for one in (distiller.double(), other.double()):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.01)
        losses.append([mhkd.train_step(one, optimizer, batch[0].double(), *batch[1:])["loss"] for _ in range(3)])
    torch.testing.assert_close(*map(torch.stack, losses), rtol=1e-9, atol=0)
