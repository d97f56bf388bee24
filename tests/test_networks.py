"""The networks are those of the CRD benchmark: benchmark.json holds its figures."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mhkd

BENCHMARK = json.loads(Path(__file__).with_name("benchmark.json").read_text())["networks"]
NAMES = list(BENCHMARK)


def features(model, x):
    """What the network's units return for x, and the logits."""
    network = mhkd.FeatureExtractor(model, mhkd.UNITS[type(model)], 100).eval()
    with torch.no_grad():
        outputs = network(x)
    return list(outputs.features.values()), outputs.logits


@pytest.fixture(scope="module", params=NAMES)
def network(request):
    torch.manual_seed(0)
    model = mhkd.build_model(request.param, 100)
    model.name = request.param
    return model


def test_every_network_of_the_issue_exists_and_has_its_figures_here():
    wanted = "resnet8 resnet14 resnet20 resnet32 resnet44 resnet56 resnet110 resnet8x4 resnet32x4 "
    wanted += "wrn_16_1 wrn_16_2 "
    wanted += "wrn_40_1 wrn_40_2 vgg8 vgg11 vgg13 vgg16 vgg19 mobilenetv2 shufflenetv2"
    assert set(wanted.split()) <= set(mhkd.MODELS)
    assert set(mhkd.MODELS) == set(NAMES)


def test_every_network_has_three_units():
    assert set(mhkd.UNITS) == {kind for kind, _ in mhkd.MODELS.values()}
    assert all(len(units) == 3 for units in mhkd.UNITS.values())


def test_state_dict_has_the_names_shapes_and_order_of_the_published_checkpoints(network):
    lines = [
        f"{name} {'x'.join(map(str, tensor.shape))}"
        for name, tensor in network.state_dict().items()
    ]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == BENCHMARK[network.name]["state_dict"]


def test_parameter_count_is_that_of_the_benchmark(network):
    assert sum(p.numel() for p in network.parameters()) == BENCHMARK[network.name]["parameters"]


def test_unit_features_have_the_benchmarks_shapes_at_32_pixels(network):
    found, _ = features(network, torch.zeros(1, 3, 32, 32))
    assert [list(feature.shape[1:]) for feature in found] == BENCHMARK[network.name]["units"]


def test_penultimate_feature_has_the_benchmarks_size(network):
    last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    assert last.in_features == BENCHMARK[network.name]["penultimate"]


def test_logits_are_those_of_the_benchmark_for_weights_filled_by_its_recipe(name_and_filled):
    name, model = name_and_filled
    x = torch.from_numpy(np.random.RandomState(99).randn(2, 3, 32, 32))
    with torch.no_grad():
        logits = model(x)[:, :8]
    wanted = torch.tensor(BENCHMARK[name]["logits"], dtype=torch.float64)
    assert (logits - wanted).abs().max() < 1e-8 * wanted.abs().max()  # the figures have ten digits


@pytest.fixture(params=NAMES)
def name_and_filled(request):
    model = mhkd.build_model(request.param, 100).double().eval()
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        r, shape = np.random.RandomState(1000 + i), tuple(tensor.shape)
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif name.endswith("running_var"):
            value = r.uniform(0.5, 1.5, shape)
        elif name.endswith(("running_mean", "bias")):
            value = 0.1 * r.randn(*shape)
        elif len(shape) == 1:
            value = r.uniform(0.5, 1.5, shape)
        else:
            value = r.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))
        tensor.copy_(torch.as_tensor(value))
    return request.param, model


@pytest.mark.parametrize("size", [16, 64])
def test_forward_gives_logits_and_nothing_else_at_other_sizes(network, size):
    found, logits = features(network, torch.randn(1, 3, size, size))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (1, 100)
    assert logits.isfinite().all()
    strides = [32 / shape[1] for shape in BENCHMARK[network.name]["units"]]
    assert [feature.shape[-1] for feature in found] == [size / stride for stride in strides]


@pytest.mark.parametrize("size, side_of_the_last_block", [(16, 2), (32, 4), (48, 6), (64, 4)])
def test_vgg_pools_a_fourth_time_for_64_pixels_only(size, side_of_the_last_block):
    model = mhkd.build_model("vgg8", 10)
    sides = []
    model.block4.register_forward_hook(lambda module, args, out: sides.append(out.shape[-1]))
    model.eval()(torch.zeros(1, 3, size, size))
    assert sides == [side_of_the_last_block]


def test_number_of_classes_changes_the_classifier_alone(network):
    other = mhkd.build_model(network.name, 7)
    differing = [
        n for n, t in network.state_dict().items() if t.shape != other.state_dict()[n].shape
    ]
    assert differing == list(network.state_dict())[-2:]
    assert other.eval()(torch.zeros(1, 3, 16, 16)).shape == (1, 7)


@pytest.mark.parametrize("wrong, near", [
    ("resnet32x5", "resnet32x4"), ("ResNet8x4", "resnet8x4"), ("wrn-16-2", "wrn_16_2"), ("vgg18", "vgg8"),
    ("mobilenet_v2", "mobilenetv2"), ("shufflenet", "shufflenetv2"),
])  # fmt: skip
def test_an_unknown_network_is_refused_with_the_near_names(wrong, near):
    with pytest.raises(mhkd.UsageError, match=rf"'{wrong}'.*\b{near}\b"):
        mhkd.build_model(wrong, 10)


def test_a_name_like_nothing_is_refused_with_all_names():
    with pytest.raises(mhkd.UsageError) as error:
        mhkd.build_model("xyzzy", 10)
    assert all(name in str(error.value) for name in mhkd.MODELS)


@pytest.mark.parametrize("name", ["resnet32x4", "wrn_40_2", "vgg13", "mobilenetv2"])
def test_convolutions_start_normal_with_variance_two_over_fan_out(name):
    torch.manual_seed(0)
    weights = []
    for module in mhkd.build_model(name, 10).modules():
        if isinstance(module, nn.Conv2d):  # the depthwise ones too
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            weights.append(module.weight.detach().flatten() * (fan_out / 2) ** 0.5)
    weights = torch.cat(weights)
    assert weights.var().item() == pytest.approx(1, abs=0.02)
    assert weights.abs().max() > 4  # normal, not uniform, not truncated


@pytest.mark.parametrize("name", ["vgg13", "mobilenetv2"])
def test_linear_layers_of_vgg_and_mobilenetv2_start_with_standard_deviation_one_hundredth(name):
    torch.manual_seed(0)
    *_, last = (m for m in mhkd.build_model(name, 100).modules() if isinstance(m, nn.Linear))
    assert last.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert last.weight.abs().max() > 0.035  # normal
    assert not last.bias.any()


def test_shufflenetv2_starts_as_pytorch_does():
    torch.manual_seed(0)
    conv = mhkd.build_model("shufflenetv2", 10).layer3[0].conv3
    bound = conv.in_channels**-0.5
    assert conv.weight.abs().max() <= bound
    assert conv.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2"])
def test_a_published_checkpoint_loads_strictly(name, tmp_path):
    torch.manual_seed(1)
    published = mhkd.build_model(name, 100)
    content = {"epoch": 240, "model": published.state_dict(), "best_acc": torch.tensor(72.5)}
    torch.save(content, tmp_path / "teacher.pth")
    torch.manual_seed(2)
    model = mhkd.load_weights(mhkd.build_model(name, 100), tmp_path / "teacher.pth")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), published.eval()(x))


def test_a_bare_state_dict_loads_too(tmp_path):
    published = mhkd.build_model("vgg8", 5)
    torch.save(published.state_dict(), tmp_path / "weights.pt")
    model = mhkd.load_weights(mhkd.build_model("vgg8", 5), str(tmp_path / "weights.pt"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), published.parameters()))


def test_checkpoints_are_never_unpickled_as_code(tmp_path):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    model = mhkd.build_model("resnet8", 10)
    torch.save({"model": model.state_dict(), "extra": Harm()}, tmp_path / "bad.pt")
    with pytest.raises(mhkd.UsageError, match="bad.pt"):
        mhkd.load_weights(model, tmp_path / "bad.pt")
    assert not (tmp_path / "harm").exists()
