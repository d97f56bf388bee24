"""The methods as runs build them: their terms, options, gradients; killed and resumed; alone."""

import os
import re
import shutil
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    MHKD,
    PAIR,
    SCRIPT,
    end_of,
    environments,
    folder_of,
    fork,
    half,
    log_of,
    outcome,
    python,
    read,
    run,
    script,
    weights_of,
)
from torch import nn
from torch.nn import functional as F

import mhkd
import mhkd_baselines
import mhkd_config
import mhkd_runs

pytest.importorskip("sklearn")
K = 5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_data():
    images = torch.randint(256, (64, 16, 16, 3), dtype=torch.uint8)
    places, names = torch.arange(64), [str(i) for i in range(K)]
    parts = {"train": places, "val": places[:0], "test": places, "classes": names}
    statistics = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "sha256": ""}
    return mhkd.Data(images, places % K, **parts, size=16, **statistics)


def configure(method, teacher="wrn_16_2", student="resnet8", options=(), **settings):
    declared = mhkd_config.method_options(mhkd.find_methods(method))
    small = {"head_width": 8, "head_stride": 2, "negatives": 20}
    options = {name: v for name, v in small.items() if name in declared} | dict(options)
    settings = {"dataset": "digits", "options": options, "device": "cpu", **settings}
    return mhkd.Config(teacher=teacher, student=student, method=method, **settings)


def make(method, *networks, **settings):
    """Distiller and a batch of images, labels, indices."""
    config, data = configure(method, *networks, **settings), make_data()
    torch.manual_seed(3)
    distiller = mhkd.Distiller(config, data, mhkd.build_model(config.teacher, K)).train()
    return distiller, next(mhkd.epoch_batches(data, config, 1))


def seen_by(distiller, batch):
    """What a method sees of a step."""
    images, labels, indices = batch
    return mhkd.Batch(distiller.student(images), distiller.teacher(images), labels, indices)


def trained(distiller):
    return [p for p in distiller.parameters() if p.requires_grad]


BASELINES = ("fitnet", "cc", "rkd", "crd", "lsh", "dhkd")
EVERY = ("kd", "mhkd", *BASELINES, "crd+mhkd", "crd+dhkd", "fitnet+cc+rkd+mhkd")
PAIRS = [("wrn_16_2", "resnet8"), ("vgg8", "mobilenetv2"), ("resnet8", "shufflenetv2")]


@pytest.mark.parametrize("method, pair", [*zip(EVERY, cycle(PAIRS))])
def test_a_step_reaches_the_student_and_what_a_method_adds_and_spares_the_teacher(method, pair):
    distiller, batch = make(method, *pair, batch_size=4)
    before = {k: t.clone() for k, t in distiller.teacher.state_dict().items()}
    terms, metrics = distiller(*batch)
    assert all(term.isfinite() and term.dim() == 0 for term in terms.values())
    assert terms.keys() <= metrics.keys()
    torch.testing.assert_close(metrics["loss"], sum(terms.values()).detach())
    distiller.backward(terms)
    assert all(p.grad is not None for p in distiller.parameters())
    assert any(p.grad.any() for p in distiller.student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in distiller.teacher.parameters())
    assert all(torch.equal(t, before[k]) for k, t in distiller.teacher.state_dict().items())


@pytest.mark.parametrize("size_s, size_t, kind, kernel", [
    (16, 8, nn.Conv2d, 3), (8, 16, nn.ConvTranspose2d, 4), (8, 8, nn.Conv2d, 1),  # the benchmark's
    (9, 5, nn.Conv2d, 5), (5, 9, nn.ConvTranspose2d, 5), (17, 4, nn.Conv2d, 14),
])  # fmt: skip
def test_fitnets_regressor_fits_maps_of_every_size(size_s, size_t, kind, kernel):
    config = configure("fitnet", "vgg13", "wrn_16_2")
    student = SimpleNamespace(shapes={2: (6, size_s, size_s)})
    teacher = SimpleNamespace(shapes={3: (4, size_t, size_t)})  # of a vgg the third unit
    fitnet = mhkd_baselines.FitNet(config, student, teacher, None)
    assert (fitnet.units(config, "student"), fitnet.units(config, "teacher")) == ((2,), (3,))
    assert fitnet.regressor(torch.randn(2, *student.shapes[2])).shape == (2, *teacher.shapes[3])
    assert type(fitnet.regressor[0]) is kind and fitnet.regressor[0].kernel_size == (kernel, kernel)


@pytest.mark.parametrize("method", ["fitnet", "cc", "rkd", "crd"])
def test_the_benchmarks_methods_add_their_weighted_term_to_cross_entropy_and_divergence(method):
    distiller, batch = make(method)
    terms, _ = distiller(*batch)
    seen = seen_by(distiller, batch)
    logits = seen.student.logits
    torch.testing.assert_close(terms["ce"], F.cross_entropy(logits, batch[1]))
    torch.testing.assert_close(terms["kd"], mhkd.kd_loss(logits, seen.teacher.logits, 4.0))
    assert set(terms) == {"ce", "kd", method}
    weight = f"{method}_weight"
    others = {weight: 2 * mhkd.METHODS[method].options[weight].default}
    doubled, _ = make(method, options={**others, "gamma": 0.5, "kd_weight": 0.0})[0](*batch)
    assert set(doubled) == {"ce", method}
    torch.testing.assert_close(doubled["ce"], terms["ce"] / 2)
    if method != "crd":  # which draws
        torch.testing.assert_close(doubled[method], 2 * terms[method])


def test_joined_methods_take_the_final_outputs_terms_of_one_and_add_their_own_in_any_order():
    both, batch = make("mhkd+crd")
    assert both.config.method == configure("crd+mhkd").method == "crd+mhkd"
    terms, _ = both(*batch)
    assert set(terms) == {"mhkd", "crd"} and terms["crd"] > 0


def test_mhkd_is_equation_2_over_its_units_and_logs_each_heads_terms():
    chosen = {"units": (1, 3), "beta": 0.7, "tau": 3.0, "alpha": 0.8}
    distiller, batch = make("mhkd", options=chosen)
    terms, metrics = distiller(*batch)
    seen, method = seen_by(distiller, batch), distiller.methods[0]
    student, teacher = method.student_heads(seen.student), method.teacher_heads(seen.teacher)
    assert set(terms) == {"mhkd"} and list(method.student_heads) == ["1", "3"]
    expected = sum(F.cross_entropy(z, batch[1]) for z in teacher[1:])
    for unit, weight, z_s, z_t in zip((0, 1, 3), (1, 0.7, 0.7), student, teacher, strict=True):
        kl, ce = mhkd.kd_loss(z_s, z_t, 3.0), F.cross_entropy(z_s, batch[1])
        expected = expected + weight * (0.8 * kl + 0.2 * ce)
        torch.testing.assert_close(metrics[f"kl_{unit}"], kl.detach())
        torch.testing.assert_close(metrics[f"ce_{unit}"], ce.detach())
    torch.testing.assert_close(terms["mhkd"], expected)


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


@pytest.mark.parametrize("names, log", [
    (["kd"], []), (["loss"], []), (["new"], ["lr"]), (["new"], ["new"]), (["new"], ["labelled"]),
])  # fmt: skip
def test_a_term_or_metric_with_the_name_of_another_is_refused(names, log, monkeypatch):
    class New(mhkd_baselines.BenchmarkMethod):
        def own_terms(self, batch):
            batch.metrics |= {name: batch.student.logits.mean() for name in log}
            return {name: batch.student.logits.square().mean() for name in names}

    monkeypatch.setitem(mhkd.METHODS, "new", New)
    distiller, batch = make("new", batch_size=8)
    with pytest.raises(mhkd.UsageError, match=f"'{[*log, *names][0]}' already: rename"):
        distiller(*batch)


# Options belong to methods


def test_an_option_with_the_name_of_another_methods_option_is_refused(monkeypatch):
    class New(mhkd_baselines.BenchmarkMethod):
        options = {"tau": mhkd.Option(0.1, "a temperature of its own")}

    monkeypatch.setitem(mhkd.METHODS, "new", New)
    with pytest.raises(mhkd.UsageError, match="--method new has an option tau, which other"):
        configure("new")
    assert "embed_dim" in configure("cc+crd").options  # one option for both


@pytest.mark.parametrize("method, message", [
    ("crd+crd", "twice"),
    ("ce+lsh", "ce adds nothing to lsh"),
    ("kd+mhkd", "kd adds nothing to mhkd"),
    ("crd+nothing", "no method 'nothing'"),
    ("cdr", "no method 'cdr': did you mean.* crd"),
    ("dhkd+other", "dhkd and other cannot be joined"),
    ("mhkd --negatives 1", "--negatives is an option of --method crd, not of mhkd"),
    ("kd --head-width 1", "--head-width is an option of --method mhkd or heads, not of kd"),
    ("lsh --gamma=1", "--gamma is an option of --method kd .*crd.*, not of lsh"),
    ("crd --negatves 1", "no option --negatves: did you mean --negatives"),
    ("mhkd --batchsize=1", "no option --batchsize: did you mean --batch-size"),
    ("crd --negatives 0", "--negatives must be at least 1"),
    ("mhkd --teacher-heads none", "--teacher-heads must be one of scratch, pretrained, logits"),
    ("mhkd --teacher-heads-epochs 3", "is for --teacher-heads pretrained"),
    ("mhkd --gamma -1", "--gamma must be a number from 0 to 3e38"),
    ("heads", "no student"), ("crd+heads", "heads adds nothing to crd"),
    ("lsh --lsh-samples some", "--lsh-samples must be one of correct, all, not some"),
])  # fmt: skip
def test_methods_and_options_without_sense_are_refused(method, message, monkeypatch, capsys):
    other = type("Other", (mhkd_baselines.DualHead,), {})
    monkeypatch.setitem(mhkd.METHODS, "other", other)
    pair = ["--teacher", "vgg13", "--student", "vgg8", "--method"]
    assert mhkd.main([*pair, *method.split()]) == 1
    sentence = capsys.readouterr().err
    assert re.search(message, sentence) and sentence.count("\n") == 1


def test_the_options_of_the_method_are_on_the_command_line_and_no_others_in_a_config(monkeypatch):
    configs = []
    monkeypatch.setattr(mhkd, "train", configs.append)
    line = "--teacher vgg13 --student vgg8 --method dhkd --no-dhkd-align --dhkd-tau 3"
    assert mhkd.main(line.split()) == 0
    assert configs[0].options["dhkd_align"] is False and configs[0].options["dhkd_tau"] == 3.0
    assert configure("dhkd").options["dhkd_align"] is True
    with pytest.raises(mhkd.UsageError, match="--negatives"):
        configure("mhkd", options={"negatives": 1})


# Weights and the teacher's heads


def test_weights_of_the_final_terms_and_of_the_heads_cross_entropy_have_options_of_their_own():
    options = {"gamma": 0.3, "kd_weight": 0.6, "head_ce": 0.2, "alpha": 0.7, "beta": 2.0}
    distiller, batch = make("mhkd", options=options)
    terms, metrics = distiller(*batch)
    wanted = 0.6 * metrics["kl_0"] + 0.3 * metrics["ce_0"]
    for unit in (1, 2, 3):
        of_head = 0.7 * metrics[f"kl_{unit}"] + 0.2 * metrics[f"ce_{unit}"]
        wanted += 2.0 * of_head + metrics[f"ce_teacher_{unit}"]
    torch.testing.assert_close(terms["mhkd"].detach(), wanted)
    kd, _ = make("kd", options={"gamma": 0.3, "kd_weight": 0.6})
    final = 0.6 * metrics["kl_0"] + 0.3 * metrics["ce_0"]
    torch.testing.assert_close(kd(*batch)[0]["kd"].detach(), final)
    by_default, _ = make("mhkd")
    assert by_default.methods[0].final_weights() == (0.9, 1 - 0.9)


def test_mhkd_without_heads_at_equal_weights_gives_the_student_of_cross_entropy_plus_divergence(
    tmp_path,
):
    equal = ["--beta", "0", "--gamma", "1", "--kd-weight", "1"]
    plain = ["--backend", "reference"]
    assert run(tmp_path, *MHKD, *plain, *equal) == 0
    assert run(tmp_path, *PAIR, *plain, "--method", "cc", "--cc-weight", "0") == 0
    with_heads, without = (weights_of(folder_of(tmp_path, method=m)) for m in ("mhkd", "cc"))
    assert all(torch.equal(with_heads[name], without[name]) for name in without)


def test_the_frozen_teacher_below_the_heads_is_tested_in_the_first_epoch_only(
    tmp_path, monkeypatch
):
    calls, evaluate = [], mhkd.evaluate
    monkeypatch.setattr(mhkd, "evaluate", lambda *a: calls.append(a) or evaluate(*a))
    assert run(tmp_path, *MHKD, "--teacher-heads", "pretrained", "--teacher-heads-epochs", "3") == 0
    heads, student = (log_of(next(tmp_path.glob(f"*-{m}-*"))) for m in ("heads", "mhkd"))
    teacher = read(folder_of(tmp_path, "resnet14", "ce") / "result.json")["accuracy"]
    assert [entry["test_accuracy"] for entry in heads] == [teacher] * 3
    assert len(calls) == len(log_of(folder_of(tmp_path, "resnet14", "ce"))) + 1 + len(student) + 3


def test_pretrained_heads_are_trained_once_shared_and_frozen(tmp_path):
    pretrained = [*MHKD, "--teacher-heads", "pretrained"]
    assert run(tmp_path, *pretrained, "--keep-checkpoint") == 0
    heads_run = folder_of(tmp_path, "resnet14", "heads")
    saved = torch.load(heads_run / "student.pt", weights_only=True)
    record = read(folder_of(tmp_path, method="mhkd") / "result.json")
    assert record["teacher_heads_sha256"] == mhkd_runs.sha256_of(heads_run / "student.pt")
    teacher = weights_of(folder_of(tmp_path, "resnet14", "ce"))
    assert all(torch.equal(saved["model"][name], teacher[name]) for name in teacher)
    # The checkpoint after two epochs holds the same heads, batch norm's statistics included.
    state = torch.load(folder_of(tmp_path, method="mhkd") / "checkpoint.pt", weights_only=True)
    prefix = "methods.0.teacher_heads."
    used = {n.removeprefix(prefix): t for n, t in state["distiller"].items() if prefix in n}
    assert used.keys() == saved["heads"].keys()
    assert all(torch.equal(used[name], saved["heads"][name]) for name in used)
    before = (heads_run / "student.pt").stat().st_mtime_ns
    assert run(tmp_path, *pretrained, "--seed", "1") == 0
    assert (heads_run / "student.pt").stat().st_mtime_ns == before
    assert run(tmp_path, *pretrained, "--teacher-heads-epochs", "2", "--head-stride", "1") == 0
    assert len(list(tmp_path.glob("*-heads-*"))) == 2
    assert len(log_of(next(tmp_path.glob("*-heads-*head_stride=1*")))) == 2


def test_the_last_of_interrupted_runs_with_pretrained_heads_is_that_of_one_run(tmp_path):
    pretrained = [*MHKD, "--teacher-heads", "pretrained", "--seed", "4"]
    assert run(tmp_path / "whole", *pretrained) == 0
    half(tmp_path / "half", *pretrained)
    assert run(tmp_path / "half", *pretrained) == 0
    a, b = (outcome(folder_of(tmp_path / name, method="mhkd")) for name in ("whole", "half"))
    assert a == b


def test_heads_that_learn_from_the_teachers_logits_need_no_heads_on_the_teacher():
    distiller, batch = make("mhkd", options={"teacher_heads": "logits"})
    assert distiller.units["teacher"] == {} and not hasattr(distiller.methods[0], "teacher_heads")
    terms, _ = distiller(*batch)
    seen = seen_by(distiller, batch)
    logits = distiller.methods[0].student_heads(seen.student)
    wanted = mhkd.mhkd_loss(logits, [seen.teacher.logits] * 4, batch[1])
    torch.testing.assert_close(terms["mhkd"], wanted)


# Feature mimicking


def test_lsh_bits_are_set_for_half_of_the_training_set_and_chunks_change_nothing(monkeypatch):
    distiller, _ = make("lsh")
    method, data = distiller.methods[0], make_data()
    with torch.no_grad():
        features = distiller.teacher(data.center_crop(data.train)).penultimate
    lower_median = (features @ method.weight.T).sort(dim=0).values[(len(features) - 1) // 2]
    assert method.weight.shape == (32 * 128, 128)
    std = distiller.teacher.model.fc.weight.std().item()
    assert method.weight.std().item() == pytest.approx(std, rel=0.01)
    images = data.center_crop(data.train).split(20)
    outputs = [distiller.observe(distiller.teacher, some) for some in images]
    for values in (2**24, 64 * 100):
        monkeypatch.setattr(method, "HASH_VALUES", values)
        method.prepare(lambda: iter(outputs))
        torch.testing.assert_close(method.bias, -lower_median)
        method.bias.zero_()


@pytest.mark.parametrize("samples", ["correct", "all"])
def test_lsh_counts_the_samples_that_are_asked_for(samples):
    same_width = ("resnet8", "wrn_16_1")
    distiller, batch = make("lsh", *same_width, options={"lsh_samples": samples})
    seen, method = seen_by(distiller, batch), distiller.methods[0]
    right = seen.teacher.logits.argmax(dim=1) == batch[1]
    assert 0 < right.sum() < len(right)
    rows = [i for i in range(len(right)) if samples == "all" or right[i]]
    f_s, f_t = seen.student.penultimate[rows], seen.teacher.penultimate[rows]
    lsh = mhkd_baselines.lsh_loss(f_s, f_t, method.weight, method.bias)
    torch.testing.assert_close(method.own_terms(seen)["lsh"], 6 * (F.mse_loss(f_s, f_t) + lsh))
    plain = distiller.plain_state()
    assert distiller.student.model.state_dict().keys() == plain.keys()  # nothing was widened


@pytest.mark.parametrize("student", ["resnet8", "vgg8", "mobilenetv2", "shufflenetv2"])
def test_lsh_widens_the_student_to_the_teachers_width_and_folds_it_back_exactly(student):
    distiller, (images, *_) = make("lsh", "wrn_16_2", student, batch_size=2)
    usual = make("kd", "wrn_16_2", student)[0].student.model.state_dict()
    state = distiller.student.model.state_dict()  # as with any method but for the classifier
    assert all(torch.equal(state[name], usual[name]) for name in list(usual)[:-2])
    assert distiller.student.width == distiller.student(images).penultimate.shape[1] == 128
    widened, x = distiller.double().student.model.eval(), images.double()
    wanted = widened(x)
    fresh = mhkd.build_model(student, K).double().eval()
    fresh.load_state_dict(distiller.plain_state())
    torch.testing.assert_close(fresh(x), wanted, rtol=1e-10, atol=1e-10)
    assert torch.equal(widened(x), wanted)  # training could go on


# Dual heads


def gradients(distiller, term):
    settings = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(term, trained(distiller), **settings)


@pytest.mark.parametrize("method", ["dhkd", "crd+dhkd"])
def test_dhkd_takes_off_what_points_against_the_cross_entropys_gradient(method):
    distiller, (images, *rest) = make(method)
    distiller.double().teacher.double()
    disagreed = []
    n = len(list(distiller.student.parameters()))
    for sign in (1, -1):  # with one of the two signs the gradients disagree
        torch.manual_seed(5)
        terms, _ = distiller(images.double(), *rest)
        terms["dhkd"] = sign * terms["dhkd"]
        g1 = gradients(distiller, sum(terms.values()) - terms["dhkd"])
        g2 = gradients(distiller, terms["dhkd"])
        dot, square = (sum((a * b).sum() for a, b in zip(g1[:n], g)) for g in (g2, g1))
        disagreed.append(bool(dot < 0))
        against = [dot.clamp(max=0) / square] * n + [0.0] * (len(g1) - n)
        distiller.backward(terms)
        for p, a, b, share in zip(trained(distiller), g1, g2, against, strict=True):
            torch.testing.assert_close(p.grad, a + b - share * a, rtol=1e-8, atol=1e-10)
    assert sorted(disagreed) == [False, True]


def test_dhkd_without_alignment_and_with_a_linear_head_is_the_plain_sum():
    distiller, batch = make("dhkd", options={"dhkd_align": False, "dhkd_head": "linear"})
    assert [type(layer) for layer in distiller.methods[0].head] == [nn.Linear]
    terms, _ = distiller(*batch)
    expected = gradients(distiller, sum(terms.values()))
    distiller.backward(terms)
    torch.testing.assert_close([p.grad for p in trained(distiller)], [*expected])


# Precision


@pytest.mark.parametrize("method", ["mhkd", "crd"])
def test_in_bfloat16_networks_and_heads_compute_in_it_and_losses_and_weights_in_float32(method):
    (distiller, batch), (exact, _) = make(method, precision="bfloat16"), make(method)
    exact.load_state_dict(distiller.state_dict())
    dtypes, modules = {}, [*distiller.modules(), *distiller.teacher.modules()]
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
    for module in convolutions:
        module.register_forward_hook(lambda m, a, y: dtypes.update({m: y.dtype}))
    torch.manual_seed(5)
    expected, _ = exact(*batch)
    torch.manual_seed(5)  # the same negatives
    terms, _ = distiller(*batch)
    assert dtypes == dict.fromkeys(convolutions, torch.bfloat16)
    distiller.backward(terms)
    assert all(term.dtype == torch.float32 for term in terms.values())
    assert {t.dtype for p in trained(distiller) for t in (p, p.grad)} == {torch.float32}
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=0.05, abs=0.01), name
        assert terms[name].item() != value.item()


# The command line, and the file alone


def test_help_has_its_groups_and_the_options_of_the_chosen_method_alone(capsys):
    texts = []
    for chosen in ([], ["--method", "crd"], ["--method=crd+mhkd"]):
        with pytest.raises(SystemExit):
            mhkd.main(["--help", *chosen])
        texts.append(capsys.readouterr().out)
    usual, of_crd, _ = texts
    assert all(f"\n{g}:\n" in usual for g in "networks data method training runtime".split())
    flags = {f"--{name.replace('_', '-')}" for name in mhkd.Config.__dataclass_fields__}
    flags = {*flags, "--no-flip", "--head-width"} - {"--options"}
    assert all(re.search(rf"\n  (--\S+, )?{flag}[ ,\n]", usual) for flag in flags)
    assert [("--negatives" in t, "--head-width" in t) for t in texts] == [(0, 1), (1, 0), (1, 1)]
    assert "(default: 16384)" in of_crd


def test_beside_the_files_for_training_it_trains_and_names_the_file_of_other_methods(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    for name in ("code", "config", "data", "record", "runs", "teacher"):
        shutil.copy(SCRIPT.with_name(f"mhkd_{name}.py"), tmp_path)
    alone = ["mhkd.py", *MHKD, "--epochs", "1", "--method"]
    done = python(*alone, "mhkd", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = [read(path) for path in tmp_path.glob("runs/*/result.json")]
    assert {result["config"]["method"] for result in results} == {"ce", "mhkd"}
    assert results[0]["environments"][0]["commit"] is None  # a copy is of no commit
    done = python(*alone, "crd+mhkd", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "no method 'crd'" in done.stderr and "mhkd_baselines.py" in done.stderr


def test_run_as_a_script_there_is_one_copy_of_mhkd_in_the_process(tmp_path):
    look = "print('one', m['mhkd_baselines'].mhkd is m['__main__'] and 'copy')"
    code = f"import atexit, sys; m = sys.modules; atexit.register(lambda: {look})"
    (tmp_path / "sitecustomize.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = script("--help", "--method", "crd", env=environment)
    assert "one copy" in done.stdout and not done.stderr


# Whole runs

RUN = "--student resnet8 --dataset digits --subset 300 --batch-size 25 --device cpu".split()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    assert run(out, *RUN, "--student", "wrn_16_1", "--method", "ce", "--epochs", "2") == 0
    return ["--teacher", "wrn_16_1", "--teacher-weights", next(out.glob("*/student.pt"))]


@pytest.mark.parametrize("method, options", [
    ("crd+mhkd", ["--negatives", "100", "--head-width", "8"]),
    ("lsh", []),
    ("fitnet+cc+rkd+dhkd", []),
])  # fmt: skip
def test_every_method_learns_goes_on_where_it_stopped_and_leaves_a_plain_student(
    method, options, teacher, tmp_path, capsys
):
    arguments = [*RUN, *teacher, "--method", method, *options, "--epochs", "4"]
    half(tmp_path / "stopped", *arguments)
    for folder in ("stopped", "whole"):
        assert run(tmp_path / folder, *arguments) == 0
    assert "continues after epoch 1 of 4" in capsys.readouterr().out
    stopped, whole = (next((tmp_path / name).iterdir()) for name in ("stopped", "whole"))
    assert outcome(stopped) == outcome(whole)
    mhkd.build_model("resnet8", 10).load_state_dict(weights_of(whole))  # strictly
    first, *_, last = log_of(whole)
    assert last["loss"] < first["loss"] and last["train_accuracy"] > first["train_accuracy"]


def _train_as_one_of_two(environment):
    """Two steps, as one of two processes, which must agree in all that they keep."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with mhkd.runtime(configure("kd", batch_size=32)):
        for method in ("crd+mhkd", "crd+dhkd"):
            distiller, _ = make(method, batch_size=32)
            crd, parameters, seen = distiller.methods[0].crd, trained(distiller), []
            optimizer = torch.optim.SGD(parameters, lr=0.1)
            # Other negatives and other dropout in each, but the same batches.
            torch.manual_seed(mhkd.seed_of(0, 1, mhkd.rank()))
            assert len(mhkd.gather_from_processes(torch.rand(4)).unique()) == 8
            for images, labels, indices in mhkd.epoch_batches(make_data(), distiller.config, 1):
                before = crd.student_bank
                terms, _ = distiller(images, labels, indices)
                distiller.backward(terms)
                mhkd.average_gradients(parameters)
                optimizer.step()
                moved = (crd.student_bank != before).any(dim=1)
                assert moved.sum() == 32 and moved[indices].all() and len(indices) == 16
                seen.append(indices)
            for name, tensor in [*distiller.methods.named_buffers(), *distiller.named_parameters()]:
                if "running" not in name and "num_batches" not in name:  # those are of each
                    mine = tensor.detach().flatten()[None]
                    mine, other = mhkd.gather_from_processes(mine).unbind()
                    assert torch.equal(mine, other), name
            assert len(mhkd.gather_from_processes(torch.cat(seen)).unique()) == 64


def test_two_processes_keep_the_same_banks_and_take_the_same_steps():
    processes = [fork(_train_as_one_of_two, environment) for environment in environments(2)]
    assert [end_of(process) for process in processes] == [0, 0]
