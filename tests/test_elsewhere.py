"""Networks by name from torchvision, timm and files; their units; the saved student, in use."""

import types

import pytest
import torch
from conftest import user_errors
from torch import nn

import mhkd
import mhkd_custom
import mhkd_runs

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")


def images(size, count=2, seed=3):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def units_of(name):
    """Names of the units, their layouts, and the network."""
    config = types.SimpleNamespace(student=name, student_units=None)
    model = mhkd.build_model(name, 4, "random", 64)
    return *mhkd.find_units(config, "student", model, images(64) - 0.5), model


def build(num_classes):
    """A network of a file, this one: as FILE.py:build."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, num_classes))


def nothing(num_classes):
    pass


def failing(num_classes):
    return 1 / 0


# By name and from a file


def test_a_network_with_classifiers_aside_gives_logits_alone_in_training():
    model = mhkd.build_model("torchvision:googlenet", 7, image_size=64)
    assert model.train()(images(64)).shape == (2, 7)


def test_a_network_is_built_by_a_function_in_a_file():
    assert mhkd.build_model(f"{__file__}:build", 3)(images(64)).shape == (2, 3)
    message = r"units of the student were not detected.*--student-units.*--method kd"
    with pytest.raises(mhkd.UsageError, match=message):
        units_of(f"{__file__}:build")


@pytest.mark.parametrize("name, message", [
    ("torchvision:resnet81", "no network torchvision: 'resnet81': did you mean.* resnet18"),
    ("timm:mobilenetv3_smal_100", "no network timm: .*did you mean.* mobilenetv3_small_100"),
    ("timm:resnet10t.c3_in2k", r"no network timm:resnet10t.c3_in2k \(Invalid pretrained tag"),
    ("torchvison:resnet18", "no network 'torchvison:resnet18'"),
    ("resnet18", "no network 'resnet18': did you mean"),
    ("DIR/none.py:build", "there is no file 'DIR/none.py'"),
    ("DIR/broken.py:build", r"broken.py:build' does not work \(No module named 'not_there'"),
    ("DIR/text.py:build", r"text.py' cannot be loaded \(invalid syntax .text.py, line 2"),
    (f"{__file__}:biuld", "no network .*elsewhere.py: 'biuld': did you mean build"),
    ("DIR/value.py:build", "no network DIR/value.py: 'build': there are no functions"),
])  # fmt: skip
@pytest.mark.parametrize("refuse", [mhkd_custom.check, lambda name: mhkd.build_model(name, 3)])
def test_a_name_that_leads_to_no_network_is_refused_with_and_without_building_it(
    name, message, refuse, tmp_path
):
    (tmp_path / "broken.py").write_text("import not_there\n")
    (tmp_path / "value.py").write_text("build = 3\n")
    (tmp_path / "text.py").write_text("# a line\nno Python\n")
    name, message = (text.replace("DIR", str(tmp_path)) for text in (name, message))
    for _ in range(2):
        with pytest.raises(mhkd.UsageError, match=message) as error:
            refuse(name)
        assert len(str(error.value)) < 600


def test_a_function_that_returns_no_network_is_refused_when_it_is_called():
    mhkd_custom.check(f"{__file__}:nothing")
    with pytest.raises(mhkd.UsageError, match="elsewhere.py:nothing' returns NoneType, not a mod"):
        mhkd.build_model(f"{__file__}:nothing", 3)
    with pytest.raises(mhkd.UsageError, match=r"elsewhere.py:failing' does not work \(division by"):
        mhkd.build_model(f"{__file__}:failing", 3)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_missing_library_is_named_in_one_sentence(library, monkeypatch):
    def missing(module):
        if module.startswith("mhkd"):
            return mhkd_custom
        raise ModuleNotFoundError(f"No module named '{module}'")

    monkeypatch.setattr(mhkd.importlib, "import_module", missing)
    with pytest.raises(mhkd.UsageError, match=f"{library}:resnet18 needs {library}.*pip install"):
        mhkd.build_model(f"{library}:resnet18", 3)


# Weights to start from


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_small", "timm:resnet10t", "resnet8"])
@pytest.mark.parametrize("classes", [5, 4])
def test_weights_from_a_file_fill_all_but_a_classifier_of_other_classes(name, classes, tmp_path):
    theirs, path = mhkd.build_model(name, classes).state_dict(), tmp_path / "weights.pt"
    torch.save(theirs, path)
    state = mhkd.build_model(name, 4, f"file:{path}").state_dict()
    differ = [k for k, t in state.items() if not torch.equal(t, theirs[k])]
    assert differ == ([] if classes == 4 else list(state)[-2:])


@pytest.mark.parametrize("init, message", [
    ("file:DIR/weights.pt", "do not fit resnet8: 'conv1.weight' is missing"),
    ("file:DIR/none.pt", "no checkpoint"),
    ("pretrained", "no pretrained weights for resnet8.*file:PATH"),
])  # fmt: skip
def test_weights_that_are_not_there_or_of_another_network_are_refused(init, message, tmp_path):
    torch.save(mhkd.build_model("vgg8", 4).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(user_errors(), match=message):
        mhkd.build_model("resnet8", 4, init.replace("DIR", str(tmp_path)))


def test_torchvisions_weights_are_taken_from_where_it_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "torchvision:squeezenet1_1"
    url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
    file = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    message = rf"\(no network\): put {file.name} into '{file.parent}'"
    with pytest.raises(mhkd.UsageError, match=message):
        mhkd.build_model(name, 4, "pretrained")
    saved = torchvision.models.squeezenet1_1()  # of ImageNet's 1,000 classes
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(saved.state_dict(), file)
    model = mhkd.build_model(name, 4, "pretrained")
    assert torch.equal(model.features[0].weight, saved.features[0].weight)
    assert model(images(64)).shape == (2, 4)


@pytest.mark.parametrize("name", ["resnet10t", "pvt_v2_b0", "vit_tiny_patch16_224"])
def test_timms_weights_that_cannot_be_downloaded_are_told_by_their_place(name, monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **keywords):
        if pretrained:
            raise OSError("no network\nmore")
        return create(name, **keywords)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(mhkd.UsageError, match=rf"\(no network\): put .*timm/{name}.*file:PATH"):
        mhkd.build_model(f"timm:{name}", 4, "pretrained", 64)


def test_a_librarys_normalisation_is_that_of_its_weights():
    mean, std, _ = mhkd_custom.library_weights("torchvision:resnet18")
    assert mean == (0.485, 0.456, 0.406) and std == (0.229, 0.224, 0.225)
    assert mhkd_custom.library_weights("timm:vit_tiny_patch16_224")[0] == (0.5, 0.5, 0.5)
    assert mhkd_custom.library_weights("resnet8") is None


# Units and layouts


@pytest.mark.parametrize("name, units, shapes", [
    ("torchvision:resnet18", "layer1 layer2 layer3", "64x16 128x8 256x4"),
    ("torchvision:resnet50", "layer1 layer2 layer3", "256x16 512x8 1024x4"),
    ("torchvision:mobilenet_v3_small", "features.1 features.3 features.8", "16x16 24x8 48x4"),
    ("torchvision:vgg11", "features.4 features.9 features.14", "128x32 256x16 512x8"),
    ("torchvision:swin_v2_t", "features.1 features.3 features.5", "96x16 192x8 384x4"),
    ("torchvision:vit_b_32", "layer_2 layer_5 layer_8", "768x2 768x2 768x2"),
    ("timm:resnet10t", "layer1 layer2 layer3", "64x16 128x8 256x4"),
    ("timm:mobilenetv3_small_050", "blocks.0 blocks.1 blocks.3", "8x16 16x8 24x4"),
    ("timm:convnext_atto", "stages.0 stages.1 stages.2", "40x16 80x8 160x4"),
    ("timm:swin_tiny_patch4_window7_224", "layers.0 layers.1 layers.2", "96x16 192x8 384x4"),
    ("timm:vit_tiny_patch16_224", "blocks.2 blocks.5 blocks.8", "192x4 192x4 192x4"),
    ("timm:vit_wee_patch16_reg1_gap_256", "blocks.2 blocks.6 blocks.9", "256x4 256x4 256x4"),
])  # fmt: skip
def test_units_are_found_and_their_maps_tokens_or_channels_last_become_features(
    name, units, shapes, capsys
):
    found, layout, model = units_of(name)
    network = mhkd.MultiHead(
        model, found, 4, width=4, example_input=images(64), layout=layout
    ).eval()
    assert [unit.removeprefix("encoder.layers.encoder_") for unit in found] == units.split()
    assert f"heads after {', '.join(found)}" in capsys.readouterr().out
    assert " ".join(f"{C}x{H}" for C, H, W in network.shapes.values() if H == W) == shapes
    with torch.no_grad():
        assert [z.shape for z in network(images(64))] == [(2, 4)] * 4


@pytest.mark.parametrize("n", [0, 1])
def test_tokens_become_a_map_in_reading_order_without_the_class_token(n):
    tokens = torch.arange(2 * (9 + n) * 4.0).view(2, 9 + n, 4)
    wanted = [[[[tokens[b, n + 3 * y + x, c] for x in range(3)] for y in range(3)]
               for c in range(4)] for b in range(2)]  # fmt: skip
    assert torch.equal(mhkd.as_map(tokens, f"tokens+{n}"), torch.tensor(wanted))


def test_the_number_of_other_tokens_is_that_of_the_network_if_it_has_one():
    class Tokens(nn.Module):  # 9 tokens: a map of 3 x 3, or 5 other ones and a map of 2 x 2
        def forward(self, x):
            return x.flatten(2)[:, :, :9].transpose(1, 2)

    network = nn.Sequential(Tokens())
    assert mhkd_custom.find_units(network, images(32), "", "", ["0"])[1] == {"0": "tokens+0"}
    network.num_prefix_tokens = 5
    assert mhkd_custom.find_units(network, images(32), "", "", ["0"])[1] == {"0": "tokens+5"}


class Last(nn.Module):
    """Maps [B, H, W, 16]; `mixed`: other ones, too, that have their channels last for certain."""

    def __init__(self, mixed=False):
        super().__init__()
        self.unit, self.fc = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 4)
        self.move = type("Move", (nn.Module,), {"forward": lambda s, x: x.permute(0, 2, 3, 1)})()
        self.more = nn.Sequential(nn.Linear(16, 6), nn.Linear(6, 16)) if mixed else nn.Identity()

    def forward(self, x):
        return self.fc(self.more(self.move(self.unit(x))).mean(dim=(1, 2)))


def on_last(unit, size=64, mixed=False, **settings):
    example = torch.zeros(1, 3, size, size)  # 64: [B, 16, 16, 16] twice
    return mhkd.MultiHead(Last(mixed), [unit], 4, width=4, example_input=example, **settings).eval()


def detected(unit, size=64, mixed=False):
    """The layout that is detected for a unit."""
    return mhkd_custom.find_units(Last(mixed), images(size), "", "", [unit])[1]


def test_a_layout_is_detected_by_the_aspect_or_asked_for():
    for size in (32, 96):  # maps of 8 and of 24 pixels, 16 channels
        assert detected("move", size) == {"move": "channels_last"}
        layout = detected("move", size)
        assert on_last("move", size, layout=layout).shapes == {1: (16, size // 4, size // 4)}
        with pytest.raises(mhkd.UsageError, match='looks like channels last: .*"channels_last"'):
            on_last("move", size)
    wide = {"example_input": torch.zeros(1, 3, 32, 64), "width": 4}  # a map of 8 x 16 pixels
    with pytest.raises(mhkd.UsageError, match="looks like channels last"):
        mhkd.MultiHead(Last(), ["move"], 4, **wide)
    assert mhkd.MultiHead(Last(), ["unit"], 4, **wide).shapes == {1: (16, 8, 16)}
    assert detected("unit") == {"unit": "channels_first"}
    given = on_last("move", layout="channels_last")
    x = images(64)
    torch.testing.assert_close(given(x)[1], given.heads["1"](given.model.unit(x)))
    with pytest.raises(mhkd.UsageError, match="channels could be first or last"):
        detected("move", mixed=True)
    with pytest.raises(mhkd.UsageError, match="no layout 'channel_last': did you mean"):
        on_last("move", layout="channel_last")


# The student, used


def student_file(path, name, size=32):
    """A student.pt whose images make a difference, and whose normalisation does."""
    torch.manual_seed(0)
    model = mhkd.build_model(name, 4, "random", size).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches: else every image gives one output
    with torch.no_grad():
        for seed in range(3):
            model(images(size, 8, seed))
    content = {"model": model.state_dict(), "name": name, "classes": ["a", "b", "c", "d"]}
    content |= {"image_size": size, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    torch.save(content, path)
    return model.eval()


def test_a_saved_student_takes_raw_images_and_normalises_them_itself(tmp_path):
    model = student_file(tmp_path / "student.pt", "resnet8")
    student = mhkd.load_student(tmp_path / "student.pt")
    assert (student.classes, student.image_size) == (["a", "b", "c", "d"], 32)
    assert not any(module.training for module in student.modules())
    pixels = (255 * images(32)).round().to(torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    wanted = model((pixels / 255 - mean) / std)
    for without in (pixels / 255, pixels / 255 - mean, pixels / 255 / std):
        assert (model(without) - wanted).abs().max() > 0.05 * wanted.abs().max()
    torch.testing.assert_close(student(pixels), wanted)
    torch.testing.assert_close(student(pixels / 255), wanted)
    with pytest.raises(mhkd.UsageError, match=r"\[B, 3, 32, 32\], not \[2, 3, 64, 64\]"):
        student(images(64))
    with pytest.raises(mhkd.UsageError, match=r"not \[3, 32, 32\]"):
        student(images(32)[0])


def test_a_file_that_is_no_student_is_refused(tmp_path):
    torch.save(mhkd.build_model("resnet8", 4).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(mhkd.UsageError, match="weights.pt' is not the student.pt"):
        mhkd.load_student(tmp_path / "weights.pt")
    with pytest.raises(mhkd_runs.RunError, match="no checkpoint"):
        mhkd.load_student(tmp_path / "none.pt")


@pytest.mark.parametrize("name", [
    "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv2", "timm:resnet10t",
])  # fmt: skip
def test_a_saved_student_of_every_kind_exports_to_onnx_with_a_free_batch(name, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    student_file(tmp_path / "student.pt", name)
    student = mhkd.load_student(tmp_path / "student.pt")
    path, dynamic = str(tmp_path / "student.onnx"), {"images": {0: torch.export.Dim("batch")}}
    torch.onnx.export(student, (images(32),), path, dynamo=True, dynamic_shapes=dynamic)
    assert student(images(32, 8)).std(dim=0).min() > 0.01  # the images make a difference
    session = runtime.InferenceSession(path)
    for count in (1, 5):
        x = images(32, count)
        (found,) = session.run(None, {"images": x.numpy()})
        wanted = student(x)
        assert (torch.from_numpy(found) - wanted).abs().max() < 1e-3 * wanted.std()
