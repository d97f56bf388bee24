"""What used to give a wrong result without a message: gradients, identity of runs, teachers."""

import ast
import copy
import importlib
import json
import os
import shutil
import warnings

import numpy
import pytest
import torch
from conftest import ALONE, MHKD, PAIR, ROOT, folder_of, python, read, run, user_errors, weights_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import mhkd
import mhkd_baselines
import mhkd_code
import mhkd_custom
import mhkd_record
import mhkd_runs
import mhkd_teacher

pytest.importorskip("sklearn")

NETWORK = """
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

class Net(nn.Module):
    def __init__(self, K):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.c, self.fc = nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, K)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = torch.relu(CALL)
        x = torch.relu(self.c(x))
        return self.fc(x.mean(dim=(2, 3)))

def build(num_classes):
    return Net(num_classes)
"""


def network_file(tmp_path, call="self.b(x)", name="net.py"):
    (tmp_path / name).write_text(NETWORK.replace("CALL", call))
    return f"{tmp_path / name}:build"


def student(file, *options):
    student = [
        "--student",
        file,
        "--student-units",
        "a,b,c",
        "--teacher-units",
        "layer1,layer2,layer3",
    ]
    return [*MHKD, *student, *options]


# 1. Features without a gradient


@pytest.mark.parametrize("call", [
    "checkpoint(self.b, x, use_reentrant=True)", "torch.no_grad()(self.b)(x)",
    "checkpoint(lambda z: self.b(z), x, use_reentrant=True)",
])  # fmt: skip
@pytest.mark.parametrize("method", ["mhkd", "fitnet"])
def test_a_feature_without_gradient_is_an_error_that_names_the_submodule(
    call, method, tmp_path, failing
):
    options = student(network_file(tmp_path, call), "--method", method)
    if method == "fitnet":
        options = [o for o in options if o not in ("--head-width", "8")]
    said = failing(tmp_path / "out", *options)
    assert "'b'" in said and "has no gradient" in said and "use_reentrant=False" in said


def test_checkpointing_that_is_not_reentrant_trains_the_same_network(tmp_path):
    torch.manual_seed(0)
    results = []
    plain = mhkd.build_model("resnet8", 5)
    for wrap in (False, True):
        network = copy.deepcopy(plain)
        if wrap:
            unit = network.layer2
            forward = unit.forward
            unit.forward = lambda x, f=forward: checkpoint(f, x, use_reentrant=False)
        multihead = mhkd.MultiHead(network, ["layer1", "layer2"], 5, width=4).train()
        torch.manual_seed(1)
        logits = multihead(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)))
        logits[0].sum().backward()
        results.append([p.grad for p in network.parameters() if p.grad is not None])
    torch.testing.assert_close(*results)


def test_a_detached_penultimate_feature_is_an_error_where_a_method_uses_it():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(self.conv(x).mean(dim=(2, 3)).detach())

    network = mhkd.MultiHead(Detached(), [], 5).train()
    network(torch.randn(2, 3, 8, 8))  # only the classifier is trained: allowed
    with pytest.raises(mhkd.UsageError, match="input of 'fc' has no gradient"):
        network(torch.randn(2, 3, 8, 8), penultimate=True)
    network.eval()(torch.randn(2, 3, 8, 8), penultimate=True)


# 2. Results of other code or weights


def test_a_run_whose_network_file_has_changed_is_refused_and_overwrite_keeps_the_old_one(
    tmp_path, failing
):
    file, out = network_file(tmp_path), tmp_path / "out"
    options = student(file)
    assert run(out, *options) == 0
    (folder,) = out.glob("*-mhkd-*")
    before = weights_of(folder)
    source = (tmp_path / "net.py").read_text()
    (tmp_path / "net.py").write_text("# a comment\n" + source)
    assert run(out, *options) == 0  # a comment changes nothing
    (tmp_path / "net.py").write_text(
        source.replace("torch.relu(self.a(x))", "torch.tanh(self.a(x))")
    )
    said = failing(out, *options)
    assert "another student code" in said and "--overwrite" in said
    assert run(out, *options, "--overwrite") == 0
    assert any(not torch.equal(t, before[n]) for n, t in weights_of(folder).items())
    (aside,) = (out / "replaced").iterdir()
    old = weights_of(aside)
    assert all(torch.equal(t, before[n]) for n, t in old.items())


@pytest.mark.parametrize("moment", ["while the teacher is trained", "in the last epoch"])
def test_a_network_file_that_is_edited_during_the_run_is_refused(
    moment, tmp_path, failing, monkeypatch
):
    options, out = [*student(network_file(tmp_path)), "--epochs", "1"], tmp_path / "out"
    source = (tmp_path / "net.py").read_text()
    module, name = (mhkd_teacher, "find_teacher"), (mhkd_record, "line_of")
    (module, name) = module if moment.startswith("while") else name
    original = getattr(module, name)

    def edit(*arguments):
        if arguments[0].method == "mhkd":
            (tmp_path / "net.py").write_text(source.replace("relu(self.c", "tanh(self.c"))
        return original(*arguments)

    monkeypatch.setattr(module, name, edit)
    assert "was changed during the run: restore it" in failing(out, *options)
    assert not [*out.glob("*-mhkd-*/result.json")]
    monkeypatch.undo()
    (tmp_path / "net.py").write_text(source)
    assert run(out, *options) == 0
    (folder,) = out.glob("*-mhkd-*")
    entry = json.loads((folder / "log.jsonl").read_text())
    assert read(folder / "result.json")["accuracy"] == entry["test_accuracy"]


def test_the_hash_of_a_users_method_is_that_of_the_code_in_memory(tmp_path, monkeypatch):
    (tmp_path / "losses.py").write_text("def square(z):\n    return z.square().mean()\n")
    file = tmp_path / "method_in_memory.py"
    file.write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("method_in_memory")
    config = mhkd.Config("vgg8", "vgg8")

    def sha256():
        monkeypatch.setitem(mhkd.METHODS, "mine", module.Mine)
        return mhkd_code.code_hashes(config.replace(method="mine"))["method_code_sha256"]

    before = sha256()
    file.write_text(METHOD.replace("square(", "2 * square("))
    assert sha256() == before
    importlib.reload(module)
    assert sha256() != before
    file.write_text(METHOD.replace("square(", "3 * square("))
    mhkd_code.source_with.cache_clear()  # as if train() had not been called before
    edited = sha256()
    importlib.reload(module)
    assert len({before, edited, sha256()}) == 3
    for factor in (5, 7):  # typed into an interpreter that has run the file
        exec(METHOD.replace("square(", f"{factor} * square("), vars(module))
        monkeypatch.setitem(mhkd.METHODS, str(factor), module.Mine)
    hashes = [mhkd_code.code_hashes(config.replace(method=m)) for m in ("5", "7")]
    assert hashes[0]["method_code_sha256"] != hashes[1]["method_code_sha256"]


def test_initial_weights_that_are_replaced_while_the_teacher_is_trained_are_refused(
    tmp_path, failing, monkeypatch
):
    weights, original = tmp_path / "w.pth", mhkd_teacher.find_teacher
    torch.save(mhkd.build_model("resnet8", 10).state_dict(), weights)

    def replace(*arguments):
        torch.save(mhkd.build_model("resnet8", 10).state_dict(), weights)
        return original(*arguments)

    monkeypatch.setattr(mhkd_teacher, "find_teacher", replace)
    options = [*ALONE, "--epochs", "1", "--student-init", f"file:{weights}"]
    assert "the file of --student-init was changed during" in failing(tmp_path / "o", *options)


def test_replaced_initial_weights_and_an_edited_teacher_are_other_runs(tmp_path, failing):
    weights, out = tmp_path / "w.pth", tmp_path / "out"
    torch.save(mhkd.build_model("resnet8", 10).state_dict(), weights)
    options = [*ALONE, "--student-init", f"file:{weights}"]
    assert run(out, *options) == 0
    torch.save(mhkd.build_model("resnet8", 10).state_dict(), weights)
    assert "another student init" in failing(out, *options)
    file = network_file(tmp_path)
    taught = [*PAIR, "--method", "kd", "--teacher", file]
    assert run(out, *taught) == 0
    path = tmp_path / "net.py"
    path.write_text(path.read_text().replace("torch.relu(self.c(x))", "torch.tanh(self.c(x))"))
    assert "code" in failing(out, *taught)


@pytest.mark.parametrize("edit, runs_again", [
    (("kl = kl / counted.sum() * tau**2", "kl = 7 * kl / counted.sum() * tau**2"), False),
    (("# Equation 1 for each head", "# another comment"), True),
    (("needs the input of a linear", "takes the input of a linear"), True),
])  # fmt: skip
def test_an_edited_loss_is_noticed_and_an_edited_comment_or_message_is_not(
    edit, runs_again, tmp_path
):
    for path in ROOT.glob("mhkd*.py"):
        shutil.copy(path, tmp_path)
    script, options = tmp_path / "mhkd.py", [*MHKD, "--epochs", "1", "--backend", "reference"]
    assert python(script, *options, "--out", tmp_path / "runs").returncode == 0
    text = script.read_text()
    assert edit[0].strip('"') in text
    script.write_text(text.replace(edit[0].strip('"'), edit[1].strip('"')))
    done = python(script, *options, "--out", tmp_path / "runs")
    assert (done.returncode == 0) == runs_again
    assert runs_again or "another method code" in done.stderr


def test_the_hash_covers_crops_and_augmentation_and_not_the_training_loop_and_its_messages():
    config = mhkd.Config("vgg8", "vgg8")
    methods = mhkd.find_methods(config.method).values()
    parts = mhkd_code.parts_of_code([*methods, mhkd.Distiller, mhkd.Data, mhkd.epoch_batches])
    wanted = "mhkd.augment mhkd.draw_epoch mhkd._reference_loss mhkd.AuxHead mhkd.watch "
    wanted += "mhkd_images.apply_policy mhkd_images.resized_crop mhkd_images.draw_boxes"
    assert {*wanted.split()} <= parts.keys()
    others = "train finish line_of Best learning_rate progress_bar runtime load_data"
    assert {name.rpartition(".")[2] for name in parts}.isdisjoint(others.split())


def test_the_hash_of_a_method_is_the_same_in_every_process_and_differs_between_methods():
    code = "import mhkd, mhkd_code\n"
    code += "print(mhkd_code.code_hashes(mhkd.Config('vgg8', 'vgg8'))['method_code_sha256'])"
    one, other = (python("-c", code, cwd=ROOT).stdout.strip() for _ in range(2))
    hashes = {
        m: mhkd_code.code_hashes(mhkd.Config("vgg8", "vgg8", method=m))["method_code_sha256"]
        for m in ("kd", "mhkd", "crd", "crd+mhkd")
    }
    assert one == other == hashes["mhkd"] and len({*hashes.values()}) == 4


@pytest.mark.parametrize("method", [
    mhkd_baselines.FitNet, mhkd_baselines.CorrelationCongruence,
    mhkd_baselines.RelationalDistillation, mhkd_baselines.ContrastiveDistillation,
])  # fmt: skip
def test_the_hash_of_a_method_covers_its_base_classes(method):
    parts = mhkd_code.parts_of_code([method])
    wanted = "mhkd_baselines.BenchmarkMethod mhkd.kd_loss mhkd._reference_loss"
    assert {*wanted.split()} <= parts.keys()


METHOD = """
import mhkd_baselines
from losses import square

class Mine(mhkd_baselines.BenchmarkMethod):
    def own_terms(self, batch):
        return {"mine": square(batch.student.logits)}
"""


def test_the_hash_of_a_users_method_covers_its_base_class_and_what_it_imports(
    tmp_path, monkeypatch
):
    (tmp_path / "mine.py").write_text(METHOD)
    losses = tmp_path / "losses.py"
    losses.write_text("def square(z):\n    return z.square().mean()\n")
    monkeypatch.syspath_prepend(tmp_path)
    Mine = importlib.import_module("mine").Mine
    monkeypatch.setitem(mhkd.METHODS, "mine", Mine)
    assert "mhkd_baselines.BenchmarkMethod" in mhkd_code.parts_of_code([Mine])
    config = mhkd.Config("vgg8", "vgg8", method="mine")
    before = mhkd_code.code_hashes(config)["method_code_sha256"]
    losses.write_text("# a comment\n" + losses.read_text())
    assert mhkd_code.code_hashes(config)["method_code_sha256"] == before
    losses.write_text(losses.read_text().replace("square()", "abs()"))
    assert mhkd_code.code_hashes(config)["method_code_sha256"] != before


USERS = """
from torch import nn
import mhkd
criterion = nn.MSELoss()

def made(weight):
    class Made(mhkd.Method):
        def own_terms(self, batch):
            return {"made": weight * criterion(batch.student.logits, batch.teacher.logits)}
    return Made

def other():
    class Made(mhkd.Method):
        def own_terms(self, batch):
            return {"made": 0 * batch.student.logits.sum()}
    return Made
"""


def test_the_hash_of_a_users_method_covers_closures_and_objects_of_its_module(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)

    def hashes(name, text=USERS):
        (tmp_path / f"{name}.py").write_text(text)
        module = importlib.import_module(name)
        kinds = module.made(0.5), module.made(1.0), module.other()
        parts = [mhkd_code.parts_of_code([kind]).values() for kind in kinds]
        return [json.dumps(sorted(values)) for values in parts]

    first, *others = hashes("users_a")
    assert len({first, *others}) == 3 and hashes("users_b", f"# a comment\n{USERS}")[0] == first
    assert hashes("users_c", USERS.replace("MSELoss()", "L1Loss()"))[0] != first
    more = USERS + "\nmhkd.METHODS_OF_MINE = {}\ndevice = nn.Linear(1, 1)\n"
    assert hashes("users_d", more.replace("users_d", ""))[0] == first


def test_the_hash_of_a_method_without_source_covers_its_bytecode():
    lines = ["import mhkd, mhkd_code", "for text in ('0.5', '1.0', '1.0'):"]
    lines += ["  text += ' if batch in {1, 2, (3, 4), (5, 6)} else 0'"]
    lines += ["  exec('class Mine(mhkd.Method):\\n  def own_terms(self, batch): return ' + text)"]
    lines += ["  print(mhkd_code.code_sha256([Mine]))"]
    runs = [python("-", input="\n".join(lines), cwd=ROOT).stdout.split() for _ in range(2)]
    first, second, third = runs[0]
    assert first != second == third and runs[0] == runs[1]  # sets have another order


SETTINGS = """
import argparse
import mhkd
parser = argparse.ArgumentParser()
parser.add_argument("--weight", type=float)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args(ARGUMENTS)

class Dict(dict):
    def __getattr__(self, name):
        return self[name]

    def __missing__(self, name):
        return type(self)()

config = Dict(weight=2.0)
STEP, state, count = 0, argparse.Namespace(step=0), {"step": 0}

class Mine(mhkd.Method):
    factor, calls = 0.5, 0

    def own_terms(self, batch):
        global STEP
        STEP += 1
        state.step += 1
        count["step"] += 1
        type(self).calls += 1
        return {"mine": self.factor * args.weight * config.weight * min(1, STEP / state.step)}
"""


def test_the_hash_of_a_method_covers_values_of_classes_and_objects_but_no_counters(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)

    def module(name, arguments):
        (tmp_path / f"{name}.py").write_text(SETTINGS.replace("ARGUMENTS", arguments))
        return importlib.import_module(name)

    def sha256(method):
        return mhkd_code.code_sha256([method])

    mine = module("settings_a", "['--weight', '1']")
    first = sha256(mine.Mine)
    mine.STEP, mine.state.step, mine.args.seed = 7, 8, 9
    mine.count["step"], mine.Mine.calls = 10, 11
    assert sha256(mine.Mine) == first
    changes = [(mine.Mine, "factor", 0.25), (mine.args, "weight", 2.0)]
    for place, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            assert sha256(mine.Mine) != first
    mine.config["weight"] = 3.0
    assert sha256(mine.Mine) != first
    variants = [type("Variant", (mine.Mine,), {"factor": factor}) for factor in (1, 2, 2)]
    for variant in variants:
        variant.__module__ = "settings_a"
    one, two, again = map(sha256, variants)
    assert one != two == again


def test_the_hash_of_a_method_without_source_covers_the_values_and_functions_that_it_uses():
    lines = ["import mhkd, mhkd_code", "make = lambda n: lambda x: x**n", "a, b = make(2), make(3)"]
    lines += ["def loss(x): return WEIGHT * a(b(x)).mean()", "class Mine(mhkd.Method):"]
    lines += ["  calls = 0", "  def own_terms(self, batch):", "    type(self).calls += 1"]
    lines += ["    return loss(batch)", "for WEIGHT, mean in ((1.0, 1), (2.0, 2), (1.0, 3)):"]
    lines += ["  print(mhkd_code.code_sha256([Mine]))", "  Mine.calls += 1"]
    text, hashes = "\n".join(lines), []
    for seed in ("0", "1", "2"):
        here = {"input": text, "cwd": ROOT, "env": os.environ | {"PYTHONHASHSEED": seed}}
        hashes.append(python("-", **here).stdout.split())
    assert hashes[0] == hashes[1] == hashes[2]
    first, second, third = hashes[0]
    assert first == third != second


def test_empty_fields_of_a_syntax_tree_as_newer_versions_of_python_have_do_not_count():
    (tree,) = ast.parse("def f(x):\n    return x").body
    tree._fields = tuple(name for name in tree._fields if name != "type_params")
    before = [*mhkd_code.computation_of(tree, True)][1:]
    tree._fields, tree.type_params, tree.new = (*tree._fields, "type_params", "new"), [], None
    assert [*mhkd_code.computation_of(tree, True)][1:] == before


def test_random_weights_of_another_kind_of_processor_or_without_a_seed_are_no_other_run(tmp_path):
    file, path = network_file(tmp_path), tmp_path / "net.py"
    draw = "net = Net(num_classes)\n    net.a.bias.data.normal_(generator=G)\n    return net"
    text = path.read_text().replace("return Net(num_classes)", draw)
    path.write_text(text + "\nG = torch.Generator()\nG.seed()\n")
    command = [ROOT / "mhkd.py", *student(file), "--epochs", "1", "--out", tmp_path / "out"]
    for capability in ("default", None):
        given = {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        done = python(*command, env=os.environ | given)
        assert done.returncode == 0, done.stderr
    assert "already finished" in done.stdout


def test_a_finished_run_is_not_that_of_other_weights_or_units(tmp_path, failing, monkeypatch):
    file, out = network_file(tmp_path), tmp_path / "out"
    path, weights = tmp_path / "net.py", tmp_path / "w.pt"
    torch.save(torch.ones(8), weights)
    load = f"net = Net(num_classes)\n    net.a.bias.data = torch.load({str(weights)!r})\n"
    path.write_text(path.read_text().replace("return Net(num_classes)", load + "    return net"))
    assert run(out, *student(file)) == 0
    assert run(out, *student(file)) == 0
    other = (("b", "a", "c"), dict.fromkeys("abc", "channels_first"))
    with monkeypatch.context() as patch:
        patch.setattr(mhkd_custom, "find_units", lambda *_: other)
        assert "units in use was" in failing(out, *student(file))
    torch.save(torch.zeros(8), weights)
    assert "another initial state: run again with --overwrite" in failing(out, *student(file))
    assert run(out, *student(file), "--overwrite") == 0
    assert len([*(out / "replaced").iterdir()]) == 1


# 3. Metadata of the teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    assert run(out, *PAIR, "--student", "resnet14", "--method", "ce") == 0
    return folder_of(out, "resnet14", "ce") / "student.pt"


@pytest.mark.parametrize("change, parts", [
    ({"classes": [*"1234567890"]}, "another class order"),
    ({"classes": [*"abcdefghij"]}, "other classes (0, 1, 2"),
    ({"image_size": 32}, "32 pixels: use --image-size 32"),
])  # fmt: skip
def test_a_teacher_of_other_classes_or_another_size_is_refused(
    change, parts, teacher, tmp_path, failing
):
    content = torch.load(teacher, weights_only=True) | change
    torch.save(content, tmp_path / "teacher.pt")
    said = failing(tmp_path / "out", *MHKD, "--teacher-weights", tmp_path / "teacher.pt")
    assert parts in said


def test_a_teachers_file_without_classes_or_with_a_tuple_of_them_states_the_normalisation(
    teacher, tmp_path, capsys
):
    content = torch.load(teacher, weights_only=True)
    known = {name: content[name] for name in ("model", "mean", "std")}
    torch.save(known | {"mean": [0.1, 0.2, 0.3]}, tmp_path / "bare.pt")
    torch.save(content | {"classes": (*content["classes"],)}, tmp_path / "tuple.pt")
    torch.save(content | {"classes": 10}, tmp_path / "number.pt")
    torch.save(content | {"classes": 10, "image_size": 32}, tmp_path / "size.pt")
    with pytest.raises(mhkd.UsageError, match="32 pixels"):
        options = {"teacher_weights": tmp_path / "size.pt", "out": tmp_path, "dataset": "digits"}
        mhkd.train(mhkd.Config("resnet14", "resnet8", method="kd", **options))
    for name in ("bare", "tuple", "number"):
        options = [*PAIR, "--method", "kd", "--epochs", "1"]
        options += ["--teacher-weights", tmp_path / f"{name}.pt"]
        assert run(tmp_path / name, *options) == 0
        assert "has no normalisation" not in capsys.readouterr().out
    result = read(folder_of(tmp_path / "bare", method="kd") / "result.json")
    assert result["normalisation"]["mean"] == [0.1, 0.2, 0.3]


def test_weights_of_another_network_with_the_same_entries_give_a_note(teacher, tmp_path, capsys):
    content = torch.load(teacher, weights_only=True) | {"name": "/elsewhere/net.py:relu"}
    torch.save(content, tmp_path / "other.pt")
    options = [*PAIR, "--method", "kd", "--epochs", "1", "--teacher-weights", tmp_path / "other.pt"]
    assert run(tmp_path, *options) == 0
    assert "is of /elsewhere/net.py:relu, and its weights are" in capsys.readouterr().out
    check = mhkd.sibling("mhkd_teacher").check_teacher
    data = mhkd.load_data(mhkd.Config(student="resnet8", method="ce", dataset="digits"))
    check("net.py:relu", "t.pt", content, data)  # the file has moved
    assert not capsys.readouterr().out


def test_a_teacher_that_knows_only_the_largest_class_gives_a_note(teacher, tmp_path, capsys):
    content = torch.load(teacher, weights_only=True)
    for tensor in content["model"].values():
        tensor.zero_()
    torch.save(content, tmp_path / "zero.pt")
    config = mhkd.Config(
        "resnet14", "resnet8", method="kd", dataset="digits", device="cpu",
        teacher_weights=str(tmp_path / "zero.pt"), out=str(tmp_path),
    )  # fmt: skip
    data = mhkd.load_data(config)
    zeros, others = ((data.labels[data.test] == 0) == of for of in (True, False))
    data.test = torch.cat([data.test[zeros], data.test[others][:20]])  # most are of class 0
    mhkd_teacher.find_teacher(config, data)
    assert "not above the 65.52 % of the largest class" in capsys.readouterr().out


def test_a_teacher_that_may_have_seen_the_validation_images_gives_a_note(teacher, tmp_path, capsys):
    options = [*PAIR, "--method", "kd", "--teacher-weights", teacher]
    assert run(tmp_path, *options) == 0
    assert "validation" not in capsys.readouterr().out
    assert run(tmp_path, *options, "--val-fraction", "0.3") == 0
    assert "was trained with --val-fraction 0, so it may have seen" in capsys.readouterr().out
    other = "--val-fraction 0 on another selection of images, so it may have seen"
    assert run(tmp_path, *options, "--val-fraction", "0.3", "--subset", "120") == 0
    assert other in capsys.readouterr().out
    assert run(tmp_path, *options, "--subset", "120") == 0
    assert "validation" not in capsys.readouterr().out


def test_a_teacher_near_chance_or_below_the_student_alone_gives_a_note(teacher, tmp_path, capsys):
    content = torch.load(teacher, weights_only=True)
    for tensor in content["model"].values():
        tensor.zero_()
    torch.save(content, tmp_path / "zero.pt")
    options = [*PAIR, "--method", "kd", "--teacher-weights", tmp_path / "zero.pt"]
    assert run(tmp_path, *options) == 0
    assert "near chance" in capsys.readouterr().out
    assert run(tmp_path, *ALONE) == 0
    path = folder_of(tmp_path, "resnet8", "ce") / "result.json"
    mhkd_runs.write_json(path, mhkd_runs.read_json(path) | {"accuracy": 97.5})
    assert run(tmp_path, *options, "--seed", "1") == 0
    assert "student alone reached" not in capsys.readouterr().out  # of another seed
    assert run(tmp_path, *options) == 0
    assert "student alone reached 97.50 %" in capsys.readouterr().out


# 4, 6. Data


def test_mean_and_std_are_those_of_both_networks_and_an_assumed_one_is_logged(
    teacher, tmp_path, capsys
):
    content = torch.load(teacher, weights_only=True)
    torch.save(content["model"], tmp_path / "bare.pt")
    options = [*PAIR, "--method", "kd", "--epochs", "1", "--teacher-weights", tmp_path / "bare.pt"]
    assert run(tmp_path, *options) == 0
    assert "has no normalisation" in capsys.readouterr().out
    torch.save(content | {"mean": [123.7, 116.3, 103.5]}, tmp_path / "of 255.pt")
    assert run(tmp_path, *options[:-1], tmp_path / "of 255.pt") == 1
    assert "of 255.pt' has a wrong mean or std (mean [123.7" in capsys.readouterr().err
    torch.save(content | {"mean": torch.full((3,), 0.25)}, tmp_path / "tensor.pt")
    assert run(tmp_path, *options[:-1], tmp_path / "tensor.pt") == 0
    given = ["--mean", "0.1,0.2,0.3", "--std", "0.5,0.5,0.6"]
    assert run(tmp_path, *options, *given) == 0
    assert "has no normalisation" not in capsys.readouterr().out
    folder = next(tmp_path.glob("*-kd-*mean=0.1*"))
    saved = torch.load(folder / "student.pt", weights_only=True)
    assert (saved["mean"], saved["std"]) == ([0.1, 0.2, 0.3], [0.5, 0.5, 0.6])
    assert saved["resize"] == 16
    assert read(folder / "result.json")["normalisation"]["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("options, message", [
    ("--mean 0.5,0.5,0.5", "together"), ("--mean 0.5 --std 0.5", "--mean must be three numbers"),
    ("--mean 0.5,0.5,0.5 --std 0.5,0.5,0", "--std must be three numbers above 0"),
    ("--teacher-weights t.pt --teacher-lr 0.1", "leave out --teacher-lr: a teacher of"),
    ("--teacher-weights t.pt --teacher-seed 1", "leave out --teacher-seed"),
    ("--teacher-weights t.pt --teacher-init pretrained", "leave out --teacher-init"),
    ("--nesterov yes", "no option --nesterov\n"), ("--options a", "no option --options\n"),
])  # fmt: skip
def test_options_that_contradict_each_other_or_do_not_exist_are_refused(
    options, message, tmp_path, failing
):
    said = failing(tmp_path, *MHKD, *options.split())
    assert message in said and "image-size" not in said


def test_the_teachers_schedule_has_options_of_its_own():
    base = {"teacher": "resnet32x4", "student": "shufflenetv2", "lr": 0.3, "epochs": 24}
    teacher = mhkd.Config(**base).of_teacher()
    assert (teacher.lr, teacher.epochs, teacher.lr_steps) == (0.05, 24, (15, 18, 21))
    teacher = mhkd.Config(**base, teacher_epochs=12, teacher_lr=0.2, lr_steps=(12, 20)).of_teacher()
    assert (teacher.lr, teacher.epochs, teacher.lr_steps) == (0.2, 12, (6, 10))


# 7. Inspection


class ActNorm(nn.Module):
    """Sets its scale from the first batch, in any mode."""

    def __init__(self):
        super().__init__()
        self.scale, self.ready = nn.Parameter(torch.ones(1)), False

    def forward(self, x):
        if not self.ready:
            self.scale.data, self.ready = 1 / (x.std() + 1e-9).detach()[None], True
        return x * self.scale


def test_a_network_is_not_changed_by_its_inspection():
    network = nn.Sequential(
        nn.LazyConv2d(4, 3), ActNorm(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )
    multihead = mhkd.MultiHead(network, ["1"], 5, width=4, example_input=torch.randn(2, 3, 8, 8))
    assert isinstance(network[0], nn.LazyConv2d) and not network[1].ready
    assert multihead(torch.randn(2, 3, 8, 8))[0].abs().max() < 100
    assert network[0].in_channels == 3


def test_a_network_that_cannot_be_copied_is_inspected_and_restored():
    network = mhkd.build_model("resnet8", 5).train()
    network.note = torch.ones(1, requires_grad=True) * 2  # deepcopy refuses what is no leaf
    before = copy.deepcopy(network.state_dict())
    mhkd.MultiHead(network, ["layer1"], 5, width=4)
    assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())
    assert network.training and network.layer1.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_weights_of_any_dtype_are_hashed_and_stay_resizable(dtype):
    network = nn.Module()
    network.register_buffer("t", torch.ones(3, 2).to(dtype))
    network.get_extra_state = lambda: {"a": 1}
    one = mhkd_runs.sha256_of_state(network.state_dict())
    network.t.resize_(1)
    assert mhkd_runs.sha256_of_state(network.state_dict()) != one


# 8. Failures after the last epoch


def test_a_network_that_stores_tensors_of_its_graph_is_saved(tmp_path):
    file = network_file(tmp_path, "self.b(x)")
    path = tmp_path / "net.py"
    stored = "self.aux_loss = self.fc(x.mean(dim=(2, 3)))\n        return self.aux_loss"
    path.write_text(path.read_text().replace("return self.fc(x.mean(dim=(2, 3)))", stored))
    assert run(tmp_path / "out", *student(file)) == 0
    (folder,) = (tmp_path / "out").glob("*-mhkd-*")
    assert read(folder / "result.json")["epochs"] == 2


def test_the_average_of_a_network_that_cannot_be_copied_is_refused(tmp_path, failing):
    file = network_file(tmp_path)
    path = tmp_path / "net.py"
    held = "super().__init__()\n        self.held = torch.ones(1, requires_grad=True) * 2"
    path.write_text(path.read_text().replace("super().__init__()", held))
    said = failing(tmp_path / "out", *student(file), "--ema", "0.9")
    assert "--ema needs a copy of the student (" in said and "leave --ema out" in said


def test_a_buffer_that_takes_its_size_in_training_is_an_error_in_the_first_step(tmp_path, failing):
    file = network_file(tmp_path)
    path = tmp_path / "net.py"
    text = path.read_text().replace(
        "return self.fc(", "self.memory = x.detach()\n        return self.fc("
    )
    text = text.replace(
        "nn.Linear(8, K)", 'nn.Linear(8, K)\n        self.register_buffer("memory", torch.zeros(0))'
    )
    path.write_text(text)
    said = failing(tmp_path / "out", *student(file))
    assert "would not fit a newly built one" in said and "'memory'" in said
    assert not [*(tmp_path / "out").glob("*-mhkd-*/checkpoint.pt")]


COSINE = """class Cosine(nn.Linear):
    def forward(self, x):
        return 9 * nn.functional.linear(nn.functional.normalize(x), self.weight, self.bias)
"""


@pytest.mark.parametrize("method", ["ce", "lsh"])
def test_a_saved_student_that_computes_something_else_is_an_error_in_the_first_step(
    method, tmp_path, failing
):
    """A buffer that is not saved; two layers, merged into a classifier that is no plain one."""
    file = network_file(tmp_path)
    path = tmp_path / "net.py"
    if method == "ce":
        add, use = (
            ", persistent=False)",
            "x = x * self.scale[:, None, None]\n        return self.fc(",
        )
        add = 'nn.Linear(8, K)\n        self.register_buffer("scale", torch.rand(8)' + add
        text = path.read_text().replace("nn.Linear(8, K)", add).replace("return self.fc(", use)
    else:
        text = path.read_text().replace("nn.Linear(8, K)", "Cosine(8, K)")
        text = text.replace("class Net", COSINE + "\n\nclass Net")
    path.write_text(text)
    options = [*ALONE, "--student", file] if method == "ce" else [*PAIR, "--student", file]
    said = failing(tmp_path / "out", *options, "--method", method)
    assert "the saved student would not compute what the trained one does" in said
    assert not [*(tmp_path / "out").glob(f"*-{method}-*/checkpoint.pt")]


def test_versions_of_modules_are_saved_with_a_student(tmp_path):
    pytest.importorskip("torchvision")
    name = "torchvision:mnasnet0_5"  # whose weights without a version are an error
    config = mhkd.Config(student=name, method="ce", dataset="digits", image_size=32, subset=20)
    distiller = mhkd.Distiller(config, data := mhkd.load_data(config), None)
    mhkd_record.check_saved(distiller, data.center_crop(data.train[:2]))
    torch.save({"model": distiller.plain_state()}, tmp_path / "student.pt")
    mhkd_runs.load_weights(mhkd.build_model(name, 10), tmp_path / "student.pt")


VERSIONED = """
from torch import nn

class Layer(nn.Linear):
    _version = 2

    def _load_from_state_dict(self, state, prefix, versions, *rest):
        if versions.get("version", 1) < 2:  # of before, when weights had the other sign
            state[prefix + "weight"] = -state[prefix + "weight"]
        super()._load_from_state_dict(state, prefix, versions, *rest)

def build(num_classes):
    return nn.Sequential(nn.Flatten(), Layer(3 * 16 * 16, 8), nn.Linear(8, num_classes))
"""


def test_versions_of_modules_are_kept_in_every_way_of_saving_and_loading(tmp_path):
    (tmp_path / "net.py").write_text(VERSIONED)
    name, weights = f"{tmp_path / 'net.py'}:build", tmp_path / "w.pt"
    options = ["--student", name, "--val-fraction", "0.2", "--keep", "best"]
    assert run(tmp_path / "out", *ALONE, *options) == 0
    (result,) = (tmp_path / "out").glob("*/result.json")
    result = read(result)
    assert result["accuracy"] == result["test_accuracy_at_best_val_epoch"]
    network = mhkd.build_model(name, 10)
    wrapped = nn.DataParallel(network).state_dict()
    for classes, state in ((10, network.state_dict()), (10, wrapped), (7, network.state_dict())):
        torch.save(state, weights)
        loaded = mhkd.build_model(name, classes, f"file:{weights}")
        assert torch.equal(loaded[1].weight, network[1].weight)


class OfTokens(nn.Module):
    """A classifier of each token, whose mean over the tokens are the logits."""

    def __init__(self, change=False):
        super().__init__()
        self.conv, self.fc, self.change = nn.Conv2d(3, 8, 3, 4), nn.Linear(8, 5), change

    def forward(self, x):
        x = self.conv(x).flatten(2).mT  # [B, T, C]
        if not self.change:
            return self.fc(x).mean(dim=1)
        z, self.used = self.fc(x := x.mean(dim=1)), x.clone()
        x.zero_()
        return z


def test_the_penultimate_feature_is_the_classifiers_input_and_has_one_row_for_each_image():
    network = mhkd.MultiHead(OfTokens(), [], 5)
    with pytest.raises(mhkd.UsageError, match=r"'fc' must run once on \[B, C\].*\(16, 64, 8\)"):
        network(torch.randn(16, 3, 32, 32), penultimate=True)
    network = mhkd.MultiHead(OfTokens(change=True), [], 5, frozen=True)
    _, feature = network(torch.randn(16, 3, 32, 32), penultimate=True)
    assert torch.equal(feature, network.model.used) and feature.any()


def test_a_lazy_network_gets_its_size_from_real_images_and_is_trained(tmp_path):
    file = network_file(tmp_path)
    path = tmp_path / "net.py"
    path.write_text(
        path.read_text().replace("nn.Conv2d(3, 8, 3, 2, 1)", "nn.LazyConv2d(8, 3, 2, 1)")
    )
    assert run(tmp_path / "out", *student(file)) == 0
    (folder,) = (tmp_path / "out").glob("*-mhkd-*")
    assert weights_of(folder)["a.weight"].shape == (8, 3, 3, 3)


def test_a_student_with_weights_of_another_precision_is_refused_with_the_option(tmp_path, failing):
    file = network_file(tmp_path)
    path = tmp_path / "net.py"
    path.write_text(path.read_text().replace("Net(num_classes)", "Net(num_classes).bfloat16()"))
    said = failing(tmp_path / "out", *student(file))
    assert "not float32" in said and "--precision bfloat16" in said


@pytest.mark.parametrize("method", ["crd", "rkd", "cc", "lsh", "dhkd"])
def test_a_network_without_a_linear_classifier_is_refused_by_methods_that_need_one(method):
    pytest.importorskip("torchvision")
    name = "torchvision:squeezenet1_1"
    config = mhkd.Config("resnet14", name, method=method, dataset="digits", image_size=32)
    with pytest.raises(mhkd.UsageError, match=f"--method {method} needs the input of a linear"):
        data = mhkd.load_data(config)
        mhkd.Distiller(config, data, mhkd.build_model("resnet14", 10))


@pytest.mark.parametrize("name, deeper", [
    ("resnet8", "resnet20"), ("torchvision:resnet18", "torchvision:resnet34"),
])  # fmt: skip
def test_initial_weights_of_a_deeper_network_are_refused(name, deeper, tmp_path):
    for network in (deeper, name):
        model = mhkd.build_model(network, 7)
        torch.save(model.state_dict(), tmp_path / "init.pt")
        if network == name:  # a classifier of other classes is left as it is
            mhkd.build_model(name, 10, f"file:{tmp_path}/init.pt")
        else:
            with pytest.raises(mhkd_runs.RunError, match="do not fit .*missing.* in the network"):
                mhkd.build_model(name, 10, f"file:{tmp_path}/init.pt")


def test_networks_whose_library_changes_the_input_of_pretrained_weights_get_it(tmp_path):
    """torchvision then maps images normalised for ImageNet to (x - 0.5) / 0.5."""
    models = pytest.importorskip("torchvision.models")
    model = models.googlenet(weights=None, init_weights=False, transform_input=True)
    mean, std, _ = mhkd_custom.library_weights("torchvision:googlenet")
    raw = torch.rand(1, 3, 4, 4)
    of_imagenet = (raw - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(1, 3, 1, 1)
    expected = model._transform_input(of_imagenet)
    torch.save(model.state_dict(), tmp_path / "library.pt")  # with its auxiliary classifiers
    built = mhkd.build_model("torchvision:googlenet", 7, f"file:{tmp_path}/library.pt")
    assert torch.equal(built.conv1.conv.weight, model.conv1.conv.weight)
    assert (mean, std) == ((0.5,) * 3, (0.5,) * 3)
    torch.testing.assert_close((raw - 0.5) / 0.5, expected)


def test_the_hash_of_a_network_covers_its_units_and_that_of_code_its_constants(monkeypatch):
    config = mhkd.Config("resnet14", "resnet8")
    before = mhkd_code.code_hashes(config)
    monkeypatch.setitem(mhkd.UNITS, mhkd.ResNet, ("layer2", "layer3", "layer1"))
    after = mhkd_code.code_hashes(config)
    assert before["method_code_sha256"] == after["method_code_sha256"]
    for role in ("student", "teacher"):
        assert before[f"{role}_code_sha256"] != after[f"{role}_code_sha256"]
    assert mhkd_code.is_plain({"a": (1, ["b", 2.0, None])})
    assert not mhkd_code.is_plain({"a": mhkd.ResNet})


# 11. Messages


def test_a_config_refuses_to_assign_what_other_values_follow_from(tmp_path):
    config = mhkd.Config("vgg13", "vgg8", out=tmp_path)
    config.seed, config.device = 1, "cpu"
    with pytest.raises(mhkd.UsageError, match="cannot be assigned: use config.replace.epochs"):
        config.epochs = 60
    assert config.replace(epochs=60).lr_steps == (38, 45, 52)
    with pytest.raises(mhkd.UsageError, match="use config.replace.options"):
        config.options = {"tau": 1.0}
    config.options["tau"] = 1.0
    with pytest.raises(mhkd.UsageError, match="Config.options was changed: use config.replace"):
        mhkd_record.code_of(config)


def test_numbers_of_numpy_and_paths_are_recorded(tmp_path):
    numbers = numpy.array([0.5, 0.25, 0.125])
    settings = {"mean": [*numbers], "std": numbers, "seed": numpy.int64(3), "out": tmp_path}
    settings |= {"epochs": torch.tensor(60), "lr_steps": numpy.array([20, 40])}
    options = {"tau": numpy.float32(2), "units": [*numpy.arange(1, 3)]}
    config = mhkd.Config("vgg13", "vgg8", options=options, **settings)
    assert config.recorded()["mean"] == [0.5, 0.25, 0.125] and config.recorded()["seed"] == 3
    assert config.options["tau"] == 2.0 and config.options["units"] == (1, 2)
    assert config.replace().recorded() == config.recorded()
    config.out = tmp_path / "other"
    json.dumps([config.out, config.recorded()])


def test_a_term_that_is_not_finite_is_named(tmp_path, failing):
    options = [*PAIR, "--method", "cc", "--cc-weight", "1e38"]
    assert "(cc)" in failing(tmp_path, *options)


@pytest.mark.parametrize("wrap", [
    lambda s: {"net": s}, lambda s: {"model_state_dict": s, "epoch": 3},
    lambda s: {"state_dict": {f"model.{k}": t for k, t in s.items()}},
    lambda s: {"model": s, "best": __import__("numpy").float64(0.5)},
    lambda s: {"n_averaged": torch.tensor(3), **{f"module.{k}": t for k, t in s.items()}},
], ids=["net", "model_state_dict", "lightning", "numpy scalar", "average"])  # fmt: skip
def test_checkpoints_of_common_layouts_load(wrap, tmp_path):
    network, other = (mhkd.build_model("resnet8", 10) for _ in range(2))
    torch.save(wrap(network.state_dict()), tmp_path / "a.pt")
    mhkd_runs.load_weights(other, tmp_path / "a.pt")
    assert all(torch.equal(t, network.state_dict()[n]) for n, t in other.state_dict().items())
    with pytest.raises(user_errors()):
        mhkd_runs.load_weights(mhkd.build_model("resnet14", 10), tmp_path / "a.pt")


# 12, 13. Calls


def test_further_inputs_and_keywords_reach_the_network():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x, shift=0, *, scale=1):
            return self.fc(self.conv(x).mean(dim=(2, 3))) * scale + shift

    network, x = mhkd.MultiHead(Two(), ["conv"], 5, width=4).eval(), torch.randn(2, 3, 8, 8)
    plain = network.model(x)
    torch.testing.assert_close(network(x, 2)[0], plain + 2)
    torch.testing.assert_close(network(x, 1, scale=3)[0], plain * 3 + 1)
    logits, feature = network(x, 1, penultimate=True)
    assert feature.shape == (2, 4)
    torch.testing.assert_close(logits[0], plain + 1)


def test_kd_loss_counts_all_rows_but_those_of_ignore_index_also_labels_that_are_no_class():
    z_s, z_t = torch.randn(2, 4, 5)
    for ignored in (-100, mhkd.UNLABELLED):
        labels = torch.tensor([0, mhkd.UNLABELLED if ignored == -100 else 3, 255, ignored])
        found = mhkd.kd_loss(z_s, z_t, labels=labels, ignore_index=ignored)
        torch.testing.assert_close(found, mhkd.kd_loss(z_s[:3], z_t[:3]))


def test_kd_loss_of_maps_asks_for_the_dimension_of_the_classes():
    z_s, z_t = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    with pytest.raises(ValueError, match=r"give dim.*\[2, 5, 3, 4\]"):
        mhkd.kd_loss(z_s, z_t)
    rows = [z.movedim(1, -1).reshape(-1, 5) for z in (z_s, z_t)]
    torch.testing.assert_close(mhkd.kd_loss(z_s, z_t, dim=1), mhkd.kd_loss(*rows))


def test_a_teacher_outside_no_grad_is_warned_of_if_its_final_logits_require_a_gradient():
    z, y = [torch.randn(2, 5, requires_grad=True)] * 2, torch.tensor([1, 2])
    with pytest.warns(UserWarning, match="teacher's final logits require a gradient"):
        mhkd.mhkd_loss(z, z, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mhkd.mhkd_loss(z, [z[0].detach(), z[1]], y)  # heads learn from their cross-entropy
        mhkd.mhkd_loss(z, z, y, teacher_ce=[False, True])


def test_metrics_that_differ_between_steps_are_refused(tmp_path, failing, monkeypatch):
    class Odd(mhkd.Distillation):
        def own_terms(self, batch):
            self.step = getattr(self, "step", 0) + 1
            batch.metrics["even" if self.step % 2 else "odd"] = batch.student.logits.sum()
            return {}

    monkeypatch.setitem(mhkd.METHODS, "odd", Odd)
    assert "the metrics differ between steps" in failing(tmp_path, *PAIR, "--method", "odd")


def test_parameters_that_the_optimizer_lacks_are_noted(tmp_path, monkeypatch, capsys):
    class Late(mhkd.Distillation):
        def prepare(self, of_teacher):
            self.layer = nn.Linear(10, 10)

        def own_terms(self, batch):
            return {"late": self.layer(batch.student.logits).square().mean()}

    monkeypatch.setitem(mhkd.METHODS, "late", Late)
    assert run(tmp_path, *PAIR, "--method", "late") == 0
    said = "not in the optimizer, and so not trained by it, are methods.0.layer.weight, methods.0"
    assert said in capsys.readouterr().out


def test_a_term_may_begin_in_a_later_epoch(tmp_path, monkeypatch):
    class Later(mhkd.Distillation):
        def own_terms(self, batch):
            self.steps = getattr(self, "steps", 0) + 1
            return {"later": batch.student.logits.square().mean()} if self.steps > 5 else {}

    monkeypatch.setitem(mhkd.METHODS, "later", Later)
    assert run(tmp_path, *PAIR, "--method", "later") == 0  # 200 images are five steps


def test_a_weight_that_rises_from_zero_is_noted_and_a_metric_that_is_not_finite_is_named(
    tmp_path, monkeypatch, capsys, failing
):
    class Rising(mhkd.Distillation):
        metric = 1.0

        def final_terms(self, batch):
            self.steps = getattr(self, "steps", -1) + 1
            batch.metrics["extra"] = torch.tensor(self.metric)
            return {name: self.steps * term for name, term in super().final_terms(batch).items()}

    monkeypatch.setitem(mhkd.METHODS, "rising", Rising)
    assert run(tmp_path, *PAIR, "--method", "rising") == 0
    assert "note: in the first step the student gets no gradient" in capsys.readouterr().out
    monkeypatch.setattr(Rising, "metric", float("nan"))
    said = failing(tmp_path, *PAIR, "--method", "rising", "--overwrite")
    assert "the metric extra is not finite in epoch 1, step 1" in said


def test_another_file_beside_the_teachers_weights_is_ignored(teacher, tmp_path):
    shutil.copy(teacher, tmp_path / "t.pt")
    for i, text in enumerate(('{"top1": 71.2}', "[1, 2]", '{"config": "a.yaml"}', "{")):
        (tmp_path / "result.json").write_text(text)
        options = ["--method", "kd", "--teacher-weights", tmp_path / "t.pt", "--epochs", "1"]
        assert run(tmp_path / str(i), *PAIR, *options) == 0


@pytest.mark.parametrize("method", ["kd", "mhkd"])  # the heads of the teacher have a gradient
def test_a_loss_of_weight_zero_is_a_sentence(method, tmp_path, failing):
    options = ["--method", method, "--gamma", "0", "--kd-weight", "0"]
    options += ["--beta", "0", "--head-width", "8"] * (method == "mhkd")
    assert "the student gets no gradient" in failing(tmp_path, *PAIR, *options)


def test_an_option_with_the_name_of_a_setting_is_refused(monkeypatch):
    class Own(mhkd.Distillation):
        options = {"lr": mhkd.Option(1.0, "weight")}

    monkeypatch.setitem(mhkd.METHODS, "own", Own)
    with pytest.raises(mhkd.UsageError, match="an option lr, the name of a setting"):
        mhkd.Config("resnet14", "resnet8", method="own")


def test_numbers_that_must_be_whole_and_units_in_a_string():
    for settings in ({"epochs": 1.5}, {"batch_size": 8.0}, {"options": {"head_width": 8.5}}):
        with pytest.raises(mhkd.UsageError, match="must be a whole number"):
            mhkd.Config("resnet14", "resnet8", **settings)
    config = mhkd.Config("resnet14", "resnet8", student_units="layer1, layer2,layer3")
    assert config.student_units == ("layer1", "layer2", "layer3")


def test_milestones_of_a_shorter_run_are_not_before_its_first_epoch():
    config = mhkd.Config(
        "resnet14", "resnet8", dataset="digits", epochs=30, lr_steps=(1, 20), teacher_epochs=10,
        options={"teacher_heads": "pretrained"},
    )  # fmt: skip
    assert config.of_teacher().lr_steps == config.of_heads("t.pt").lr_steps == (1, 7)


def test_data_of_another_normalisation_or_without_the_unlabelled_images_are_refused(
    teacher, tmp_path
):
    content, out = torch.load(teacher, weights_only=True), {"out": str(tmp_path)}
    torch.save(content | {"mean": [0.9] * 3, "std": [0.05] * 3}, tmp_path / "other.pt")
    settings = {"dataset": "digits", "method": "kd", "device": "cpu", "subset": 100, "epochs": 1}
    of_a, of_b = (
        mhkd.Config("resnet14", "resnet8", **settings, **out, teacher_weights=str(path))
        for path in (teacher, tmp_path / "other.pt")
    )
    with pytest.raises(mhkd.UsageError, match="loaded with another normalisation"):
        mhkd.train(of_b, mhkd.load_data(of_a))
    assert mhkd.train(of_b, mhkd.load_data(of_b))["epochs"] == 1


def test_initial_weights_from_a_student_file_bring_their_normalisation(teacher, tmp_path):
    content = torch.load(teacher, weights_only=True)
    torch.save(content | {"mean": [0.9] * 3, "std": [0.05] * 3}, tmp_path / "s.pt")
    init = f"file:{tmp_path / 's.pt'}"
    settings = {"student": "resnet14", "method": "ce", "dataset": "digits", "student_init": init}
    assert mhkd.load_data(mhkd.Config(**settings)).mean == (0.9,) * 3
    given = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert mhkd.load_data(mhkd.Config(**settings, **given)).mean == (0.5,) * 3


def test_a_run_leaves_the_callers_random_numbers_as_they_were(tmp_path):
    import random

    def draws():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    def seed():
        random.seed(5), numpy.random.seed(5), torch.manual_seed(5)

    seed()
    wanted = [draws(), draws()]
    seed()
    found = [draws()]
    config = {"dataset": "digits", "subset": 40, "epochs": 1, "batch_size": 20, "device": "cpu"}
    mhkd.train(mhkd.Config(student="resnet8", method="ce", out=str(tmp_path), **config))
    assert [*found, draws()] == wanted


def test_training_without_gradients_is_refused_before_anything_is_written(tmp_path):
    config = mhkd.Config(student="resnet8", method="ce", dataset="digits", out=str(tmp_path / "o"))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(mhkd.UsageError, match="outside of torch.no_grad"):
            mhkd.train(config)
    assert not (tmp_path / "o").exists()


def test_initial_weights_of_another_class_order_are_refused_and_other_images_noted(
    teacher, tmp_path, capsys, failing
):
    content = torch.load(teacher, weights_only=True)
    options = [*ALONE, "--student", "resnet14", "--epochs", "1", "--student-init"]
    path = tmp_path / "init.pt"
    torch.save(content | {"classes": content["classes"][::-1]}, path)
    assert "have another class order than the data" in failing(tmp_path, *options, f"file:{path}")
    torch.save(content | {"classes": [*"abcdefghij"], "mean": [0.5] * 3, "std": [0.25] * 3}, path)
    taught = ["--method", "kd", "--teacher", "resnet14", "--teacher-weights", teacher]
    assert run(tmp_path, *options, f"file:{path}", *taught) == 0
    said = capsys.readouterr().out
    assert "the classifier of the initial weights" in said and "another normalisation" in said
    torch.save(content | {"classes": [*"abcdefg"], "mean": tuple(content["mean"])}, path)
    for file in (path, teacher):  # other classes would be of other rows; the same normalisation
        assert run(tmp_path, *options, f"file:{file}") == 0
        assert "the initial weights" not in capsys.readouterr().out


SLOW = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, K):
        super().__init__()
        self.fc = nn.Linear(768, K)
        self.register_buffer("centre", torch.zeros(768), persistent=False)

    def forward(self, x):
        x = x.flatten(1)
        if self.training:
            self.centre += 0.002 * (x.detach().mean(0) - self.centre)
        return self.fc(x - self.centre)

def build(num_classes):
    return Net(num_classes)
"""


def test_a_buffer_outside_of_the_state_dict_that_changes_slowly_is_refused(tmp_path, failing):
    (tmp_path / "net.py").write_text(SLOW)
    options = [*ALONE, "--student", f"{tmp_path / 'net.py'}:build"]
    assert "not in buffers with persistent=False" in failing(tmp_path / "o", *options)
    for text in (
        SLOW.replace("if self.training", "if False"),  # a constant
        SLOW.replace("x - self.centre)", "x)"),  # without an effect on the logits
    ):
        (tmp_path / "other.py").write_text(text)
        assert run(tmp_path / "o", *options[:-1], f"{tmp_path / 'other.py'}:build") == 0
        shutil.rmtree(tmp_path / "o")


def test_a_saved_student_that_is_worse_than_the_trained_one_gives_a_note(tmp_path, capsys):
    text = SLOW.replace(
        'register_buffer("centre", torch.zeros(768), persistent=False)', "steps = 0"
    )
    text = text.replace(
        "self.centre += 0.002 * (x.detach().mean(0) - self.centre)", "self.steps += 1"
    )
    text = text.replace("x - self.centre)", "x) * (-1 if self.steps > 9 else 1)")
    (tmp_path / "net.py").write_text(text)
    options = [*ALONE, "--student", f"{tmp_path / 'net.py'}:build"]
    assert run(tmp_path / "o", *options) == 0
    said = capsys.readouterr().out
    assert "and saved it has" in said and "something that is not in its state dict" in said


def test_equal_milestones_views_and_warmup_are_kept_in_other_runs():
    own = {"dataset": "digits", "teacher": "resnet14", "student": "resnet8", "method": "kd"}
    config = mhkd.Config(**own, epochs=10, lr_steps=(5, 5))
    assert config.of_teacher().lr_steps == (5, 5) == config.replace(epochs=10).lr_steps
    config = mhkd.Config(**own, epochs=10, lr_steps=(5, 6), teacher_epochs=5)
    assert config.of_teacher().lr_steps == (2, 3)
    config = mhkd.Config(**own, epochs=5, teacher_views=5)
    assert config.teacher_views is None and config.replace(epochs=20).teacher_views == 5
    assert config.replace(epochs=20, teacher_views=7).teacher_views == 7
    assert config.replace(seed=1).differs == config.differs
    again = config.replace(epochs=20).replace(epochs=5).replace(seed=1).replace(epochs=20)
    assert again.teacher_views == 5 and config.replace(teacher_views=None).views == 5
    config = mhkd.Config(**own, epochs=7, teacher_epochs=29, warmup=7)
    assert config.of_teacher().warmup == 29


@pytest.mark.parametrize("settings", [
    {"epochs": "3"}, {"lr": "0.1"}, {"options": {"tau": "4"}}, {"seed": "1"}, {"compile": "no"},
    {"method": "dhkd", "options": {"dhkd_align": "False"}},
])  # fmt: skip
def test_texts_in_place_of_numbers_are_refused_by_name(settings):
    own = {"dataset": "digits", "teacher": "resnet14", "student": "resnet8", "method": "kd"}
    with pytest.raises(mhkd.UsageError, match="must be (a number|True or False), not the text"):
        mhkd.Config(**{**own, **settings})


@pytest.mark.parametrize("part, label", [("test", 10), ("test", -1), ("train", 10), ("val", -1)])
def test_labels_changed_to_what_is_no_class_are_refused(part, label, tmp_path):
    settings = {"dataset": "digits", "subset": 100, "val_fraction": 0.2, "out": str(tmp_path)}
    config = mhkd.Config(student="resnet8", method="ce", device="cpu", **settings)
    data = mhkd.load_data(config)
    data.labels[getattr(data, part)[:2]] = label
    with pytest.raises(mhkd.UsageError, match=rf"labels from .* in data.{part}: give labels from"):
        mhkd.train(config, data)
