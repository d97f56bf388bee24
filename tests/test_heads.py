"""Auxiliary heads on anybody's network, from outside (section 3.1)."""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mhkd

torchvision_models = pytest.importorskip("torchvision.models")
RESNET18 = ["layer1", "layer2", "layer3"]


class Small(nn.Module):
    """A network of somebody else's: an in-place ReLU right after `unit`, and a layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.unit = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.relu = nn.ReLU(inplace=True)
        self.twice = nn.Conv2d(6, 6, 1)
        self.flat = nn.Flatten()
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = self.twice(self.twice(self.relu(self.unit(x))))
        return self.fc(self.flat(F.adaptive_avg_pool2d(x, 1)))


def small(**keywords):
    torch.manual_seed(0)
    return mhkd.MultiHead(Small(), ["unit"], 5, width=8, **keywords)


def images(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=dtype).to(device)


@pytest.mark.parametrize("build, units, channels", [
    (torchvision_models.resnet18, RESNET18, [64, 128, 256]),
    (torchvision_models.mobilenet_v2, ["features.3", "features.6", "features.13"], [24, 32, 96]),
    (torchvision_models.vgg11_bn, ["features.1", "features.5", "features.12"], [64, 128, 256]),
])  # fmt: skip
def test_heads_fit_torchvision_networks(build, units, channels):
    network = mhkd.MultiHead(build(num_classes=10), units, 10).eval()
    assert [head[0].in_channels for head in network.heads] == channels
    with torch.no_grad():
        outputs = network(images(2, 3, 64, 64))
    assert [output.shape for output in outputs] == [(2, 10)] * 4


def test_heads_fit_a_timm_network():
    timm = pytest.importorskip("timm")
    network = mhkd.MultiHead(timm.create_model("resnet10t", num_classes=10), RESNET18, 10).eval()
    outputs = network(images(2, 3, 64, 64))
    assert [output.shape for output in outputs] == [(2, 10)] * 4


def test_first_logits_are_those_of_the_network_itself():
    plain = torchvision_models.resnet18(num_classes=10).eval()
    x = images(2, 3, 32, 32)
    wanted = plain(x)
    network = mhkd.MultiHead(plain, RESNET18, 10).eval()
    assert torch.equal(network(x)[0], wanted)


@pytest.mark.parametrize("unit", ["features.1", "features.5"])  # batch norms that an in-place ReLU follows
def test_the_feature_is_what_the_submodule_returned_though_the_next_works_in_place(unit):
    torch.manual_seed(0)
    vgg = torchvision_models.vgg11_bn(num_classes=4).eval()
    network = mhkd.MultiHead(vgg, [unit], 4, width=8).eval()
    x = images(2, 3, 32, 32)
    feature = vgg.features[: int(unit.split(".")[1]) + 1](x)  # ends before the ReLU
    assert (feature < 0).any()
    assert torch.equal(network(x)[1], network.heads[0](feature))


def test_gradients_through_a_head_are_right_though_the_next_operation_works_in_place():
    network = small().double()
    x = images(4, 3, 8, 8, dtype=torch.float64)
    network(x)[1].square().sum().backward()
    found = network.model.unit[0].weight.grad.clone()
    network.zero_grad()
    network.heads[0](network.model.unit(x)).square().sum().backward()  # the same without the rest of the network
    torch.testing.assert_close(found, network.model.unit[0].weight.grad)


def test_a_head_is_two_convolutions_of_256_kernels_and_two_linear_layers():
    head = mhkd.AuxHead(24, 100)
    convs = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    linears = [m for m in head.modules() if isinstance(m, nn.Linear)]
    assert [(c.in_channels, c.out_channels, c.kernel_size) for c in convs] == [(24, 256, (3, 3)), (256, 256, (3, 3))]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in head.modules()) == 2
    assert [linear.out_features for linear in linears] == [256, 100]


def test_a_heads_stride_changes_its_map_but_not_its_parameters():
    sides = {}
    for stride in (1, 2):
        head = mhkd.AuxHead(3, 10, width=4, stride=stride)
        convs = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
        convs[1].register_forward_hook(lambda module, args, out, stride=stride: sides.update({stride: out.shape[-1]}))
        assert head.eval()(images(1, 3, 32, 32)).shape == (1, 10)
        assert sum(p.numel() for p in head.parameters()) == 4 * 3 * 9 + 4 * 4 * 9 + 16 + 4 * 4 + 4 + 4 * 10 + 10
    assert sides == {1: 32, 2: 8}


@pytest.mark.parametrize("call", [
    lambda network: network.train(),
    lambda network: network.model.train(),
    lambda network: network.train().model.train(),
    lambda network: network.model.layer2.train(),
    lambda network: [module.train() for module in network.modules()],
    lambda network: nn.Sequential(network).train(),
], ids=["the whole", "the backbone", "both", "a part of the backbone", "every module", "a parent"])  # fmt: skip
def test_a_frozen_backbone_stays_as_it_is_whatever_train_is_called(call, device):
    torch.manual_seed(0)
    network = mhkd.MultiHead(mhkd.build_model("resnet8", 10).to(device), RESNET18, 10, frozen=True, width=8)
    before = copy.deepcopy(network.model.state_dict())
    x = images(4, 3, 32, 32, device=device)
    wanted = network.eval()(x)[0]
    call(network)
    outputs = network(x)
    sum(output.sum() for output in outputs if output.requires_grad).backward()
    after = network.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)  # the running statistics too
    assert torch.equal(outputs[0], wanted)


def test_a_frozen_backbone_gets_no_gradient_though_somebody_asks_for_one():
    network = small(frozen=True).train()
    network.model.requires_grad_(True)
    outputs = network(images(4, 3, 8, 8))
    assert not outputs[0].requires_grad
    outputs[1].sum().backward()
    assert all(p.grad is None for p in network.model.parameters())


def test_heads_of_a_frozen_backbone_train():
    network = small(frozen=True).train()
    mean = network.heads[0][1].running_mean.clone()
    network(images(4, 3, 8, 8))[1].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.heads[0].parameters() if p.dim() > 1)
    assert not torch.equal(network.heads[0][1].running_mean, mean)


def test_making_the_heads_leaves_the_network_as_it_was():
    plain = torchvision_models.resnet18(num_classes=10)
    plain.layer2.eval()
    before = copy.deepcopy(plain.state_dict())
    modes = [module.training for module in plain.modules()]
    mhkd.MultiHead(plain, RESNET18, 10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    assert [module.training for module in plain.modules()] == modes


def test_the_plain_networks_state_dict_has_no_head_entries():
    network = small()
    assert network.model.state_dict().keys() == Small().state_dict().keys()


def test_the_plain_network_holds_no_features_after_it_was_used_alone():
    network = small()
    reference = torch.nn.utils.parameters_to_vector(network.model.parameters())
    network.model(images(2, 3, 8, 8))
    buffer = io.BytesIO()
    pickle.dump(network.model, buffer)
    assert buffer.tell() < 4 * reference.numel() + 20_000  # weights and code references, no feature maps


def test_the_plain_network_can_be_pickled():
    plain = small().model.eval()
    again = pickle.loads(pickle.dumps(plain))
    x = images(2, 3, 8, 8)
    assert torch.equal(again(x), plain(x))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["deepcopy", "pickle"])
def test_a_copy_works_and_is_independent_of_the_original(again):
    network = small().eval()
    x = images(2, 3, 8, 8)
    other = again(network)
    assert all(torch.equal(a, b) for a, b in zip(other(x), network(x)))
    with torch.no_grad():
        network.model.unit[0].weight.zero_()
    assert not torch.equal(other(x)[1], network(x)[1])


def test_two_multiheads_on_one_backbone_do_not_disturb_each_other():
    plain = mhkd.build_model("resnet8", 10).eval()
    first = mhkd.MultiHead(plain, ["layer1"], 10, width=8).eval()
    x = images(2, 3, 32, 32)
    wanted = first(x)
    second = mhkd.MultiHead(plain, ["layer1", "layer3"], 10, width=4).eval()
    features = {}
    plain.layer1.register_forward_hook(lambda module, args, out: features.update(layer1=out.clone()))
    assert all(torch.equal(a, b) for a, b in zip(first(x), wanted))
    assert torch.equal(second(x)[1], second.heads[0](features["layer1"]))


def test_a_multihead_works_again_after_a_forward_pass_that_failed():
    network = small().eval()
    x = images(2, 3, 8, 8)
    wanted = network(x)
    with pytest.raises(RuntimeError):
        network(images(2, 4, 8, 8))
    network.model(images(2, 3, 16, 16))
    assert all(torch.equal(a, b) for a, b in zip(network(x), wanted))


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv2"])
def test_the_penultimate_feature_is_the_classifiers_input(name):
    model = mhkd.build_model(name, 10).eval()
    network = mhkd.MultiHead(model, mhkd.UNITS[name], 10, width=4).eval()
    (*logits,), feature = network(images(2, 3, 32, 32), penultimate=True)
    *_, classifier = (m for m in model.modules() if isinstance(m, nn.Linear))
    assert feature.shape == (2, classifier.in_features)
    torch.testing.assert_close(classifier(feature), logits[0])


def test_the_classifier_can_be_named():
    network = mhkd.MultiHead(torchvision_models.vgg11_bn(num_classes=4), [], 4, classifier="classifier.3").eval()
    _, feature = network(images(1, 3, 32, 32), penultimate=True)
    assert feature.shape == (1, 4096)
    assert (feature >= 0).all()


def test_penultimate_feature_of_a_network_without_linear_layer_is_refused():
    plain = nn.Sequential(OrderedDict(unit=nn.Conv2d(3, 4, 3), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten()))
    network = mhkd.MultiHead(plain, ["unit"], 4, width=4)
    assert len(network(images(2, 3, 8, 8))) == 2
    with pytest.raises(mhkd.UsageError, match="classifier"):
        network(images(2, 3, 8, 8), penultimate=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_heads_take_the_networks_dtype_and_device(dtype, device):
    network = mhkd.MultiHead(Small().to(device, dtype), ["unit"], 5, width=8).eval()
    outputs = network(images(2, 3, 8, 8).to(device, dtype))
    assert [(o.dtype, o.device.type) for o in outputs] == [(dtype, device.type)] * 2


def test_a_network_of_grey_images_is_probed_with_grey_images():
    plain = nn.Sequential(OrderedDict(unit=nn.Conv2d(1, 4, 3), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten()))
    assert mhkd.MultiHead(plain, ["unit"], 4).heads[0][0].in_channels == 4


def test_a_network_of_a_fixed_larger_input_takes_an_example():
    plain = nn.Sequential(OrderedDict(unit=nn.Conv2d(3, 2, 3), flat=nn.Flatten(), fc=nn.Linear(2 * 10 * 10, 3)))
    network = mhkd.MultiHead(plain, ["unit"], 3, example_input=torch.zeros(2, 3, 12, 12))
    assert [o.shape for o in network(images(4, 3, 12, 12))] == [(4, 3)] * 2


@pytest.mark.parametrize("arguments, message", [
    ((["layer4"], 5), "no submodule 'layer4'.*unit.*relu.*twice"),
    ((["relu6"], 5), "did you mean relu"),
    (([""], 5), "no submodule ''"),
    ((["twice"], 5), "'twice' runs 2 times"),
    ((["flat"], 5), r"'flat' returns \[1, 6\], not a feature"),
    ((["unit"], 7), r"\[1, 5\], not logits \[1, 7\]"),
])  # fmt: skip
def test_units_that_cannot_carry_a_head_are_refused(arguments, message):
    with pytest.raises(mhkd.UsageError, match=message):
        mhkd.MultiHead(Small(), *arguments)


def test_a_submodule_that_never_runs_is_refused():
    plain = Small()
    plain.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(mhkd.UsageError, match="'spare' runs 0 times"):
        mhkd.MultiHead(plain, ["spare"], 5)


def test_a_network_that_cannot_take_the_example_is_refused():
    plain = nn.Sequential(OrderedDict(unit=nn.Conv2d(3, 2, 3), flat=nn.Flatten(), fc=nn.Linear(2 * 10 * 10, 3)))
    with pytest.raises(mhkd.UsageError, match="example_input"):
        mhkd.MultiHead(plain, ["unit"], 3)


def test_a_refused_network_is_left_without_hooks_and_in_its_mode():
    plain = Small()
    with pytest.raises(mhkd.UsageError):
        mhkd.MultiHead(plain, ["twice"], 5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    assert plain.training


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_whole_it_gives_the_same_outputs_and_gradients(frozen):
    network = small(frozen=frozen).train()
    compiled = torch.compile(copy.deepcopy(network), fullgraph=True, backend="aot_eager")
    x = images(4, 3, 8, 8)
    for one in (network, compiled):
        sum(output.square().sum() for output in one(x)[int(frozen) :]).backward()
    for p, q in zip(network.parameters(), compiled.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad)


def test_compiled_whole_with_inductor_it_gives_the_same_outputs(device):
    network = mhkd.MultiHead(Small().to(device), ["unit"], 5, width=4).eval()
    x = images(2, 3, 8, 8, device=device)
    with torch.no_grad():
        outputs = torch.compile(network, fullgraph=True)(x)
        for found, wanted in zip(outputs, network(x)):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_torchvision_network_compiles_whole_with_its_penultimate_feature():
    network = mhkd.MultiHead(torchvision_models.vgg11_bn(num_classes=10), ["features.1"], 10, width=4).eval()
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        outputs, feature = torch.compile(network, fullgraph=True, backend="eager")(x, penultimate=True)
        assert torch.equal(feature, network(x, penultimate=True)[1])
        assert all(torch.equal(a, b) for a, b in zip(outputs, network(x)))


def test_remove_leaves_the_network_as_plain_as_it_came():
    network = mhkd.build_model("resnet8", 10)
    multi = mhkd.MultiHead(network, ["layer1", "layer2"], 10)
    assert multi.remove() is network
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    torch.jit.script(network)  # refuses a network with hooks of ours


def test_features_with_the_channels_last_are_refused():
    models = pytest.importorskip("torchvision.models")
    with pytest.raises(mhkd.UsageError, match="features.1.*channels last"):
        mhkd.MultiHead(models.swin_t(num_classes=10), ["features.1"], 10)


def test_a_bare_string_is_no_list_of_units():
    with pytest.raises(mhkd.UsageError, match=r"\['layer1'\]"):
        mhkd.MultiHead(mhkd.build_model("resnet8", 10), "layer1", 10)


def test_a_network_whose_training_output_is_no_tensor_is_refused_when_it_comes():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 10, 3)

        def forward(self, x):
            logits = self.layer(x).mean(dim=(2, 3))
            return (logits, logits) if self.training else logits

    multi = mhkd.MultiHead(Auxiliary(), ["layer"], 10)
    with pytest.raises(mhkd.UsageError, match="tuple"):
        multi(images(2, 3, 8, 8))
