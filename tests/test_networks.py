"""The networks are those of the CRD benchmark: benchmark.json holds its figures."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mhkd
import mhkd_runs

BENCHMARK = json.loads(Path(__file__).with_name("benchmark.json").read_text())["networks"]


def filled(name):
    """A network with the weights for which the benchmark's logits are known."""
    model = mhkd.build_model(name, 100).double().eval()
    for i, (key, tensor) in enumerate(model.state_dict().items()):
        r, shape = np.random.RandomState(1000 + i), tuple(tensor.shape)
        if key.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif key.endswith(("running_mean", "bias")):
            value = 0.1 * r.randn(*shape)
        elif len(shape) == 1:
            value = r.uniform(0.5, 1.5, shape)
        else:
            value = r.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))
        tensor.copy_(torch.as_tensor(value))
    return model


def test_there_are_the_networks_of_the_benchmark_each_of_three_units():
    assert set(mhkd.MODELS) == set(BENCHMARK)
    assert set(mhkd.UNITS) == {kind for kind, _ in mhkd.MODELS.values()}
    assert {len(units) for units in mhkd.UNITS.values()} == {3}


@pytest.mark.parametrize("name", BENCHMARK)
def test_a_network_has_the_published_state_dict_logits_and_features_at_every_size(name):
    model, wanted = filled(name), BENCHMARK[name]
    state = model.state_dict()
    lines = (f"{key} {'x'.join(map(str, tensor.shape))}" for key, tensor in state.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == wanted["sha256"]
    network = mhkd.FeatureExtractor(model, mhkd.UNITS[type(model)], 100).eval()
    inputs = {32: torch.from_numpy(np.random.RandomState(99).randn(2, 3, 32, 32))}
    inputs |= {size: torch.zeros(2, 3, size, size, dtype=torch.float64) for size in (16, 64)}
    with torch.no_grad():
        outputs = {size: network(x) for size, x in inputs.items()}
    logits = torch.tensor(wanted["logits"], dtype=torch.float64)  # of ten digits
    assert (outputs[32].logits[:, :2] - logits).abs().max() < 1e-8 * logits.abs().max()
    *_, classifier = (m for m in model.modules() if isinstance(m, nn.Linear))
    torch.testing.assert_close(classifier(outputs[32].penultimate), outputs[32].logits)
    for size, found in outputs.items():
        assert found.logits.shape == (2, 100) and found.logits.isfinite().all()
        shapes = [(C, H * size / 32, W * size / 32) for C, H, W in wanted["units"]]
        assert [feature.shape[1:] for feature in found.features.values()] == shapes
    other = mhkd.build_model(name, 7)
    differing = [key for key, t in other.state_dict().items() if t.shape != state[key].shape]
    assert differing == list(state)[-2:]  # the classifier alone
    assert other.eval()(torch.zeros(1, 3, 16, 16)).shape == (1, 7)


def test_vgg_pools_a_fourth_time_for_64_pixels_only():
    network = mhkd.FeatureExtractor(mhkd.build_model("vgg8", 10), ["block4"], 10).eval()
    for size, side in ((16, 2), (32, 4), (48, 6), (64, 4)):
        assert network(torch.zeros(1, 3, size, size)).features[1].shape[-1] == side


@pytest.mark.parametrize("wrong, near", [
    ("resnet32x5", ["resnet32x4"]), ("ResNet8x4", ["resnet8x4"]), ("wrn-16-2", ["wrn_16_2"]),
    ("vgg18", ["vgg8"]), ("mobilenet_v2", ["mobilenetv2"]), ("shufflenet", ["shufflenetv2"]),
    ("xyzzy", list(BENCHMARK)),
])  # fmt: skip
def test_an_unknown_network_is_refused_with_the_near_names_or_all(wrong, near):
    with pytest.raises(mhkd.UsageError, match=f"'{wrong}'") as error:
        mhkd.build_model(wrong, 10)
    assert {*near} <= {*str(error.value).replace(",", "").rstrip("?.").split()}


@pytest.mark.parametrize("name", ["resnet32x4", "wrn_40_2", "vgg13", "mobilenetv2"])
def test_weights_start_as_those_of_the_benchmark(name):
    torch.manual_seed(0)
    model, weights = mhkd.build_model(name, 100), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # variance 2 / fan_out; the depthwise ones too
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            weights.append(module.weight.detach().flatten() * (fan_out / 2) ** 0.5)
    weights = torch.cat(weights)
    assert weights.var().item() == pytest.approx(1, abs=0.02)
    assert weights.abs().max() > 4  # normal, not uniform, not truncated
    if name in ("vgg13", "mobilenetv2"):
        *_, last = (m for m in model.modules() if isinstance(m, nn.Linear))
        assert last.weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert last.weight.abs().max() > 0.035  # normal
        assert not last.bias.any()


def test_shufflenetv2_starts_as_pytorch_does():
    torch.manual_seed(0)
    weight = mhkd.build_model("shufflenetv2", 10).layer3[0].conv3.weight  # uniform
    assert weight.abs().max() <= weight.shape[1] ** -0.5
    assert weight.std().item() == pytest.approx((3 * weight.shape[1]) ** -0.5, rel=0.02)


@pytest.mark.parametrize("published", [False, True])
def test_a_published_checkpoint_or_a_bare_state_dict_loads(published, tmp_path):
    network, other = (mhkd.build_model("mobilenetv2", 100) for _ in range(2))
    state = network.state_dict()
    content = {"epoch": 240, "model": state, "best_acc": torch.tensor(72.5)}
    torch.save(content if published else state, tmp_path / "teacher.pth")
    loaded = mhkd_runs.load_weights(other, tmp_path / "teacher.pth").state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.items())
