"""Files that define networks, detection of units, traced networks."""

import sys

import pytest
import torch
from test_elsewhere import student_file
from torch import nn

import mhkd
import mhkd_code
import mhkd_custom
import mhkd_deploy


def images(size, count=2, seed=3):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# FILE.py:FUNCTION

NETWORK = """
from __future__ import annotations
from dataclasses import dataclass, field
from torch import nn
from blocks import WIDTH

@dataclass
class Settings:
    width: int = field(default=WIDTH)
    names: list[str] | None = None

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        from inner.late import activation
        self.settings = Settings()
        self.unit = nn.Sequential(nn.Conv2d(3, self.settings.width, 4, 4), activation())
        self.fc = nn.Linear(self.settings.width, num_classes)

    def forward(self, x):
        return self.fc(self.unit(x).mean(dim=(2, 3)))
"""


@pytest.fixture
def write(tmp_path):
    """Writes a network and its neighbours into a folder; gives its name."""

    def write(folder="a", width=8, activation="ReLU"):
        place = tmp_path / folder
        (place / "inner").mkdir(parents=True, exist_ok=True)  # without __init__.py
        (place / "net.py").write_text(NETWORK)
        (place / "blocks.py").write_text(f"from inner import unused\nWIDTH = {width}\n")
        (place / "inner" / "unused.py").write_text("from . import other\nimport sys\n")
        (place / "inner" / "other.py").write_text("")
        (place / "inner" / "late.py").write_text(f"from torch.nn import {activation} as activation")
        (place / "alone.py").write_text("raise RuntimeError('nobody imports this')")
        return f"{place / 'net.py'}:Net"

    return write


def test_a_file_is_loaded_with_dataclasses_and_its_neighbours_and_leaves_the_path_as_it_was(
    write, monkeypatch
):
    name, path = write(), [*sys.path]
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    model = mhkd.build_model(name, 4)
    assert model(images(16)).shape == (2, 4) and sys.path == path
    assert sys.modules[type(model).__module__].Net is type(model) is type(mhkd.build_model(name, 5))
    assert not list(mhkd_custom.source_files(name)[0].parent.rglob("__pycache__"))
    assert sys.dont_write_bytecode is False


def test_two_files_import_neighbours_of_one_name_from_their_own_folders(write):
    names = [write("a", 8, "ReLU"), write("b", 6, "Tanh")]
    for _ in range(2):
        for name, width, activation in zip(names, (8, 6), (nn.ReLU, nn.Tanh)):
            model = mhkd.build_model(name, 4)
            assert model.fc.in_features == width and isinstance(model.unit[1], activation)


def test_a_file_is_executed_once_and_again_after_a_change_of_it_or_of_a_neighbour(
    write, tmp_path, monkeypatch
):
    name = write()
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    kind = type(mhkd.build_model(name, 4))
    for change in ({"activation": "Tanh"}, {"width": 6, "activation": "Tanh"}):
        write(**change)  # within a second and of the same size
        model = mhkd.build_model(name, 4)
        assert isinstance(model.unit[1], nn.Tanh) and type(model) is not kind
        assert model.fc.in_features == change.get("width", 8)
    (tmp_path / "a" / "blocks.py").write_text("WIDTH = nonsense")
    for _ in range(2):
        with pytest.raises(mhkd.UsageError, match="name 'nonsense' is not defined.*fix the file"):
            mhkd.build_model(name, 4)
    write()
    assert mhkd.build_model(name, 4).fc.in_features == 8


def test_the_source_files_are_the_file_and_what_it_imports_from_its_folder(write, tmp_path):
    name, place = write(), tmp_path / "a"
    names = ("net.py", "blocks.py", "inner/late.py", "inner/unused.py", "inner/other.py")
    assert {*mhkd_custom.source_files(name)} == {place / n for n in names}
    assert mhkd_custom.source_files(name)[0] == place / "net.py"
    mhkd.build_model(name, 4)  # makes no difference
    assert len(mhkd_custom.source_files(name)) == 5
    (place / "inner" / "__init__.py").write_text("import alone")
    assert {"__init__.py", "alone.py"} < {f.name for f in mhkd_custom.source_files(name)}
    assert mhkd_custom.source_files("timm:resnet10t") == []
    with pytest.raises(mhkd.UsageError, match="there is no file"):
        mhkd_custom.source_files(f"{place}/none.py:Net")


def test_the_hash_of_files_covers_equal_names_and_all_strings_but_docstrings(write, tmp_path):
    """In a user's file a string with spaces or an f-string may be a pattern or a name."""
    name, place, hashes = write(), tmp_path / "a", []
    (place / "net.py").write_text("from one import common as a\nfrom two import common as b")
    for folder in ("one", "two"):
        (place / folder).mkdir()
        (place / folder / "common.py").write_text("")
    for folder, text in (
        ("one", ""), ("one", "'b c h w -> b c'"), ("one", "x = 'b c h w -> b c'"),
        ("one", "x = 'b c h w -> b h'"), ("two", "x = 7"), ("two", "x = f'layer{1}'"),
        ("two", "x = f'layer{2}'"),
    ):  # fmt: skip
        (place / folder / "common.py").write_text(text)
        hashes.append(mhkd_code.code_sha256(mhkd_custom.source_files(name)))
    assert hashes[0] == hashes[1] and len({*hashes}) == 6


def test_a_networks_name_is_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert mhkd_custom.absolute_name("a/../net.py:Net") == f"{tmp_path}/net.py:Net"
    assert mhkd_custom.absolute_name("/some/net.py:Net") == "/some/net.py:Net"
    for name in ("resnet8", "timm:resnet10t", "torchvision:resnet18"):
        assert mhkd_custom.absolute_name(name) == name


def test_a_student_of_a_file_is_loaded_from_anywhere_and_moves_with_its_file(
    write, tmp_path, monkeypatch, capsys
):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path)
    write()
    name = mhkd_custom.absolute_name("a/net.py:Net")
    path = tmp_path / "runs" / "student.pt"
    path.parent.mkdir()
    model = student_file(path, name, 16)
    x, network = images(16), type(model)(4)
    wanted = mhkd_deploy.load_student(path)(x)
    monkeypatch.chdir("work")
    assert torch.equal(mhkd_deploy.load_student(path)(x), wanted)
    content = torch.load(path)
    torch.save(
        content | {"code_sha256": mhkd_code.code_sha256(mhkd_custom.source_files(name))}, path
    )
    mhkd_deploy.load_student(path)
    assert capsys.readouterr().out == ""
    write(activation="GELU")  # the weights still fit
    mhkd_deploy.load_student(path)
    assert f"a/net.py' or what it imports has changed since '{path}'" in capsys.readouterr().out
    write()
    (tmp_path / "a").rename(tmp_path / "moved")
    message = r"built by '.*a/net.py:Net', which is missing: put .* beside .*model=network\)"
    with pytest.raises(mhkd.UsageError, match=message):
        mhkd_deploy.load_student(path)
    student = mhkd_deploy.load_student(path, network)
    assert torch.equal(student(x), wanted) and student.model is network
    for file in (tmp_path / "moved").iterdir():
        file.rename(path.parent / file.name)
    assert torch.equal(mhkd_deploy.load_student(path)(x), wanted)
    monkeypatch.chdir(path.parent)
    assert torch.equal(mhkd_deploy.load_student("student.pt")(x), wanted)


# Units


def net():
    """Maps of 16, 8 and 4 pixels of an image of 32."""
    layers = [nn.Sequential(nn.Conv2d(c, 8, 3, 2, 1), nn.ReLU()) for c in (3, 8, 8)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def find(model, names=None):
    return mhkd_custom.find_units(model, images(32), "teacher", "net.py:net", names)


def test_units_are_found_on_the_images_that_are_given():
    seen = []

    class Watching(nn.Module):
        def forward(self, x):
            seen.append(x.detach().clone())
            return x

    units, layouts = find(nn.Sequential(Watching(), *net()))
    assert units == ("0", "1", "2") and {*layouts.values()} == {"channels_first"}
    assert len(seen) == 1 and torch.equal(seen[0], images(32))


@pytest.mark.parametrize("close", [
    lambda model: torch.jit.trace(model, images(32)), torch.jit.script,
    lambda model: torch.compile(model, backend="eager"),
    lambda model: model.compile(backend="eager") or model,
], ids=["traced", "scripted", "compiled", "compiled in place"])  # fmt: skip
def test_a_traced_or_compiled_network_is_named_as_such(close):
    message = r"the teacher or a part of it is traced or compiled.*before torch.jit or torch.compil"
    model = close(net())
    some = [name for name, _ in model.named_modules() if name][-1]
    for names in (None, [some]):
        with pytest.raises(mhkd.UsageError, match=message):
            find(model, names)
    parts = net()
    inner = nn.Sequential(parts[0], parts[1], parts[2])
    model = nn.Sequential(close(inner), *parts[3:])
    with pytest.raises(mhkd.UsageError, match=message):
        find(model, [name for name, _ in model.named_modules() if name.startswith("0.")][-1:])
    with pytest.raises(
        mhkd.UsageError, match="a part of it is traced or compiled.*--teacher-units"
    ):
        find(model)
    if isinstance(model[0], torch.jit.ScriptModule):
        assert find(model, ["0"])[0] == ("0",)  # the part itself can be observed
    else:
        with pytest.raises(mhkd.UsageError, match=message):
            find(model, ["0"])


@pytest.mark.parametrize("model, parts", [
    (nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), "no submodule returns a feature map"),
    (nn.Sequential(*net()[:1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)), "found: 0"),
    (type("Plain", (nn.Module,), {"forward": lambda self, x: x.mean((2, 3))})(), "no submodule"),
], ids=["no map", "one map", "no submodules"])  # fmt: skip
def test_a_network_without_units_is_told_about_kd(model, parts):
    with pytest.raises(mhkd.UsageError, match=rf"not detected \({parts}.*teacher-units.*ethod kd"):
        find(model)


def test_a_submodule_that_does_not_run_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.all, self.unused = net(), nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return self.all(x)

    with pytest.raises(mhkd.UsageError, match="'unused' of the teacher does not run: .*-units"):
        find(Net(), ["all.0", "unused"])
