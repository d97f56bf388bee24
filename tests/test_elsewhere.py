"""Networks by name from torchvision, timm and files; their units; the saved student, in use."""

import types

import pytest
import torch
from torch import nn

import mhkd

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")


def images(size, count=2, seed=3):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def units_of(name, size=64, **settings):
    config = types.SimpleNamespace(student=name, student_units=None, **settings)
    model = mhkd.build_model(name, 4, "random", size)
    return mhkd.find_units(config, "student", model, torch.zeros(1, 3, size, size)), model


def heads_on(name, size=64):
    units, model = units_of(name, size)
    example = torch.zeros(1, 3, size, size)
    return mhkd.MultiHead(model, units, 4, width=4, example_input=example).eval()


BUILDER = """
from torch import nn
def build(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))
def nothing(num_classes):
    pass
"""


@pytest.fixture
def builder(tmp_path):
    (tmp_path / "mine.py").write_text(BUILDER)
    (tmp_path / "broken.py").write_text("import not_there\n")
    return tmp_path


# By name


@pytest.mark.parametrize("name", [
    "torchvision:resnet18", "torchvision:googlenet", "torchvision:vit_b_32",
    "timm:resnet10t", "timm:test_vit", "timm:convnext_atto",
])  # fmt: skip
def test_a_librarys_network_is_built_by_name_for_the_classes_and_the_size(name):
    model = mhkd.build_model(name, 7, image_size=64)
    assert model.train()(images(64)).shape == (2, 7)  # also googlenet, which has classifiers aside


def test_a_network_is_built_by_a_function_in_a_file(builder):
    assert mhkd.build_model(f"{builder}/mine.py:build", 3)(images(2)).shape == (2, 3)


@pytest.mark.parametrize("name, message", [
    ("torchvision:resnet81", "no network torchvision: 'resnet81': did you mean.* resnet18"),
    ("timm:mobilenetv3_smal_100", "no network timm: .*did you mean.* mobilenetv3_small_100"),
    ("torchvison:resnet18", "no network 'torchvison:resnet18'"),
    ("resnet18", "no network 'resnet18': did you mean"),
    ("DIR/none.py:build", r"none.py:build' does not work \(.*No such file"),
    ("DIR/broken.py:build", r"broken.py:build' does not work \(No module named 'not_there'"),
    ("DIR/mine.py:biuld", r"mine.py:biuld' does not work \(.*no attribute 'biuld'"),
    ("DIR/mine.py:nothing", "mine.py:nothing' returns NoneType, not a module"),
])  # fmt: skip
def test_a_name_that_leads_to_no_network_is_refused(name, message, builder):
    with pytest.raises(mhkd.UsageError, match=message) as error:
        mhkd.build_model(name.replace("DIR", str(builder)), 3)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_missing_library_is_named_in_one_sentence(library, monkeypatch):
    def missing(module):
        raise ModuleNotFoundError(f"No module named '{module}'")

    monkeypatch.setattr(mhkd.importlib, "import_module", missing)
    with pytest.raises(mhkd.UsageError, match=f"{library}:resnet18 needs {library}.*pip install"):
        mhkd.build_model(f"{library}:resnet18", 3)


# Weights to start from


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_small", "timm:resnet10t", "resnet8"])
@pytest.mark.parametrize("classes", [5, 4])
def test_weights_from_a_file_fill_all_but_a_classifier_of_other_classes(name, classes, tmp_path):
    saved, path = mhkd.build_model(name, classes), tmp_path / "weights.pt"
    torch.save(saved.state_dict(), path)
    model = mhkd.build_model(name, 4, f"file:{path}")
    theirs = saved.state_dict()
    differ = [k for k, t in model.state_dict().items() if not torch.equal(t, theirs[k])]
    assert len(differ) == (0 if classes == 4 else 2)
    assert all(theirs[key].shape[0] == 5 for key in differ)
    assert model(images(64)).shape == (2, 4)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(mhkd.build_model("vgg8", 4).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(mhkd.UsageError, match="do not fit resnet8: 'conv1.weight' is missing"):
        mhkd.build_model("resnet8", 4, f"file:{tmp_path}/weights.pt")
    with pytest.raises(mhkd.UsageError, match="no checkpoint"):
        mhkd.build_model("resnet8", 4, f"file:{tmp_path}/none.pt")
    with pytest.raises(mhkd.UsageError, match="no pretrained weights for resnet8.*file:PATH"):
        mhkd.build_model("resnet8", 4, "pretrained")


def test_torchvisions_weights_are_taken_from_where_it_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "torchvision:squeezenet1_1"
    url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
    file = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(mhkd.UsageError) as error:
        mhkd.build_model(name, 4, "pretrained")
    assert f"put {file.name} into '{file.parent}'" in str(error.value)
    assert "no network" in str(error.value)

    saved = torchvision.models.squeezenet1_1()  # of ImageNet's 1,000 classes
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(saved.state_dict(), file)
    model = mhkd.build_model(name, 4, "pretrained")
    assert torch.equal(model.features[0].weight, saved.features[0].weight)
    assert model(images(64)).shape == (2, 4)


def test_timms_weights_that_cannot_be_downloaded_are_told_by_their_place(monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **keywords):
        if pretrained:
            raise OSError("no network\nmore")
        return create(name, **keywords)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(mhkd.UsageError, match=r"\(no network\): put .*timm/resnet10t.*file:PATH"):
        mhkd.build_model("timm:resnet10t", 4, "pretrained")


def test_a_librarys_normalisation_is_that_of_its_weights():
    mean, std = mhkd.library_normalisation("torchvision:resnet18")
    assert mean == (0.485, 0.456, 0.406) and std == (0.229, 0.224, 0.225)
    assert mhkd.library_normalisation("timm:vit_tiny_patch16_224")[0] == (0.5, 0.5, 0.5)
    assert mhkd.library_normalisation("resnet8") is None


# Units and layouts


@pytest.mark.parametrize("name, size, units, shapes", [
    ("torchvision:resnet18", 128, "layer1 layer2 layer3", [(64, 32), (128, 16), (256, 8)]),
    ("torchvision:resnet50", 64, "layer1 layer2 layer3", [(256, 16), (512, 8), (1024, 4)]),
    ("torchvision:mobilenet_v3_small", 64, "features.1 features.3 features.8",
     [(16, 16), (24, 8), (48, 4)]),
    ("torchvision:vgg11", 64, "features.4 features.9 features.14", [(128, 32), (256, 16), (512, 8)]),
    ("torchvision:swin_v2_t", 64, "features.1 features.3 features.5", [(96, 16), (192, 8), (384, 4)]),
    ("torchvision:vit_b_32", 128, " ".join(f"encoder.layers.encoder_layer_{i}" for i in (2, 5, 8)),
     [(768, 4)] * 3),
    ("timm:resnet10t", 64, "layer1 layer2 layer3", [(64, 16), (128, 8), (256, 4)]),
    ("timm:mobilenetv3_small_050", 64, "blocks.0 blocks.1 blocks.3", [(8, 16), (16, 8), (24, 4)]),
    ("timm:swin_tiny_patch4_window7_224", 224, "layers.0 layers.1 layers.2",
     [(96, 56), (192, 28), (384, 14)]),
    ("timm:vit_tiny_patch16_224", 64, "blocks.2 blocks.5 blocks.8", [(192, 4)] * 3),
    ("timm:vit_wee_patch16_reg1_gap_256", 64, "blocks.2 blocks.6 blocks.9", [(256, 4)] * 3),
])  # fmt: skip
def test_units_are_found_and_their_maps_tokens_or_channels_last_become_features(
    name, size, units, shapes, capsys
):
    network = heads_on(name, size)
    assert units in " ".join(network.units.values())
    assert f"heads go after {', '.join(units.split())}" in capsys.readouterr().out
    assert list(network.shapes.values()) == [(c, side, side) for c, side in shapes]
    with torch.no_grad():
        assert [z.shape for z in network(images(size))] == [(2, 4)] * 4


def test_tokens_become_a_map_in_reading_order_without_the_class_token():
    tokens = torch.arange(2 * 10 * 3.0).view(2, 10, 3)
    for layout, start in (("tokens+1", 1), ("tokens+0", 0)):
        rows = tokens[:, start : start + 9]
        found = mhkd.as_map(torch.cat((tokens[:, :start], rows), dim=1), layout)
        assert found.shape == (2, 3, 3, 3)
        assert torch.equal(found[1, :, 0, 1], rows[1, 1]) and torch.equal(
            found[0, :, 2, 0], rows[0, 6]
        )


class Last(nn.Module):
    """Maps [B, H, W, 16]; `mixed`: other ones, too, that have their channels last for certain."""

    def __init__(self, mixed=False):
        super().__init__()
        self.unit, self.fc = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 4)
        self.move = type("Move", (nn.Module,), {"forward": lambda s, x: x.permute(0, 2, 3, 1)})()
        self.more = nn.Sequential(nn.Linear(16, 6), nn.Linear(6, 16)) if mixed else nn.Identity()

    def forward(self, x):
        return self.fc(self.more(self.move(self.unit(x))).mean(dim=(1, 2)))


def test_a_layout_that_a_shape_does_not_tell_is_asked_for_and_can_be_given():
    for size in (32, 96):  # maps of 8 and of 24 pixels, 16 channels
        example = torch.zeros(1, 3, size, size)
        network = mhkd.MultiHead(Last(), ["move"], 4, width=4, example_input=example)
        assert network.shapes == {1: (16, size // 4, size // 4)}
    cube = torch.zeros(1, 3, 64, 64)  # [B, 16, 16, 16] twice, beside maps of 6 channels
    with pytest.raises(mhkd.UsageError, match='layout="channels_first" or layout="channels_last"'):
        mhkd.MultiHead(Last(mixed=True), ["move"], 4, example_input=cube)
    assert mhkd.MultiHead(Last(), ["unit"], 4, example_input=cube).layouts == {1: "channels_first"}
    given = mhkd.MultiHead(Last(), ["move"], 4, example_input=cube, layout="channels_last").eval()
    x = images(64)
    torch.testing.assert_close(given(x)[1], given.heads["1"](given.model.unit(x)))
    with pytest.raises(mhkd.UsageError, match="no layout 'channel_last': did you mean"):
        mhkd.MultiHead(Last(), ["move"], 4, example_input=cube, layout="channel_last")


def test_units_that_cannot_be_found_are_asked_for_with_what_was_seen(builder):
    with pytest.raises(mhkd.UsageError, match=r"units of the student.*none\).*--student-units"):
        units_of(f"{builder}/mine.py:build", 2)


# The student, used


def student_file(path, name, size):
    torch.manual_seed(0)
    model = mhkd.build_model(name, 4, "random", size).train()
    with torch.no_grad():
        for _ in range(5):  # statistics of real images
            model(images(size, 8))
    content = {"model": model.state_dict(), "name": name, "classes": ["a", "b", "c", "d"]}
    content |= {"image_size": size, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    torch.save(content, path)
    return model.eval()


def test_a_saved_student_takes_raw_images_and_normalises_them_itself(tmp_path):
    model = student_file(tmp_path / "student.pt", "torchvision:mobilenet_v3_small", 32)
    student = mhkd.load_student(tmp_path / "student.pt")
    assert (student.classes, student.image_size) == (["a", "b", "c", "d"], 32)
    assert not any(module.training for module in student.modules())
    pixels = (255 * images(32)).round().to(torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    wanted = model((pixels / 255 - mean) / std)
    torch.testing.assert_close(student(pixels), wanted)
    torch.testing.assert_close(student(pixels / 255), wanted)
    with pytest.raises(mhkd.UsageError, match=r"\[B, 3, 32, 32\], not \[2, 3, 64, 64\]"):
        student(images(64))
    with pytest.raises(mhkd.UsageError, match=r"not \[3, 32, 32\]"):
        student(images(32)[0])


def test_a_file_that_is_no_student_is_refused(tmp_path):
    torch.save(mhkd.build_model("resnet8", 4).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(mhkd.UsageError, match="weights.pt' is no student.pt"):
        mhkd.load_student(tmp_path / "weights.pt")
    with pytest.raises(mhkd.UsageError, match="no checkpoint"):
        mhkd.load_student(tmp_path / "none.pt")


@pytest.mark.parametrize("name", [
    "resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv2",
    "torchvision:mobilenet_v3_small",
])  # fmt: skip
def test_a_saved_student_of_every_kind_exports_to_onnx_with_a_free_batch(name, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    student_file(tmp_path / "student.pt", name, 32)
    student = mhkd.load_student(tmp_path / "student.pt")
    path, dynamic = str(tmp_path / "student.onnx"), {"images": {0: torch.export.Dim("batch")}}
    torch.onnx.export(student, (images(32),), path, dynamo=True, dynamic_shapes=dynamic)
    session = runtime.InferenceSession(path)
    for count in (1, 5):
        x = images(32, count)
        (found,) = session.run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), student(x), rtol=1e-3, atol=1e-4)
