"""The methods as runs build them: their terms, options, gradients; killed and resumed; alone."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import SCRIPT, script
from torch import nn

import mhkd
import mhkd_baselines

K = 5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_data(size=64, image_size=16, classes=K):
    images = torch.randint(256, (size, image_size, image_size, 3), dtype=torch.uint8)
    places, names = torch.arange(size), [str(i) for i in range(classes)]
    parts = {"train": places, "val": places[:0], "test": places, "classes": names}
    statistics = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "sha256": ""}
    return mhkd.Data(images, places % classes, **parts, size=image_size, **statistics)


OF_HEADS = {"head_width": 8, "head_stride": 2}


def configure(method, teacher="wrn_16_2", student="resnet8", options=(), **settings):
    declared = mhkd.method_options(mhkd.find_methods(method))
    small = {name: v for name, v in {**OF_HEADS, "negatives": 20}.items() if name in declared}
    settings = {"dataset": "digits", "options": small | dict(options), **settings}
    return mhkd.Config(teacher=teacher, student=student, method=method, **settings)


def make(method, *networks, **settings):
    """Distiller and a batch of images, labels, indices."""
    config = configure(method, *networks, **settings)
    data = make_data(image_size=config.image_size)
    torch.manual_seed(3)
    distiller = mhkd.Distiller(config, data, mhkd.build_model(config.teacher, K)).train()
    return distiller, next(mhkd.epoch_batches(data, config, 1))


def seen_by(distiller, batch):
    """What a method sees of a step."""
    images, labels, indices = batch
    outputs = distiller.student(images), distiller.teacher(images)
    return mhkd.Batch(*outputs, labels, indices)


COMBINED = ("crd+mhkd", "crd+dhkd", "fitnet+cc+rkd+mhkd")
PAIRS = [("wrn_16_2", "resnet8"), ("vgg8", "mobilenetv2"), ("resnet8", "shufflenetv2")]


@pytest.mark.parametrize("method", ["kd", "mhkd", *mhkd.BASELINES, *COMBINED])
@pytest.mark.parametrize("teacher, student", PAIRS)
def test_a_step_of_every_method_reaches_the_student_and_what_it_adds_and_spares_the_teacher(
    method, teacher, student
):
    distiller, batch = make(method, teacher, student, image_size=32, batch_size=4)
    terms, figures = distiller(*batch)
    assert all(term.isfinite() and term.dim() == 0 for term in terms.values())
    assert terms.keys() <= figures.keys()
    torch.testing.assert_close(figures["loss"], sum(terms.values()).detach())
    distiller.backward(terms)
    for name, parameter in distiller.named_parameters():
        if name.startswith("teacher."):
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad is not None, name
    assert any(p.grad.any() for p in distiller.student.parameters())


@pytest.mark.parametrize("method", ["mhkd", "crd+dhkd", "lsh"])
def test_the_students_initial_weights_depend_on_the_seed_alone(method):
    wanted = make("kd")[0].student.model.state_dict()
    found = make(method)[0].student.model.state_dict()
    same = [torch.equal(found[name], wanted[name]) for name in wanted if name in found]
    assert all(same[:-2]) and len(same) > 20  # lsh has another classifier
    other = make(method, seed=1)[0].student.model.state_dict()
    assert not torch.equal(other["conv1.weight"], wanted["conv1.weight"])


NETWORKS = ["resnet8", "vgg8", "mobilenetv2", "shufflenetv2"]


@pytest.mark.parametrize("student, teacher", list(itertools.permutations(NETWORKS, 2)))
@pytest.mark.parametrize("image_size", [16, 33])
def test_fitnets_regressor_fits_maps_of_every_size(student, teacher, image_size):
    distiller, (images, *_) = make("fitnet", teacher, student, image_size=image_size)
    fitnet = distiller.methods[0]
    f_s = distiller.student(images[:2]).features[fitnet.unit_s]
    f_t = distiller.teacher(images[:2]).features[fitnet.unit_t]
    assert fitnet.regressor(f_s).shape == f_t.shape


def test_fitnets_hints_and_its_regressor_are_those_of_the_benchmark():
    config = mhkd.Config(teacher="vgg13", student="wrn_16_2", method="fitnet")
    assert mhkd_baselines.FitNet.units(config, "teacher") == (3,)
    assert mhkd_baselines.FitNet.units(config, "student") == (2,)
    for teacher, student, kind, kernel in (
        ("vgg8", "resnet8", nn.Conv2d, 3),  # 16 to 8
        ("resnet8", "vgg8", nn.ConvTranspose2d, 4),  # 8 to 16
        ("resnet8", "wrn_16_2", nn.Conv2d, 1),
    ):
        conv = make("fitnet", teacher, student, image_size=32)[0].methods[0].regressor[0]
        assert type(conv) is kind and conv.kernel_size == (kernel, kernel), (teacher, student)


@pytest.mark.parametrize("method", ["fitnet", "cc", "rkd", "crd"])
def test_the_benchmarks_methods_add_their_weighted_term_to_cross_entropy_and_divergence(method):
    distiller, batch = make(method)
    terms, _ = distiller(*batch)
    seen = seen_by(distiller, batch)
    logits = seen.student.logits
    torch.testing.assert_close(terms["ce"], nn.functional.cross_entropy(logits, batch[1]))
    torch.testing.assert_close(terms["kd"], mhkd.kd_loss(logits, seen.teacher.logits, 4.0))
    assert set(terms) == {"ce", "kd", method}
    name = f"{method}_weight"
    weight = mhkd.METHODS[method].options[name].default
    others = {name: 2 * weight, "gamma": 0.5, "kd_weight": 0.0}
    doubled, _ = make(method, options=others)[0](*batch)
    torch.testing.assert_close(doubled["ce"], terms["ce"] / 2)
    assert set(doubled) == {"ce", method}
    if method != "crd":  # which draws
        torch.testing.assert_close(doubled[method], 2 * terms[method])


def test_joined_methods_take_the_final_outputs_terms_of_one_and_add_their_own():
    both, batch = make("crd+mhkd")
    terms, figures = both(*batch)
    assert set(terms) == {"mhkd", "crd"} and terms["crd"] > 0
    seen = seen_by(both, batch)
    torch.testing.assert_close(terms["mhkd"], both.methods[-1].final_terms(seen)["mhkd"])
    assert set(make("crd")[0](*batch)[0]) == {"ce", "kd", "crd"}
    assert set(make("mhkd")[0](*batch)[0]) == {"mhkd"}


def test_mhkd_is_equation_2_over_its_units_and_logs_each_heads_terms():
    chosen = {"units": (1, 3), "beta": 0.7, "tau": 3.0, "alpha": 0.8}
    distiller, batch = make("mhkd", options=chosen)
    terms, figures = distiller(*batch)
    seen, method = seen_by(distiller, batch), distiller.methods[0]
    student, teacher = method.student_heads(seen.student), method.teacher_heads(seen.teacher)
    assert len(student) == 3 and list(method.student_heads) == ["1", "3"]
    expected = sum(nn.functional.cross_entropy(z, batch[1]) for z in teacher[1:])
    for unit, weight, z_s, z_t in zip((0, 1, 3), (1, 0.7, 0.7), student, teacher):
        kl, ce = mhkd.kd_loss(z_s, z_t, 3.0), nn.functional.cross_entropy(z_s, batch[1])
        expected = expected + weight * (0.8 * kl + 0.2 * ce)
        torch.testing.assert_close(figures[f"kl_{unit}"], kl.detach())
        torch.testing.assert_close(figures[f"ce_{unit}"], ce.detach())
    torch.testing.assert_close(terms["mhkd"], expected)


def test_the_order_in_which_methods_are_joined_means_nothing():
    assert {configure(name).method for name in ("crd+mhkd", "mhkd+crd")} == {"crd+mhkd"}


@pytest.mark.parametrize("method, message", [
    ("crd+crd", "twice"),
    ("ce+lsh", "ce adds nothing to lsh"),
    ("kd+mhkd", "kd adds nothing to mhkd"),
    ("crd+nothing", "no method 'nothing'"),
    ("cdr", "no method 'cdr': did you mean.* crd"),
    ("dhkd+other", "only one of"),
])  # fmt: skip
def test_methods_that_cannot_be_joined_are_refused(method, message, monkeypatch):
    other = type("Other", (mhkd_baselines.DualHead,), {})
    monkeypatch.setitem(mhkd.METHODS, "other", other)
    with pytest.raises(mhkd.UsageError, match=message):
        configure(method)


@pytest.mark.parametrize("other, gives", [("mhkd", "mhkd"), ("kd", "kd"), ("crd", "new")])
def test_a_new_method_is_joined_with_any_other(other, gives, monkeypatch):
    class New(mhkd_baselines.BenchmarkMethod):
        options = {"new_weight": mhkd.Option(3.0, "weight of new's term")}

        def own_terms(self, batch):
            return {"new": self.options.new_weight * batch.student.logits.square().mean()}

    monkeypatch.setitem(mhkd.METHODS, "new", New)
    assert list(mhkd.find_methods(f"new+{other}"))[-1] == gives
    distiller, batch = make(f"{other}+new", options={"new_weight": 2.0}, batch_size=8)
    terms, _ = distiller(*batch)
    logits = distiller.student(batch[0]).logits
    torch.testing.assert_close(terms["new"], 2 * logits.square().mean())
    assert ("ce" in terms) == (gives == "new")


# Options belong to methods


@pytest.mark.parametrize("method, option, message", [
    ("mhkd", "negatives", "--negatives is an option of --method crd, not of mhkd"),
    ("kd", "head_width", "--head-width is an option of --method mhkd, not of kd"),
    ("crd+mhkd", "gamma", "--gamma is an option of --method .*crd.*, not of crd.mhkd"),
    ("crd", "negatves", "no option --negatves: did you mean --negatives"),
    ("mhkd", "head-widht", "no option --head-widht: did you mean --head-width"),
    ("mhkd", "batchsize", "no option --batchsize: did you mean --batch-size"),
])  # fmt: skip
def test_an_option_of_no_chosen_method_is_a_usage_error_that_tells_whose_it_is(
    method, option, message, capsys
):
    if "-" not in option:
        with pytest.raises(mhkd.UsageError, match=message):
            configure(method, options={option: 1})
    flag = f"--{option.replace('_', '-')}"
    pair = ["--teacher", "vgg13", "--student", "vgg8", "--method", method]
    for arguments in ([flag, "1"], [f"{flag}=1"]):
        assert mhkd.main([*pair, *arguments]) == 1
        captured = capsys.readouterr()
        assert re.search(message, captured.err) and captured.err.count("\n") == 1


@pytest.mark.parametrize("method, value, message", [
    ("mhkd", {"tau": 0.0}, "--tau must be a number above 0, not 0.0"),
    ("mhkd", {"alpha": math.nan}, "--alpha must be between 0 and 1, not nan"),
    ("mhkd", {"beta": -1.0}, "--beta must be a number not below 0"),
    ("mhkd", {"units": (1, 1)}, "--units must be different units: 1,2,3, not 1,1"),
    ("mhkd", {"head_width": 0}, "--head-width must be at least 1"),
    ("crd", {"negatives": 0}, "--negatives must be at least 1"),
    ("lsh", {"lsh_samples": "some"}, "--lsh-samples must be one of correct, all, not some"),
])  # fmt: skip
def test_an_options_value_that_makes_no_sense_is_refused(method, value, message):
    with pytest.raises(mhkd.UsageError, match=message):
        configure(method, options=value)


def test_an_options_default_is_the_recipes_and_the_command_line_has_its_values():
    assert configure("mhkd").options["beta"] == 0.5
    config = mhkd.Config("vgg13", "vgg8", dataset="svhn", options={"tau": 2.0})
    expected = {"tau": 2.0, "alpha": 0.9, "beta": 5.0, "units": (1, 2, 3)}
    assert config.options == {**expected, "head_width": 256, "head_stride": 1}
    arguments = "--teacher vgg13 --student vgg8 --method dhkd --no-dhkd-align --dhkd-tau 3"
    _, values = mhkd.parse_config(arguments.split())
    options = mhkd.Config(**values).options
    assert options["dhkd_align"] is False and options["dhkd_tau"] == 3.0
    assert configure("dhkd").options["dhkd_align"] is True


# Feature mimicking


def test_lsh_bits_are_set_for_half_of_the_training_set_and_chunks_change_nothing(monkeypatch):
    distiller, _ = make("lsh")
    method, data = distiller.methods[0], make_data()

    def epoch():
        return mhkd.epoch_batches(data, configure("lsh"), 1)

    method.prepare(distiller.teacher, epoch)
    with torch.no_grad():
        features = torch.cat([distiller.teacher(images).penultimate for images, *_ in epoch()])
    hashes = features @ method.weight.T
    lower_median = hashes.sort(dim=0).values[(len(hashes) - 1) // 2]
    torch.testing.assert_close(method.bias, -lower_median)
    assert method.weight.shape == (32 * 128, 128)
    std = distiller.teacher.model.fc.weight.std().item()
    assert method.weight.std().item() == pytest.approx(std, rel=0.01)
    whole = method.bias.clone()
    monkeypatch.setattr(mhkd_baselines.FeatureMimicking, "HASH_VALUES", 64 * 100)
    method.prepare(distiller.teacher, epoch)
    torch.testing.assert_close(method.bias, whole)


@pytest.mark.parametrize("samples", ["correct", "all"])
def test_lsh_counts_the_samples_that_are_asked_for(samples):
    same_width = ("resnet8", "wrn_16_1")
    distiller, batch = make("lsh", *same_width, options={"lsh_samples": samples})
    seen, method = seen_by(distiller, batch), distiller.methods[0]
    right = seen.teacher.logits.argmax(dim=1) == batch[1]
    assert 0 < right.sum() < len(right)
    rows = [i for i in range(len(right)) if samples == "all" or right[i]]
    f_s, f_t = seen.student.penultimate[rows], seen.teacher.penultimate[rows]
    expected = nn.functional.mse_loss(f_s, f_t)
    expected = expected + mhkd_baselines.lsh_loss(f_s, f_t, method.weight, method.bias)
    torch.testing.assert_close(method.own_terms(seen)["lsh"], 6 * expected)
    widened = mhkd_baselines.WidenedClassifier
    assert not any(isinstance(module, widened) for module in distiller.modules())


@pytest.mark.parametrize("student", NETWORKS)
def test_lsh_widens_the_student_to_the_teachers_width_and_folds_it_back_exactly(student):
    distiller, (images, *_) = make("lsh", "wrn_16_2", student)
    assert distiller.student.width == 128
    assert distiller.student(images[:2]).penultimate.shape[1] == 128
    x = images.double()
    widened = distiller.double().student.model.eval()
    wanted = widened(x)
    fresh = mhkd.build_model(student, K).double().eval()
    fresh.load_state_dict(distiller.plain_student().state_dict())
    torch.testing.assert_close(fresh(x), wanted, rtol=1e-10, atol=1e-10)
    assert torch.equal(widened(x), wanted)  # training could go on


# Dual heads


def gradients(distiller, term):
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    return torch.autograd.grad(
        term, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )


@pytest.mark.parametrize("method", ["dhkd", "crd+dhkd"])
def test_dhkd_takes_off_what_points_against_the_cross_entropys_gradient(method):
    distiller, batch = make(method)
    distiller.double()
    terms, _ = distiller(batch[0].double(), *batch[1:])
    named = {name: p for name, p in distiller.named_parameters() if p.requires_grad}
    rest = sum(term for name, term in terms.items() if name != "dhkd")
    disagreed = []
    for sign in (1, -1):  # with one of the two signs the gradients disagree
        signed = {**terms, "dhkd": sign * terms["dhkd"]}
        g1, g2 = (dict(zip(named, gradients(distiller, term))) for term in (rest, signed["dhkd"]))
        on_student = [name for name in named if name.startswith("student.")]
        dot = sum((g1[name] * g2[name]).sum() for name in on_student)
        disagreed.append(bool(dot < 0))
        expected = {name: g1[name] + g2[name] for name in named}
        if dot < 0:
            square = sum(g1[name].square().sum() for name in on_student)
            expected |= {name: expected[name] - dot / square * g1[name] for name in on_student}
        backward_keeping_the_graph(distiller, signed)
        for name, p in named.items():
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-8, atol=1e-10)
    assert sorted(disagreed) == [False, True]


def backward_keeping_the_graph(distiller, terms):
    grad = torch.autograd.grad

    def keeping(*arguments, **options):
        return grad(*arguments, **{**options, "retain_graph": True})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", keeping)
        distiller.backward(terms)


def test_dhkd_costs_two_backward_passes(monkeypatch):
    distiller, batch = make("dhkd")
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: pytest.fail("a further backward"))
    distiller.backward(distiller(*batch)[0])
    assert len(calls) == 2


def test_dhkd_without_alignment_and_with_a_linear_head_is_the_plain_sum():
    distiller, batch = make("dhkd", options={"dhkd_align": False, "dhkd_head": "linear"})
    assert [type(layer) for layer in distiller.methods[0].head] == [nn.Linear]
    terms, _ = distiller(*batch)
    expected = gradients(distiller, sum(terms.values()))
    distiller.backward(terms)
    for p, gradient in zip([p for p in distiller.parameters() if p.requires_grad], expected):
        torch.testing.assert_close(p.grad, gradient)


# Precision


@pytest.mark.parametrize("method", ["mhkd", "crd"])
def test_in_bfloat16_networks_and_heads_compute_in_it_and_losses_and_weights_in_float32(method):
    distiller, batch = make(method, precision="bfloat16")
    exact, _ = make(method)
    exact.load_state_dict(distiller.state_dict())
    seen = {}
    for name, module in distiller.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, a, y, name=name: seen.update({name: y.dtype}))
    torch.manual_seed(5)
    expected, _ = exact(*batch)
    torch.manual_seed(5)  # the same negatives
    terms, _ = distiller(*batch)
    assert len(seen) > 15 and set(seen.values()) == {torch.bfloat16}
    assert any("heads" in name for name in seen) == (method == "mhkd")
    distiller.backward(terms)
    assert all(term.dtype == torch.float32 for term in terms.values())
    trained = [p for p in distiller.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained} == {torch.float32}
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=0.05, abs=0.01), name
        assert terms[name].item() != value.item()


# The command line, and the file alone


def help_text(capsys, *arguments):
    with pytest.raises(SystemExit):
        mhkd.main(["--help", *arguments])
    return capsys.readouterr().out


def test_help_has_its_groups_and_the_options_of_the_chosen_method_alone(capsys):
    usual = help_text(capsys)
    for group in ("networks", "data", "method", "training", "machine"):
        assert f"\n{group}:\n" in usual
    flags = {f"--{name.replace('_', '-')}" for name in vars(mhkd.Config("vgg8", "vgg8"))}
    flags = {*flags, "--no-flip", "--head-width"} - {"--options", "--given"}
    assert all(re.search(rf"\n  (--\S+, )?{flag}[ ,\n]", usual) for flag in flags)
    assert "--negatives" not in usual
    of_crd = help_text(capsys, "--method", "crd")
    assert "--negatives" in of_crd and "[16384]" in of_crd and "--head-width" not in of_crd
    joined = help_text(capsys, "--method=crd+mhkd")
    assert "--negatives" in joined and "--head-width" in joined


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """mhkd.py in a folder of its own, and a way to run it there."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(SCRIPT, folder)

    def run(*arguments):
        command = [sys.executable, "-P", "mhkd.py", *map(str, arguments)]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)

    return folder, run


QUICK = "--dataset digits --subset 100 --batch-size 25 --epochs 1 --device cpu".split()


def test_the_file_alone_in_a_folder_trains_with_its_own_methods(alone):
    pytest.importorskip("sklearn")
    folder, run = alone
    assert run("--version").stdout.startswith(f"mhkd {mhkd.__version__}, PyTorch")
    for method in ("ce", "kd", "mhkd"):
        pair = ["--teacher", "resnet8", "--student", "resnet8", "--method", method]
        done = run(*pair, *QUICK)
        assert done.returncode == 0, done.stderr
    assert len(list(folder.glob("runs/*/result.json"))) == 3
    (result,) = folder.glob("runs/*-mhkd-*/result.json")
    commits = [e["commit"] for e in json.loads(result.read_text())["environments"]]
    assert commits == [None]  # a copy is of no commit


def test_the_file_alone_says_in_one_sentence_where_a_baseline_is(alone):
    done = alone[1]("--teacher", "resnet8", "--student", "resnet8", "--method", "crd+mhkd")
    assert done.returncode == 1 and not done.stdout
    assert "--method crd is in mhkd_baselines.py: copy it beside mhkd.py" in done.stderr
    assert done.stderr.count("\n") == 1


def test_run_as_a_script_there_is_one_copy_of_mhkd_in_the_process(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        "def look():\n"
        "    main, own = sys.modules['__main__'], sys.modules['mhkd_baselines']\n"
        "    assert own.mhkd is main and issubclass(own.DualHead, main.Method)\n"
        "    print('one copy')\n"
        "atexit.register(look)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = script("--help", "--method", "crd", env=environment)
    assert "one copy" in done.stdout and not done.stderr


# Whole runs

RUN = "--student resnet8 --dataset digits --subset 300 --batch-size 25 --epochs 4".split()
RUN += ["--device", "cpu"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("teacher")
    ce = ["--student", "wrn_16_1", "--method", "ce", *RUN[2:], "--epochs", "2", "--out", str(out)]
    assert mhkd.main(ce) == 0
    return next(out.glob("*/student.pt"))


@pytest.mark.parametrize("method", ["mhkd", "fitnet+cc+rkd", "lsh", "crd+mhkd", "crd+dhkd"])
def test_every_method_learns_goes_on_where_it_stopped_and_leaves_a_plain_student(
    method, teacher, tmp_path, monkeypatch, capsys
):
    pair = ["--teacher", "wrn_16_1", "--teacher-weights", str(teacher), "--method", method]
    arguments = [*pair, *RUN, "--no-flip"]
    arguments += ["--negatives", "100"] if "crd" in method else []
    arguments += ["--head-width", "8"] if "mhkd" in method else []
    save = mhkd.save

    def stop_after_two(folder, record, distiller, optimizer, log):
        save(folder, record, distiller, optimizer, log)
        if len(log) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mhkd, "save", stop_after_two)
        assert mhkd.main([*arguments, "--out", str(tmp_path / "stopped")]) == 130
    for folder in ("stopped", "whole"):
        assert mhkd.main([*arguments, "--out", str(tmp_path / folder)]) == 0
    assert "goes on after epoch 2 of 4" in capsys.readouterr().out
    paths = [next(tmp_path.glob(f"{folder}/*/student.pt")) for folder in ("whole", "stopped")]
    state, other = (mhkd.load_file(path)["model"] for path in paths)
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    plain = mhkd.build_model("resnet8", 10).state_dict()
    assert {name: t.shape for name, t in state.items()} == {n: t.shape for n, t in plain.items()}
    log = (paths[0].parent / "log.jsonl").read_text().splitlines()
    first, *_, last = map(json.loads, log)
    assert last["loss"] < first["loss"]
    assert last["train_accuracy"] > first["train_accuracy"]


IN_TWO_PROCESSES = """
import sys
sys.path[:0] = sys.argv[2:]
import torch, mhkd, test_methods

config = test_methods.configure(sys.argv[1], batch_size=16, device="cpu")
with mhkd.surroundings(config) as device:
    data = test_methods.make_data()
    torch.manual_seed(3)
    distiller = mhkd.Distiller(config, data, mhkd.build_model(config.teacher, 5)).train()
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    mhkd.seed_epoch(config, 1)  # other negatives and other dropout in each
    keys = torch.rand(4)
    assert len(mhkd.gather_from_processes(keys).unique()) == 8
    seen = []
    for images, labels, indices in mhkd.epoch_batches(data, config, 1):
        before = distiller.methods[0].crd.student_bank.clone()
        terms, _ = distiller(images, labels, indices)
        optimizer.zero_grad()
        distiller.backward(terms)
        mhkd.average_gradients(parameters)
        optimizer.step()
        moved = (distiller.methods[0].crd.student_bank != before).any(dim=1)
        assert moved.sum() == 16 and moved[indices].all() and len(indices) == 8  # the other's, too
        seen.append(indices)
    for name, tensor in [*distiller.methods.named_buffers(), *distiller.named_parameters()]:
        if "running" in name or "num_batches" in name:
            continue  # each process keeps its own; that of the first is saved
        mine, first = tensor.detach().clone(), tensor.detach().clone()
        torch.distributed.broadcast(first, 0)
        assert torch.equal(mine, first), name
    everything = mhkd.gather_from_processes(torch.cat(seen))
    assert len(everything.unique()) == 64
    print("agreed")
"""


@pytest.mark.parametrize("method", ["crd+mhkd", "crd+dhkd"])
def test_two_processes_keep_the_same_banks_and_take_the_same_steps(method, tmp_path):
    (tmp_path / "two.py").write_text(IN_TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command += ["2", str(tmp_path / "two.py"), method, str(SCRIPT.parent)]
    command.append(str(SCRIPT.parent / "tests"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout.count("agreed") == 2, done.stderr
