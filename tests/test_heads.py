"""Auxiliary heads on anybody's network, from outside (section 3.1)."""

import copy
import dataclasses
import gc
import io
import pickle
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mhkd

UNITS = ["layer1", "layer2", "layer3"]


class Small(nn.Module):
    """Somebody else's network: an in-place ReLU right after `unit`, a layer that runs twice."""

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


def without_linear(channels=3):
    layers = {"unit": nn.Conv2d(channels, 4, 3), "pool": nn.AdaptiveAvgPool2d(1)}
    return nn.Sequential(OrderedDict(**layers, flat=nn.Flatten()))


def of_twelve_pixels():
    layers = {"unit": nn.Conv2d(3, 2, 3), "flat": nn.Flatten(), "fc": nn.Linear(2 * 10 * 10, 3)}
    return nn.Sequential(OrderedDict(layers))


def images(*shape, dtype=torch.float32, device="cpu", seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).to(device)


def hooked(network):
    return [name for name, m in network.named_modules() if m._forward_hooks or m._forward_pre_hooks]


def test_first_logits_are_those_of_the_network_itself():
    plain = mhkd.build_model("resnet8", 10).eval()
    x = images(2, 3, 32, 32)
    wanted = plain(x)
    assert torch.equal(mhkd.MultiHead(plain, UNITS, 10).eval()(x)[0], wanted)


def test_the_feature_is_what_the_submodule_returned_though_the_next_works_in_place():
    network = small().eval()
    x = images(2, 3, 8, 8)
    feature = network.model.unit(x)
    assert (feature < 0).any()  # the ReLU comes later
    assert torch.equal(network(x)[1], network.heads["1"](feature))


def test_gradients_through_a_head_are_right_though_the_next_operation_works_in_place():
    network = small().double()
    x = images(4, 3, 8, 8, dtype=torch.float64)
    network(x)[1].square().sum().backward()
    found = network.model.unit[0].weight.grad.clone()
    network.zero_grad()
    network.heads["1"](network.model.unit(x)).square().sum().backward()  # the same, alone
    torch.testing.assert_close(found, network.model.unit[0].weight.grad)


def test_a_head_is_two_convolutions_of_256_kernels_and_two_linear_layers():
    head = mhkd.AuxHead(24, 100)
    convs = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    linears = [m for m in head.modules() if isinstance(m, nn.Linear)]
    shapes = [(c.in_channels, c.out_channels, c.kernel_size, c.stride) for c in convs]
    assert shapes == [(24, 256, (3, 3), (1, 1)), (256, 256, (3, 3), (1, 1))]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in head.modules()) == 2
    assert [linear.out_features for linear in linears] == [256, 100]


def test_a_head_starts_as_pytorch_does_with_biases():
    torch.manual_seed(0)
    for layer in mhkd.AuxHead(24, 100).modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            bound = layer.weight[0].numel() ** -0.5  # uniform
            assert 0.95 * bound < layer.weight.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
            assert layer.bias.any()


def test_a_heads_stride_changes_its_map_but_not_its_parameters():
    sides = {}
    for stride in (1, 2):
        head = mhkd.AuxHead(3, 10, width=4, stride=stride).eval()
        sides[stride] = nn.Sequential(*list(head)[:4])(images(1, 3, 32, 32)).shape[-1]
        assert head(images(1, 3, 32, 32)).shape == (1, 10)
        counts = (4 * 3 * 9 + 4, 4 * 4 * 9 + 4, 16, 4 * 4 + 4, 4 * 10 + 10)
        assert sum(p.numel() for p in head.parameters()) == sum(counts)
    assert sides == {1: 32, 2: 8}


@pytest.mark.parametrize("call", [
    lambda network: network.train(),
    lambda network: network.model.train(),
    lambda network: network.train().model.train(),
    lambda network: network.model.layer2.train(),
    lambda network: [module.train() for module in network.modules()],
    lambda network: nn.Sequential(network).train(),
], ids=["the whole", "the backbone", "both", "a part", "every module", "a parent"])  # fmt: skip
def test_a_frozen_backbone_stays_as_it_is_whatever_train_is_called(call, device):
    torch.manual_seed(0)
    plain = mhkd.build_model("resnet8", 10).to(device)
    network = mhkd.MultiHead(plain, UNITS, 10, frozen=True, width=8)
    before = copy.deepcopy(network.model.state_dict())
    x = images(4, 3, 32, 32, device=device)
    wanted = network.eval()(x)[0]
    call(network)
    outputs = network(x)
    sum(output.sum() for output in outputs if output.requires_grad).backward()
    after = network.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)  # running statistics, too
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
    head = network.heads["1"]
    mean = head[1].running_mean.clone()
    network(images(4, 3, 8, 8))[1].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters() if p.dim() > 1)
    assert not torch.equal(head[1].running_mean, mean)


def test_making_the_heads_leaves_the_network_as_it_was():
    plain = mhkd.build_model("resnet8", 10)
    plain.layer2.eval()
    before = copy.deepcopy(plain.state_dict())
    modes = [module.training for module in plain.modules()]
    mhkd.MultiHead(plain, UNITS, 10)
    assert all(torch.equal(t, before[name]) for name, t in plain.state_dict().items())
    assert [module.training for module in plain.modules()] == modes


def test_the_plain_networks_state_dict_has_no_head_entries():
    assert small().model.state_dict().keys() == Small().state_dict().keys()


# Copies, files and the end


def saved(network):
    buffer = io.BytesIO()
    torch.save(network, buffer)
    return buffer


@pytest.mark.parametrize("fails", [False, True])
def test_copies_and_files_of_the_plain_network_carry_nothing_of_ours_after_calls(fails):
    layers = OrderedDict(unit=nn.Conv2d(3, 6, 3), flat=nn.Flatten(), fc=nn.Linear(6 * 36, 5))
    example = torch.zeros(1, 3, 8, 8)
    network = mhkd.MultiHead(nn.Sequential(layers), ["unit"], 5, width=4, example_input=example)
    network(images(2, 3, 8, 8))
    if fails:
        with pytest.raises(RuntimeError):
            network(images(2, 3, 9, 9))  # after the unit has run
    assert not hooked(network.model) and not hooked(copy.deepcopy(network.model))
    buffer = saved(network.model)
    assert b"mhkd" not in buffer.getvalue()  # it loads where there is no mhkd.py
    assert buffer.tell() < 4 * sum(p.numel() for p in network.model.parameters()) + 5_000
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert not hooked(again) and torch.equal(again(example), network.model(example))


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_a_copy_made_while_the_network_runs_works_disturbs_nothing_and_keeps_no_features():
    network, copies = small().eval(), []
    x, y = images(2, 3, 8, 8), images(2, 3, 8, 8, seed=8)
    wanted = network(x)

    def theirs(*_):
        if not copies:  # the copy has this hook, too
            copies.append(copy.deepcopy(network.model))

    handle = network.model.relu.register_forward_hook(theirs)
    found = network(x)
    handle.remove()
    same = [torch.equal(copies[0](y), network.model(y))]
    before = tensors_alive()
    same.append(torch.equal(copies[0](y), network.model(y)))
    assert all(same) and tensors_alive() == before
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    assert all(torch.equal(a, b) for a, b in zip(network(x), wanted))


@pytest.mark.parametrize("again", [
    copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network)),
], ids=["deepcopy", "pickle"])  # fmt: skip
def test_a_copy_works_and_is_independent_of_the_original(again):
    network = small().eval()
    x = images(2, 3, 8, 8)
    other = again(network)
    assert all(torch.equal(a, b) for a, b in zip(other(x), network(x)))
    with torch.no_grad():
        network.model.unit[0].weight.zero_()
    assert not torch.equal(other(x)[1], network(x)[1])


def test_remove_gives_the_plain_network_and_a_later_call_is_told_so():
    network = small()
    plain = network.model
    network(images(2, 3, 8, 8))
    assert network.remove() is plain and not hooked(plain)
    with pytest.raises(mhkd.UsageError, match=r"remove\(\) has ended"):
        network(images(2, 3, 8, 8))
    assert plain(images(2, 3, 8, 8)).shape == (2, 5)


# Several at once


def in_threads(calls):
    """The results of functions that run at the same time."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call(), calls))


@pytest.fixture
def frequent_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("count", [2, 5])
def test_threads_that_call_one_multihead_at_once_get_their_own_features(count, frequent_switches):
    network = small().eval()
    inputs = [images(2, 3, 8, 8, seed=i) for i in range(count)]
    with torch.no_grad():
        wanted = [network(x) for x in inputs]

    def many(x):
        with torch.no_grad():
            return [network(x) for _ in range(60)]

    for found, right in zip(in_threads([lambda x=x: many(x) for x in inputs]), wanted):
        for outputs in found:  # another thread's input gives quite others
            torch.testing.assert_close(outputs, right)
    assert not hooked(network.model)


def replica_of(network):
    """As torch.nn.parallel.replicate makes one, here on the CPU."""
    replicas = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = child and replicas[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter)
    return replicas[network]


@pytest.mark.parametrize("frozen", [False, True])
def test_replicas_as_data_parallel_makes_them_give_their_own_features(frozen, frequent_switches):
    network = small(frozen=frozen).eval()
    inputs = [images(2, 3, 8, 8, seed=i) for i in range(3)]
    for _ in range(15):
        replicas = [replica_of(network) for _ in inputs]
        calls = [lambda r=r, x=x: r(x) for r, x in zip(replicas, inputs)]
        for found, x in zip(in_threads(calls), inputs):
            torch.testing.assert_close(found, network(x))
    network.zero_grad()
    replica_of(network)(inputs[0])[1].sum().backward()
    assert (network.model.unit[0].weight.grad is None) == frozen
    assert network.heads["1"][0].weight.grad.any()


def test_two_multiheads_on_one_backbone_do_not_disturb_each_other():
    plain = mhkd.build_model("resnet8", 10).eval()
    first = mhkd.MultiHead(plain, ["layer1"], 10, width=8).eval()
    x = images(2, 3, 32, 32)
    wanted = first(x)
    second = mhkd.MultiHead(plain, ["layer1", "layer3"], 10, width=4).eval()
    found = second(x)
    assert all(torch.equal(a, b) for a, b in zip(first(x), wanted))
    assert torch.equal(found[1], second.heads["1"](plain.layer1(F.relu(plain.bn1(plain.conv1(x))))))


def test_a_multihead_works_again_after_a_forward_pass_that_failed():
    network = small().eval()
    x = images(2, 3, 8, 8)
    wanted = network(x)
    with pytest.raises(RuntimeError):
        network(images(2, 4, 8, 8))
    network.model(images(2, 3, 16, 16))
    assert all(torch.equal(a, b) for a, b in zip(network(x), wanted))


# The penultimate feature


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv2"])
def test_the_penultimate_feature_is_the_classifiers_input(name):
    model = mhkd.build_model(name, 10).eval()
    network = mhkd.MultiHead(model, mhkd.UNITS[type(model)], 10, width=4).eval()
    logits, feature = network(images(2, 3, 32, 32), penultimate=True)
    *_, classifier = (m for m in model.modules() if isinstance(m, nn.Linear))
    assert feature.shape == (2, classifier.in_features)
    torch.testing.assert_close(classifier(feature), logits[0])


def test_the_classifier_can_be_named():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4))
    example = torch.zeros(1, 3, 2, 2)
    for name, width in ((None, 6), ("1", 12)):
        network = mhkd.MultiHead(plain, [], 4, classifier=name, example_input=example)
        assert network(images(2, 3, 2, 2), penultimate=True)[1].shape == (2, width)


def test_penultimate_feature_of_a_network_without_linear_layer_is_refused():
    network = mhkd.MultiHead(without_linear(), ["unit"], 4, width=4)
    assert len(network(images(2, 3, 8, 8))) == 2
    with pytest.raises(mhkd.UsageError, match="classifier"):
        network(images(2, 3, 8, 8), penultimate=True)


# What is put in


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_heads_take_the_networks_dtype_and_device(dtype, device):
    network = mhkd.MultiHead(Small().to(device, dtype), ["unit"], 5, width=8).eval()
    outputs = network(images(2, 3, 8, 8).to(device, dtype))
    assert [(o.dtype, o.device.type) for o in outputs] == [(dtype, device.type)] * 2


def test_a_network_of_grey_images_is_run_on_grey_images():
    assert mhkd.MultiHead(without_linear(1), ["unit"], 4).heads["1"][0].in_channels == 4


def test_a_network_of_a_fixed_larger_input_takes_an_example():
    example = torch.zeros(2, 3, 12, 12)
    network = mhkd.MultiHead(of_twelve_pixels(), ["unit"], 3, example_input=example)
    assert [o.shape for o in network(images(4, 3, 12, 12))] == [(4, 3)] * 2
    with pytest.raises(mhkd.UsageError, match="example_input"):
        mhkd.MultiHead(of_twelve_pixels(), ["unit"], 3)


class Text(nn.Module):
    """Token numbers [B, N] to a dataclass, as networks for text have it."""

    Result = dataclasses.make_dataclass("Result", ["logits"])

    def __init__(self):
        super().__init__()
        self.embedding, self.fc = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, tokens):
        return self.Result(self.fc(self.embedding(tokens).mean(dim=1)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_text_network_works_with_no_units_and_its_integers_stay_integers(dtype):
    plain, tokens = Text().to(torch.bfloat16), torch.ones(2, 16, dtype=dtype)
    with pytest.raises(mhkd.UsageError, match="returns Result, not logits.*output="):
        mhkd.MultiHead(plain, [], 3, example_input=tokens)
    network = mhkd.MultiHead(plain, [], 3, example_input=tokens, output=lambda r: r.logits)
    (logits,), feature = network(tokens, penultimate=True)
    assert torch.equal(logits, plain(tokens).logits) and feature.shape == (2, 8)
    with pytest.raises(mhkd.UsageError, match="'embedding'.*16 tokens are no square map"):
        mhkd.MultiHead(plain, ["embedding"], 3, example_input=tokens, output=lambda r: r.logits)


# What is refused


@pytest.mark.parametrize("arguments, message", [
    ((["layer4"], 5), "no submodule 'layer4'.*unit.*relu.*twice"),
    ((["relu6"], 5), "did you mean relu"),
    (([""], 5), "no submodule ''"),
    ((["twice"], 5), "'twice' ran 2 times"),
    ((["spare"], 5), "'spare' did not run"),
    ((["flat"], 5), r"'flat' returns \(1, 6\), not a feature"),
    ((["unit"], 7), r"\(1, 5\), not logits \[B, 7\]"),
    (("unit", 5), r"\['unit'\]"),
])  # fmt: skip
def test_units_that_cannot_carry_a_head_are_refused_and_leave_no_trace(arguments, message):
    plain = Small()
    plain.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(mhkd.UsageError, match=message):
        mhkd.MultiHead(plain, *arguments)
    assert not hooked(plain) and plain.training


class InTraining(nn.Module):
    """In training mode it applies `change`."""

    def __init__(self, layer, change):
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, x):
        x = self.layer(x)
        return self.change(x) if self.training else x


class Pool(nn.Module):
    def forward(self, x):
        while not isinstance(x, torch.Tensor):
            x = next(iter(x.values() if isinstance(x, dict) else x))
        return x.flatten(2).mean(dim=2 if x.dim() == 4 else 1)


@pytest.mark.parametrize("change, whole, message", [
    (lambda x: (x, x), False, "'layer' returns tuple"),
    (lambda x: {"x": x}, False, "'layer' returns dict"),
    (lambda x: x.flatten(2).transpose(1, 2), False, r"'layer' returns \(2, 64, 4\).*not a feature"),
    (lambda x: (x, x), True, "network returns tuple, not logits"),
    (lambda x: {"x": x}, True, "network returns dict, not logits"),
], ids=["tuple", "dict", "tokens", "logits tuple", "logits dict"])  # fmt: skip
def test_what_is_no_feature_or_no_logits_in_training_mode_only_is_refused(change, whole, message):
    conv, fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)
    layer = conv if whole else InTraining(conv, change)
    plain = nn.Sequential(OrderedDict(layer=layer, pool=Pool(), fc=fc))
    unit = "layer.layer" if whole else "layer"
    network = mhkd.MultiHead(InTraining(plain, change) if whole else plain, [unit], 5, width=4)
    x = images(2, 3, 8, 8)
    assert len(network.eval()(x)) == 2
    with pytest.raises(mhkd.UsageError, match=message):
        network.train()(x)
    assert not hooked(network)


# torch.compile


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
    assert not hooked(compiled)


@pytest.mark.parametrize("replaces", [False, True])
def test_compiled_or_not_hooks_of_somebody_elses_on_a_unit_stay_and_work(replaces):
    network, calls = small().eval(), []
    x = images(2, 3, 8, 8)

    def theirs(module, args, output):
        calls.append(1)
        return 2 * output if replaces else None

    plain = network(x)
    handle = network.model.unit.register_forward_hook(theirs)
    wanted = network(x)
    assert len(calls) == 1 and torch.equal(wanted[1], plain[1]) != replaces
    found = torch.compile(network, fullgraph=True, backend="eager")(x)
    assert len(calls) == 2 and all(torch.equal(a, b) for a, b in zip(found, wanted))
    assert list(network.model.unit._forward_hooks.values()) == [theirs]
    handle.remove()
    assert not hooked(network)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_it_leaves_no_hook_behind_also_where_the_network_raises(fullgraph):
    class Raising(Small):
        def forward(self, x):
            logits = super().forward(x)
            if x.shape[0] == 3:
                raise RuntimeError("three")
            return logits

    network = mhkd.MultiHead(Raising(), ["unit"], 5, width=4).eval()
    compiled = torch.compile(network, fullgraph=fullgraph, backend="eager", dynamic=False)
    wanted = network(images(2, 3, 8, 8))
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(compiled(images(2, 3, 8, 8)), wanted))
        with pytest.raises((RuntimeError, torch._dynamo.exc.Unsupported)):
            compiled(images(3, 3, 8, 8))
        assert not hooked(network)
