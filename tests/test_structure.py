"""What depends on what: sections 1 to 3 alone, mhkd.py alone, the modules' imports."""

import ast
import re
import shutil
import sys
import types

import pytest
import torch
from conftest import ROOT, SCRIPT, python

import mhkd

MODULES = sorted(ROOT.glob("mhkd*.py"))


def imported(path, whole=False):
    """Names of the modules that a file imports, at its top level or anywhere."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree)) if whole else tree.body
    names = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_sections_1_to_3_work_without_what_follows_them_and_train(monkeypatch):
    text = SCRIPT.read_text()
    end = re.search(r"^# -+\n# 4\. ", text, re.MULTILINE).start()
    module = types.ModuleType("sections")
    monkeypatch.setitem(sys.modules, "sections", module)  # dataclasses look there
    names = vars(module)
    exec(compile(text[:end], "sections", "exec"), names)
    torch.manual_seed(0)
    units = ["layer1", "layer2", "layer3"]
    teacher = names["ResNet"](10, 14)
    teacher = names["MultiHead"](teacher, units, 10, frozen=True, width=8).train()
    student = names["MultiHead"](names["ResNet"](10, 8), units, 10, width=8).train()
    trained = [*student.parameters(), *teacher.heads.parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    before = [p.detach().clone() for p in trained]
    for _ in range(2):
        images, labels = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
        loss = names["mhkd_loss"](student(images), teacher(images), labels, backend="reference")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite() and all(
        not torch.equal(p, b) for p, b in zip(trained, before) if p.dim() > 1
    )


def test_copied_alone_it_has_networks_heads_and_loss_and_names_the_file_that_training_needs(
    tmp_path,
):
    shutil.copy(SCRIPT, tmp_path)
    code = (
        "import mhkd, torch\n"
        "net = mhkd.MultiHead(mhkd.build_model('resnet8', 10), ['layer1', 'layer2'], 10)\n"
        "z, y = net(torch.rand(2, 3, 16, 16)), torch.tensor([1, 2])\n"
        "mhkd.mhkd_loss(z, [t.detach() for t in z], y).backward()\n"
        "print(mhkd.loss_backend(), mhkd.kd_loss(z[0], z[1]).item() >= 0)\n"
        "mhkd.train(mhkd.Config(student='resnet8', method='ce', dataset='digits'))\n"
    )
    done = python("-P", "-c", "import sys; sys.path.insert(0, '.')\n" + code, cwd=tmp_path)
    assert done.stdout == "reference (mhkd_fused.py not found) True\n"
    last = done.stderr.splitlines()[-1]
    assert last.startswith("mhkd.UsageError: mhkd_config.py is needed")
    assert "copy it" in last and "mhkd_runs.py" in last
    done = python("-P", "mhkd.py", "--student", "resnet8", "--method", "ce", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "mhkd_runs.py" in done.stderr


def test_the_losses_of_other_methods_need_two_files_and_a_missing_third_file_is_named(tmp_path):
    for name in ("mhkd.py", "mhkd_baselines.py"):
        shutil.copy(ROOT / name, tmp_path)
    code = "import sys, torch\nsys.path.insert(0, '.')\nimport mhkd_baselines\n"
    code += "x = torch.rand(4, 8)\nprint(mhkd_baselines.rkd_loss(x, x).item())\n"
    done = python("-P", "-c", code, cwd=tmp_path)
    assert done.stdout == "0.0\n", done.stderr
    shutil.copy(ROOT / "mhkd_config.py", tmp_path)
    done = python("-P", "mhkd.py", "--student", "resnet8", "--method", "ce", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("mhkd.py: mhkd_") and "copy it beside mhkd.py" in done.stderr


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_import_no_other_modules_than_these(path):
    mine = {p.stem for p in MODULES}
    allowed = {
        "mhkd": {"mhkd_config"},  # for annotations
        "mhkd_runs": set(), "mhkd_fused": set(), "mhkd_store": set(),
        "mhkd_custom": {"mhkd", "mhkd_runs"}, "mhkd_baselines": {"mhkd", "mhkd_config"},
        "mhkd_data": {"mhkd", "mhkd_config", "mhkd_runs"},
        "mhkd_images": {"mhkd", "mhkd_config", "mhkd_runs"},
        "mhkd_config": {"mhkd", "mhkd_data", "mhkd_teacher"},
        "mhkd_deploy": {"mhkd", "mhkd_images", "mhkd_runs"},
        "mhkd_code": {"mhkd", "mhkd_config", "mhkd_runs"},
        "mhkd_record": {"mhkd", "mhkd_code", "mhkd_config", "mhkd_runs"},
        # and mhkd_store when it is needed
        "mhkd_teacher": {"mhkd", "mhkd_code", "mhkd_config", "mhkd_record", "mhkd_runs"},
        "mhkd_tables": {"mhkd", "mhkd_config", "mhkd_record", "mhkd_runs"},  # and mhkd_report
        "mhkd_linear": {"mhkd"},
        "mhkd_report": {
            "mhkd", "mhkd_config", "mhkd_data", "mhkd_runs", "mhkd_tables",
        },
    }[path.stem]  # fmt: skip
    assert imported(path, whole=True) & mine <= allowed
    if path.stem in ("mhkd", "mhkd_runs", "mhkd_fused", "mhkd_store"):
        assert imported(path) <= {*sys.stdlib_module_names, "torch"}


def test_data_of_another_data_set_are_not_trained_on_under_a_wrong_name():
    pytest.importorskip("sklearn")
    settings = {"student": "resnet8", "method": "ce", "device": "cpu"}
    data = mhkd.load_data(mhkd.Config(dataset="digits", **settings))
    with pytest.raises(mhkd.UsageError, match="'digits'.*cifar100"):
        mhkd.train(mhkd.Config(**settings), data)
