"""The student in use, files that define networks, traced networks: issue 23, parts 5, 7, 9, 11."""

import sys

import numpy as np
import pytest
import torch
from conftest import FOLDER, pixels, run, save_image
from test_elsewhere import student_file
from torch import nn

import mhkd
import mhkd_custom
import mhkd_runs

PIL = pytest.importorskip("PIL.Image")


def images(size, count=2, seed=3):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def student(tmp_path):
    """A student of 16 pixels."""
    student_file(tmp_path / "student.pt", "resnet8", 16)
    return mhkd_custom.load_student(tmp_path / "student.pt")


# What the student sees


def save_kinds(folder):
    """Images of all kinds, most of them not square: their names."""
    array = pixels(50, 100, 3)
    exif = PIL.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    alpha = np.dstack([array, pixels(50, 100, seed=1)])
    grey16 = np.linspace(0, 65535, 60 * 80).reshape(60, 80).astype(np.uint16)
    kinds = {
        "wide.png": (array, {}), "tall.jpg": (array.transpose(1, 0, 2), {}),
        "exif.jpg": (array, {"exif": exif}), "alpha.png": (alpha, {}), "grey16.png": (grey16, {}),
        "grey.png": (array[..., 0], {}), "small.png": (array[:20, :20], {}),
    }  # fmt: skip
    for name, (content, keywords) in kinds.items():
        save_image(folder / name, np.ascontiguousarray(content), **keywords)
    PIL.fromarray(array).convert("P").save(folder / "palette.gif")
    PIL.fromarray(array).convert("CMYK").save(folder / "cmyk.jpg")
    return [*kinds, "palette.gif", "cmyk.jpg"]


@pytest.mark.parametrize("size, resized", [(16, 16), (64, 74)])
def test_preprocess_gives_the_pixels_of_the_test_images_of_a_run(size, resized, tmp_path):
    names = sorted(save_kinds(tmp_path / "photos" / "test" / "a"))
    for place in ("train/a", "train/b", "test/b"):
        save_image(tmp_path / "photos" / place / "0.png", pixels(20, 20, 3))
    settings = {"student": "resnet8", "method": "ce", "dataset": "folder", "batch_size": 2}
    settings |= {"data": str(tmp_path / "photos"), "out": str(tmp_path / "out")}
    data = mhkd.load_data(mhkd.Config(**settings, image_size=size))
    student_file(tmp_path / "student.pt", "resnet8", size)  # as before there was "resize"
    old = mhkd_custom.load_student(tmp_path / "student.pt")
    content = torch.load(tmp_path / "student.pt") | {"resize": data.images.shape[1]}
    torch.save(content, tmp_path / "student.pt")
    student = mhkd_custom.load_student(tmp_path / "student.pt")
    assert old.resize == student.resize == resized
    at = (resized - size) // 2
    for name, index in zip(names, data.test.tolist()):
        wanted = data.images[index, at : at + size, at : at + size].permute(2, 0, 1)
        path = tmp_path / "photos" / "test" / "a" / name
        with PIL.open(path) as image:
            for given in (path, str(path), image):
                found = student.preprocess(given)
                assert found.dtype == torch.float32 and found.shape == (3, size, size)
                assert torch.equal((255 * found).round().to(torch.uint8), wanted), name


def test_a_run_reports_the_accuracy_that_predict_has_on_the_files_of_2_to_1_pictures(tmp_path):
    for part, count in (("train", 12), ("test", 6)):
        for i in range(count):  # the left and right quarters are the same for both classes
            array = np.full((40, 80, 3), 128, np.uint8)
            array[:, 20:60] = (40, 200)[i % 2] + pixels(40, 40, 3, seed=i) // 8
            save_image(tmp_path / "photos" / part / "ab"[i % 2] / f"{i}.png", array)
    options = [*FOLDER, tmp_path / "photos", "--image-size", "64", "--epochs", "3"]
    assert run(tmp_path / "out", *options, "--crop-scale", "0.5", "--lr", "0.01") == 0
    (folder,) = (tmp_path / "out").glob("folder*")
    student = mhkd_custom.load_student(folder / "student.pt")
    paths = sorted((tmp_path / "photos" / "test").rglob("*.png"))
    found = student.predict(paths, batch_size=4)
    accuracy = 100 * np.mean([name == path.parent.name for (name, _), path in zip(found, paths)])
    assert accuracy == mhkd_runs.read_json(folder / "result.json")["accuracy"]


def test_predict_names_classes_with_their_probabilities(student, tmp_path):
    names = save_kinds(tmp_path)
    paths = [tmp_path / name for name in names]
    wanted = student(torch.stack([student.preprocess(path) for path in paths])).softmax(dim=1)
    student.train()  # a batch would be normalised by its own statistics
    for batch_size in (1, 4, 64):
        found = student.predict(paths, batch_size=batch_size)
        assert [name for name, _ in found] == [student.classes[k] for k in wanted.argmax(dim=1)]
        np.testing.assert_allclose([p for _, p in found], wanted.amax(dim=1).detach(), rtol=1e-5)
    with PIL.open(paths[0]) as image:
        assert student.predict(paths[0]) == student.predict(str(paths[0])) == student.predict(image)
        assert student.predict(image) == student.predict([image]) == student.predict(iter([image]))
    assert student.predict([]) == []


def test_what_is_no_image_is_refused(student, tmp_path):
    (tmp_path / "text.png").write_text("text")
    for name, message in (("text.png", "text.png' cannot be read"), ("none.png", "none.png' cann")):
        with pytest.raises(mhkd.UsageError, match=message):
            student.predict([tmp_path / name])
    with pytest.raises(mhkd.UsageError, match="not ndarray: use PIL.Image.fromarray"):
        student.preprocess(pixels(16, 16, 3))
    with pytest.raises(mhkd.UsageError, match="range of pixels of mode F is unknown.*convert it"):
        student.preprocess(PIL.fromarray(np.ones((16, 16), np.float32)))


# Types and ranges of its input


def test_the_student_takes_inputs_of_every_type_and_can_be_half_and_double(student, tmp_path):
    x = (255 * images(16)).round().to(torch.uint8)
    wanted = student(x)
    assert wanted.dtype == torch.float32
    for dtype, near in ((torch.float64, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)):
        other = mhkd_custom.load_student(tmp_path / "student.pt").to(dtype)
        for network, of_output in ((student, torch.float32), (other, dtype)):
            for given in (x, (x / 255).to(dtype), (x / 255).double(), x / 255):
                found = network(given)
                assert found.dtype == of_output
                torch.testing.assert_close(found.float(), wanted, rtol=near, atol=near)
    assert mhkd_custom.load_student(tmp_path / "student.pt").half()(x).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_floats_that_are_not_in_0_to_1_are_refused(dtype, student):
    x = images(16).to(dtype)
    for outside in (1.7 * x, 255 * x, 2 * x - 1, (x - 0.45) / 0.22):
        with pytest.raises(
            mhkd.UsageError, match=r"floats in 0 to 1, not .* to .*: divide .*uint8"
        ):
            student(outside)
    assert student(1.2 * x - 0.1).isfinite().all()  # as a bicubic filter gives
    assert student(images(16)[:0]).shape == (0, 4)


@pytest.mark.parametrize("how", ["export", "trace", "compile", "onnx"])
def test_the_student_can_be_exported_and_compiled(how, student, tmp_path):
    x, other = images(16), images(16, 5, seed=4)
    shapes = {"images": {0: torch.export.Dim("batch")}}
    if how == "export":
        found = torch.export.export(student, (x,), dynamic_shapes=shapes).module()(other)
    elif how == "trace":
        found = torch.jit.trace(student, x)(other)
    elif how == "compile":
        found = torch.compile(student, backend="eager", fullgraph=True)(other)
    else:
        reference = pytest.importorskip("onnx.reference")
        pytest.importorskip("onnxscript")
        path = str(tmp_path / "student.onnx")
        torch.onnx.export(student, (x,), path, dynamo=True, dynamic_shapes=shapes)
        session = reference.ReferenceEvaluator(path)
        (array,) = session.run(None, {"images": other.numpy()})
        found = torch.from_numpy(array)
    torch.testing.assert_close(found, student(other), rtol=1e-3, atol=1e-4)


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


def test_a_networks_name_is_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert mhkd_custom.absolute_name("a/../net.py:Net") == f"{tmp_path}/net.py:Net"
    assert mhkd_custom.absolute_name("/some/net.py:Net") == "/some/net.py:Net"
    for name in ("resnet8", "timm:resnet10t", "torchvision:resnet18"):
        assert mhkd_custom.absolute_name(name) == name


def test_a_student_of_a_file_is_loaded_from_anywhere_and_moves_with_its_file(
    write, tmp_path, monkeypatch
):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path)
    write()
    name = mhkd_custom.absolute_name("a/net.py:Net")
    path = tmp_path / "runs" / "student.pt"
    path.parent.mkdir()
    model = student_file(path, name, 16)
    x = images(16)
    wanted = mhkd_custom.load_student(path)(x)
    monkeypatch.chdir("work")
    assert torch.equal(mhkd_custom.load_student(path)(x), wanted)
    (tmp_path / "a").rename(tmp_path / "moved")
    message = r"built by '.*a/net.py:Net', which is missing: put .* beside .*model=network\)"
    with pytest.raises(mhkd.UsageError, match=message):
        mhkd_custom.load_student(path)
    network = type(model)(4)
    student = mhkd_custom.load_student(path, network)
    assert torch.equal(student(x), wanted) and student.model is network
    for file in (tmp_path / "moved").iterdir():
        file.rename(path.parent / file.name)
    assert torch.equal(mhkd_custom.load_student(path)(x), wanted)
    monkeypatch.chdir(path.parent)
    assert torch.equal(mhkd_custom.load_student("student.pt")(x), wanted)


def test_a_network_that_is_given_must_fit(student, tmp_path):
    path = tmp_path / "student.pt"
    with pytest.raises(mhkd_runs.RunError, match="another network or number of classes"):
        mhkd_custom.load_student(path, mhkd.build_model("vgg8", 4))
    with pytest.raises(mhkd.UsageError, match="model= is function, not a network"):
        mhkd_custom.load_student(path, mhkd.build_model)


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
