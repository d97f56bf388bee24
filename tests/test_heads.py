"""Auxiliary heads on anybody's network, from outside (section 3.1)."""

import copy
import dataclasses
import gc
import io
import pickle
import sys
import warnings
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


def images(*shape, dtype=torch.float32, device="cpu", seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).to(device)


X, ONE = images(2, 3, 8, 8), torch.ones(2, 4)


def test_frozen_heads_stay_in_eval_mode_and_give_no_gradients():
    network = small(frozen=True).train()
    assert network.heads.training and not network.model.training
    before = {name: t.clone() for name, t in network.state_dict().items()}
    assert network.freeze_heads() is network
    network.train()
    assert not any(m.training for m in (network.model, *network.heads.modules()))
    assert not any(z.requires_grad for z in network(X))
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())


@pytest.mark.parametrize("how", ["no_grad", "eval", "requires_grad_"])
def test_heads_of_a_frozen_network_that_do_not_learn_are_warned_of(how):
    network = small(frozen=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(X)  # they learn
        with torch.no_grad():
            copy.deepcopy(network).eval()(X)  # a test
            copy.deepcopy(network).freeze_heads()(X)
    if how == "eval":
        network.eval()
    elif how == "requires_grad_":
        network.requires_grad_(False)
    with torch.set_grad_enabled(how != "no_grad"):
        with pytest.warns(UserWarning, match="train mode.*but they are in .*: call freeze_heads"):
            network(X)


def test_a_student_that_learns_from_heads_that_have_never_learned_is_warned_of():
    teacher, student, y = small(frozen=True), small(), torch.tensor([1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            targets = teacher.eval()(X)  # a test before the training
            mhkd.mhkd_loss(student(X), targets, y)
            frozen = copy.deepcopy(teacher).freeze_heads()(X)
        mhkd.mhkd_loss(student(X), frozen, y)
    # As is usual for a teacher of plain distillation.
    with pytest.warns(UserWarning, match="heads of the teacher that have never been trained"):
        mhkd.mhkd_loss(student(X), targets, y)
    teacher.train()(X)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        targets = teacher.eval()(X)
    mhkd.mhkd_loss(student(X), targets, y)


@pytest.mark.parametrize("how", ["loaded", "compiled", "one head is frozen"])
def test_heads_that_have_learned_or_some_of_which_learn_are_not_warned_of(how):
    teacher, student, y = small(frozen=True), small(), torch.tensor([1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if how == "loaded":
            teacher.load_state_dict(copy.deepcopy(teacher.state_dict()))
        elif how == "compiled":
            optimizer = torch.optim.SGD(teacher.heads.parameters(), lr=0.1)
            compiled = torch.compile(teacher, backend="eager")
            mhkd.mhkd_loss(student(X), compiled(X), y).backward()
            optimizer.step()
        else:
            teacher = mhkd.MultiHead(Small(), ["unit", "relu"], 5, width=8, frozen=True)
            student = mhkd.MultiHead(Small(), ["unit", "relu"], 5, width=8)
            teacher.heads["2"].requires_grad_(False)
            mhkd.mhkd_loss(student(X), teacher(X), y)
        with torch.no_grad():
            targets = teacher.eval()(X)
        mhkd.mhkd_loss(student(X), targets, y)


def equal(found, wanted):
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted))


def hooked(network):
    return [name for name, m in network.named_modules() if m._forward_hooks or m._forward_pre_hooks]


def test_outputs_and_gradients_are_those_of_the_parts_though_the_next_layer_works_in_place():
    network = small().double()
    x, weight = images(4, 3, 8, 8, dtype=torch.float64), network.model.unit[0].weight
    found = network(x)
    (gradient,) = torch.autograd.grad(found[1].square().sum(), weight)
    feature = network.model.unit(x)
    alone = network.heads["1"](feature)
    assert (feature < 0).any()  # the ReLU comes later
    assert equal(found, [network.model(x), alone])
    torch.testing.assert_close(gradient, *torch.autograd.grad(alone.square().sum(), weight))


def test_a_head_is_two_convolutions_of_256_kernels_and_two_linear_layers():
    head = mhkd.AuxHead(24, 100)
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    convs, norms, linears = ([m for m in head.modules() if isinstance(m, kind)] for kind in kinds)
    shapes = [(c.in_channels, c.out_channels, c.kernel_size, c.stride) for c in convs]
    assert shapes == [(24, 256, (3, 3), (1, 1)), (256, 256, (3, 3), (1, 1))]
    assert len(norms) == 2 and [linear.out_features for linear in linears] == [256, 100]
    for layer in (*convs, *linears):  # they start as PyTorch does, with biases
        bound = layer.weight[0].numel() ** -0.5  # uniform
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert layer.bias.any()


def test_a_heads_stride_changes_its_map_but_not_its_parameters():
    heads = [mhkd.AuxHead(3, 10, width=4, stride=stride).eval() for stride in (1, 2)]
    assert [nn.Sequential(*head.children())[:4](X).shape[-1] for head in heads] == [8, 2]
    assert [head(X).shape for head in heads] == [(2, 10)] * 2
    heads[0].load_state_dict(heads[1].state_dict())


@pytest.mark.parametrize("call", [
    lambda network: network.train(),
    lambda network: network.model.train(),
    lambda network: network.train().model.train(),
    lambda network: network.model.layer2.train(),
    lambda network: [module.train() for module in network.modules()],
    lambda network: nn.Sequential(network).train(),
], ids=["the whole", "the backbone", "both", "a part", "every module", "a parent"])  # fmt: skip
def test_a_frozen_backbone_stays_as_it_is_whatever_is_called_and_its_heads_train(call, device):
    torch.manual_seed(0)
    plain = mhkd.build_model("resnet8", 10).to(device)
    network = mhkd.MultiHead(plain, UNITS, 10, frozen=True, width=8).eval()
    network.heads.train()
    network.model.requires_grad_(True)  # somebody asks for gradients
    before = copy.deepcopy(network.state_dict())
    x = images(4, 3, 16, 16, device=device)
    wanted = plain(x)
    call(network)
    outputs = network(x)
    assert torch.equal(outputs[0], wanted) and not outputs[0].requires_grad
    sum(output.square().sum() for output in outputs[1:]).backward()
    assert all(p.grad is None for p in plain.parameters())
    assert all(p.grad.any() for p in network.heads.parameters() if p.dim() > 1)
    same = {name: torch.equal(t, before[name]) for name, t in network.state_dict().items()}
    assert all(same[name] for name in same if name.startswith("model."))  # statistics, too
    assert not any(same[name] for name in same if name.endswith("running_mean") and "head" in name)


def test_making_the_heads_leaves_the_network_as_it_was():
    plain = mhkd.build_model("resnet8", 10)
    plain.layer2.eval()
    before = copy.deepcopy(plain.state_dict())
    modes = [module.training for module in plain.modules()]
    mhkd.MultiHead(plain, UNITS, 10, width=4)
    state = plain.state_dict()
    assert state.keys() == before.keys() and equal([*state.values()], [*before.values()])
    assert [module.training for module in plain.modules()] == modes


# Copies, files and the end


@pytest.mark.parametrize("fails", [False, True])
def test_copies_and_files_of_the_plain_network_carry_nothing_of_ours_after_calls(fails):
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(6 * 36, 5))
    network = mhkd.MultiHead(plain, ["0"], 5, width=4, example_input=X[:1]).eval()
    wanted = network(X)
    if fails:
        with pytest.raises(RuntimeError):
            network(images(2, 3, 9, 9))  # after the unit has run
    assert not hooked(plain) and not hooked(copy.deepcopy(plain))
    assert equal(network(X), wanted)
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    assert b"mhkd" not in buffer.getvalue()  # it loads where there is no mhkd.py
    assert buffer.tell() < 4 * sum(p.numel() for p in plain.parameters()) + 5_000
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert not hooked(again) and torch.equal(again(X), wanted[0])


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_a_copy_made_while_the_network_runs_works_disturbs_nothing_and_keeps_no_features():
    network, copies, y = small().eval(), [], images(2, 3, 8, 8, seed=8)
    wanted = network(X)

    def theirs(*_):
        if not copies:  # the copy has this hook, too
            copies.append(copy.deepcopy(network.model))

    handle = network.model.relu.register_forward_hook(theirs)
    assert equal(network(X), wanted)
    handle.remove()
    before = tensors_alive()
    assert torch.equal(copies[0](y), network.model(y))
    assert tensors_alive() <= before
    assert equal(network(X), wanted)


def test_a_copy_works_and_is_independent_of_the_original():
    network = small().eval()
    wanted, copies = network(X), (copy.deepcopy(network), pickle.loads(pickle.dumps(network)))
    network.model.unit[0].weight.data.zero_()
    assert all(equal(other(X), wanted) for other in copies)
    assert not torch.equal(network(X)[1], wanted[1])


# Several at once


def replica_of(network):
    """As torch.nn.parallel.replicate makes one, here on the CPU."""
    replicas = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = child and replicas[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter)
    return replicas[network]


@pytest.mark.parametrize("share", [lambda network: network, replica_of], ids=["one", "replicas"])
def test_threads_that_call_a_multihead_at_once_get_their_own_features(share):
    network = small().eval()
    inputs = [images(2, 3, 8, 8, seed=i) for i in range(5)]

    @torch.no_grad()  # which is of each thread
    def calls(x):
        return [share(network)(x) for _ in range(60)]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with ThreadPoolExecutor(5) as pool:
        found = [*pool.map(calls, inputs)]
    sys.setswitchinterval(before)
    for x, outputs in zip(inputs, found):  # another thread's input gives quite others
        torch.testing.assert_close(outputs, [network(x)] * 60)
    assert not hooked(network.model)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_replica_as_data_parallel_makes_it_sends_gradients_to_the_original(frozen):
    network = small(frozen=frozen).eval()
    replica_of(network)(X)[1].sum().backward()
    assert (network.model.unit[0].weight.grad is None) == frozen
    assert network.heads["1"][0].weight.grad.any()


def test_two_multiheads_on_one_backbone_do_not_disturb_each_other():
    plain = mhkd.build_model("resnet8", 10).eval()
    first = mhkd.MultiHead(plain, ["layer1"], 10, width=8).eval()
    wanted = first(X)
    second = mhkd.MultiHead(plain, ["layer1", "layer3"], 10, width=4).eval()
    found = second(X)
    assert equal(first(X), wanted)
    assert torch.equal(found[1], second.heads["1"](plain.layer1(F.relu(plain.bn1(plain.conv1(X))))))


# The penultimate feature


def test_the_classifier_can_be_named_and_a_network_of_a_fixed_input_asks_for_an_example():
    plain, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Linear(6, 4)), images(2, 3, 2, 2)
    for name, width in ((None, 6), ("1", 12)):
        network = mhkd.MultiHead(plain, [], 4, classifier=name, example_input=x).eval()
        assert network(x, penultimate=True)[1].shape == (2, width)
    with pytest.raises(mhkd.UsageError, match="example_input"):
        mhkd.MultiHead(plain, [], 4)


def test_a_linear_layer_inside_of_the_network_is_not_taken_for_the_classifier():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gate = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.conv(x)
            x = x * self.gate(x.mean(dim=(2, 3)))[:, :, None, None]
            return self.head(x).mean(dim=(2, 3))

    network = mhkd.MultiHead(Gated(), [], 4)
    assert (network.classifier, network.width) == (None, None)
    with pytest.raises(mhkd.UsageError, match="no linear layer with 4 outputs ran: name one"):
        network(images(2, 3, 8, 8), penultimate=True)


class Averaged(nn.Module):
    """Two classifiers, of two features or of one, whose mean is returned; one more after them."""

    def __init__(self, shared, more=False):
        super().__init__()
        self.unit, self.flat = nn.Conv2d(3, 6, 3), nn.Flatten()
        self.fc, self.fc_2, self.fc_3 = (nn.Linear(6, 5) for _ in range(3))
        self.shared, self.more = shared, more

    def forward(self, x):
        x = self.flat(F.adaptive_avg_pool2d(self.unit(x), 1))
        if self.more:
            z = self.fc(x)
            self.fc_3(torch.zeros_like(x))  # of another task
            return z
        return (self.fc(x) + self.fc_2(x if self.shared else 2 * x)) / 2


def test_the_classifier_is_the_layer_that_returns_the_logits_or_has_the_one_feature():
    x = images(2, 3, 32, 32)
    equal = Averaged(shared=False)
    for layer in (equal.fc, equal.fc_2):  # each returns the logits before training
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    for network in (equal, Averaged(shared=False)):
        with pytest.raises(mhkd.UsageError, match="name one with classifier="):
            mhkd.MultiHead(network, [], 5)(x, penultimate=True)
    mhkd.MultiHead(Averaged(shared=False), ["unit"], 5)(x)  # heads need no penultimate feature
    for network, name in (
        (mhkd.MultiHead(Averaged(shared=False), [], 5, classifier="fc"), "fc"),
        (mhkd.MultiHead(Averaged(shared=True), [], 5), "fc_2"),
        (mhkd.MultiHead(Averaged(shared=True, more=True), [], 5), "fc"),
    ):
        feature = F.adaptive_avg_pool2d(network.model.unit(x), 1).flatten(1)
        torch.testing.assert_close(network(x, penultimate=True)[1], feature)
        assert network.classifier == name
    with torch.device("meta"):
        assert not mhkd.MultiHead(Averaged(shared=True), [], 5).several
    one = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    nn.init.constant_(one[1].bias, torch.nan)
    assert mhkd.MultiHead(one, [], 5, frozen=True)(x, penultimate=True)[1].shape == (2, 3 * 32 * 32)


def test_a_layer_that_returns_more_than_a_tensor_is_not_compared():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    network = nn.Sequential(nn.Flatten(), Pair(3 * 32 * 32, 5))
    z = mhkd.MultiHead(network, [], 5, output=lambda pair: pair[0])(images(2, 3, 32, 32))
    assert z[0].shape == (2, 5)


def test_freezing_the_heads_changes_no_mode_of_the_network_and_stops_optimizers():
    network = mhkd.MultiHead(Small().eval(), ["unit"], 5, width=8)
    optimizer = torch.optim.SGD(network.heads.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    network(images(2, 3, 32, 32))[1].sum().backward()
    optimizer.step()
    network.freeze_heads()
    assert not any(
        module.training for module in (*network.model.modules(), *network.heads.modules())
    )
    before = [p.clone() for p in network.heads.parameters()]
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, network.heads.parameters()))


def test_a_network_that_cannot_be_copied_keeps_buffers_that_are_not_in_its_state():
    class Counting(Small):
        def __init__(self):
            super().__init__()
            self.register_buffer("filled", None)
            self.register_buffer("view", torch.ones(1).expand(6), persistent=False)
            self.register_buffer("calls", torch.zeros(()), persistent=False)
            self.register_buffer("last", torch.zeros(()), persistent=False)

        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

        def forward(self, x):
            self.calls += 1
            self.last, self.filled = x.mean(), x
            return super().forward(x)

    network = mhkd.MultiHead(Counting(), ["unit"], 5)
    assert network.model.calls == 0 == network.model.last and network.model.filled is None


def test_a_cube_is_not_taken_for_channels_first_in_a_network_of_channels_last():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 4, 4)
            self.unit, self.reduce, self.fc = nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 5)

        def forward(self, x):
            x = self.reduce(self.unit(self.embed(x).permute(0, 2, 3, 1)))  # [B, 8, 8, 8], [.., 6]
            return self.fc(x.mean((1, 2)))

    with pytest.raises(mhkd.UsageError, match="may be channels last"):
        mhkd.MultiHead(Last(), ["unit"], 5)

    class Mixed(Last):
        def __init__(self):
            super().__init__()
            self.embed, self.stem = nn.Conv2d(6, 8, 1), nn.Conv2d(3, 6, 4, 4)

        def forward(self, x):
            return super().forward(self.stem(x))  # [B, 6, 8, 8]

    mixed = mhkd.MultiHead(Mixed(), ["stem"], 5, example_input=images(2, 3, 32, 32))
    assert mixed.layouts == {"stem": "channels_first"}
    network = mhkd.MultiHead(Last(), ["unit"], 5, layout="channels_last")
    assert network.layouts == {"unit": "channels_last"}
    timm = pytest.importorskip("timm")
    inside = timm.create_model("convnext_atto", num_classes=5)  # channels last inside its blocks
    x = images(1, 3, 160, 160)  # [1, 40, 40, 40]
    assert mhkd.MultiHead(inside, ["stages.0"], 5, example_input=x).layouts == {
        "stages.0": "channels_first"
    }
    first = nn.Sequential(
        nn.Conv2d(3, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)
    )
    assert mhkd.MultiHead(first, ["0"], 5).layouts == {"0": "channels_first"}


def test_tokens_in_another_order_than_the_map_are_refused():
    timm = pytest.importorskip("timm")
    model = timm.create_model("hiera_tiny_224", num_classes=10)
    x = torch.zeros(1, 3, 224, 224)
    with pytest.raises(mhkd.UsageError, match="not in the order of the image"):
        mhkd.MultiHead(model, ["blocks.2"], 10, layout="tokens+0", example_input=x)
    assert len(mhkd.MultiHead(model, [], 10, example_input=x)(x)) == 1


def test_a_container_of_which_only_the_parts_run_is_named_as_such():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=10)
    model.set_grad_checkpointing(True)
    with pytest.raises(mhkd.UsageError, match="only its parts run, for example with checkpointing"):
        mhkd.MultiHead(model, ["layer1"], 10)


def test_a_network_of_grey_images_without_linear_layer_works_but_has_no_penultimate_feature():
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = mhkd.MultiHead(plain, ["0"], 4, width=4)
    assert [z.shape for z in network(images(2, 1, 8, 8))] == [(2, 4)] * 2
    with pytest.raises(mhkd.UsageError, match="classifier"):
        network(images(2, 1, 8, 8), penultimate=True)


# What is put in


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_heads_take_the_networks_dtype_and_device(dtype, device):
    network = mhkd.MultiHead(Small().to(device, dtype), ["unit"], 5, width=8).eval()
    outputs = network(X.to(device, dtype))
    assert [(o.dtype, o.device.type) for o in outputs] == [(dtype, device.type)] * 2


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
    settings = {"example_input": tokens, "output": lambda result: result.logits}
    network = mhkd.MultiHead(plain, [], 3, **settings)
    (logits,), feature = network(tokens, penultimate=True)
    assert torch.equal(logits, plain(tokens).logits) and feature.shape == (2, 8)
    with pytest.raises(mhkd.UsageError, match="'embedding' returns .2, 16, 8.*tokens"):
        mhkd.MultiHead(plain, ["embedding"], 3, **settings)


# What is refused


@pytest.mark.parametrize("arguments, message", [
    ((["layer4"], 5), "no submodule 'layer4'.*unit.*relu.*twice"),
    ((["relu6"], 5), "did you mean relu"),
    (([""], 5), "no submodule ''"),
    ((["twice"], 5), "'twice' must run once in a forward pass, and it ran 2 times"),
    ((["spare"], 5), "'spare' must run once in a forward pass, and it ran 0 times"),
    ((["flat"], 5), r"'flat' returns \(2, 6\), not a feature"),
    ((["unit"], 7), r"\(2, 5\), not logits \[B, 7\]"),
    (("unit", 5), r"\['unit'\]"),
])  # fmt: skip
def test_units_that_cannot_carry_a_head_are_refused_and_leave_no_trace(arguments, message):
    plain = Small()
    plain.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(mhkd.UsageError, match=message):
        mhkd.MultiHead(plain, *arguments)
    assert not hooked(plain) and plain.training


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_network_that_was_called_alone_is_named(whole):
    torch.compiler.reset()  # graphs of one network are used for others of its class
    network = Small()
    compiled = torch.compile(network, backend="eager") if whole else network
    if not whole:
        network.compile(backend="eager")
    with_heads = mhkd.MultiHead(compiled, ["_orig_mod.unit" if whole else "unit"], 5)
    with_heads(X)
    compiled(X)
    with pytest.raises(mhkd.UsageError, match="ran 0 times: compile the MultiHead"):
        with_heads(X)


def test_probabilities_are_warned_of_and_an_output_function_helps():
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.LazyLinear(5), nn.Softmax(dim=1))
    network(X)
    with pytest.warns(UserWarning, match="probabilities.*output=lambda"):
        mhkd.MultiHead(network, ["0"], 5, example_input=X)
    multihead = mhkd.MultiHead(network, ["0"], 5, example_input=X, output=torch.log)
    assert torch.equal(multihead(X)[0], network(X).log())


def test_a_layout_that_contradicts_the_map_or_names_no_submodule_is_not_silent():
    network = Small().to(memory_format=torch.channels_last)
    with pytest.warns(UserWarning, match="looks like channels first, not last"):
        mhkd.MultiHead(network, ["unit"], 5, layout="channels_last")
    with pytest.raises(mhkd.UsageError, match="no submodule 'uni'"):
        mhkd.MultiHead(network, ["unit"], 5, layout={"uni": "channels_last"})

    class Tokens(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).flatten(2).mT

    tokens = nn.Sequential(Tokens(3, 6, 4, 4), nn.AdaptiveAvgPool2d((16, 6)))
    tokens = nn.Sequential(tokens, nn.Flatten(), nn.Linear(96, 5))
    with pytest.warns(UserWarning, match="for square maps, and the images are 16 x 64"):
        mhkd.MultiHead(tokens, ["0"], 5, layout="tokens+0", example_input=images(2, 3, 16, 64))
    with pytest.raises(mhkd.UsageError, match="does not fit the layout 'tokens.x'"):
        mhkd.MultiHead(tokens, ["0"], 5, layout="tokens+x", example_input=images(2, 3, 32, 32))


def test_a_feature_must_have_a_row_for_each_image_also_in_the_constructor():
    class Sequence(nn.Module):  # [length, batch, channels]
        def __init__(self):
            super().__init__()
            self.layer, self.fc = nn.Linear(3, 6), nn.Linear(6, 5)

        def forward(self, x):
            return self.fc(self.layer(x.flatten(2).permute(2, 0, 1)).mean(dim=0))

    with pytest.raises(mhkd.UsageError, match="'layer' returns .16, 2, 6. for 2 images"):
        mhkd.MultiHead(
            Sequence(), ["layer"], 5, layout="tokens+0", example_input=images(2, 3, 4, 4)
        )


def test_a_network_of_two_inputs_takes_a_tuple_as_example():
    class Two(Small):
        def forward(self, x, scale):
            return super().forward(x * scale)

    plain = Two().eval()
    network = mhkd.MultiHead(plain, ["unit"], 5, example_input=(X, torch.ones(()))).eval()
    assert torch.equal(network(X, 2)[0], plain(X, 2)) and network.shapes == {1: (6, 8, 8)}

    class Pair(Small):
        def forward(self, pair):
            return super().forward(pair[0] * pair[1])

    pair = (X, torch.ones(()))
    assert mhkd.MultiHead(Pair(), ["unit"], 5, example_input=pair).shapes == {1: (6, 8, 8)}


def test_a_lazy_network_needs_no_example():
    network = nn.Sequential(nn.LazyConv2d(6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.append(nn.LazyLinear(5))
    assert mhkd.MultiHead(network, ["0"], 5).shapes == {1: (6, 30, 30)}


class InTraining(nn.Module):
    """Its `layer` gives a map, and its logits are those, unless `change` applies in training."""

    def __init__(self, change, whole):
        super().__init__()
        self.layer, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)
        changed = self if whole else self.layer
        changed.register_forward_hook(lambda m, x, y: change(y) if m.training else None)

    def forward(self, x):
        x = self.layer(x)
        return self.fc(x.mean(dim=(2, 3)) if isinstance(x, torch.Tensor) and x.dim() == 4 else ONE)


@pytest.mark.parametrize("change, whole, message", [
    (lambda x: (x, x), False, "'layer' returns tuple"),
    (lambda x: {"x": x}, False, "'layer' returns dict"),
    (lambda x: x.flatten(2).transpose(1, 2), False, "'layer' returns .2, 64, 4..*fit the layout"),
    (lambda x: (x, x), True, "network returns tuple, not logits"),
    (lambda x: {"x": x}, True, "network returns dict, not logits"),
], ids=["tuple", "dict", "tokens", "logits tuple", "logits dict"])  # fmt: skip
def test_what_is_no_feature_or_no_logits_in_training_mode_only_is_refused(change, whole, message):
    network = mhkd.MultiHead(InTraining(change, whole), ["layer"], 5, width=4)
    before = hooked(network)
    assert len(network.eval()(X)) == 2
    with pytest.raises(mhkd.UsageError, match=message):
        network.train()(X)
    assert hooked(network) == before


# torch.compile


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_whole_it_gives_the_same_outputs_and_gradients(frozen):
    network = small(frozen=frozen).train()
    compiled = torch.compile(copy.deepcopy(network), fullgraph=True, backend="aot_eager")
    results = [one(X) for one in (network, compiled)]
    torch.testing.assert_close(*results)
    for outputs in results:
        sum(output.square().sum() for output in outputs[int(frozen) :]).backward()
    for p, q in zip(network.parameters(), compiled.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad)
    assert not hooked(compiled)


def test_compiled_or_not_hooks_of_somebody_elses_on_a_unit_stay_and_work():
    network = small().eval()
    plain = network(X)
    theirs = network.model.unit.register_forward_hook(lambda module, args, output: 2 * output)
    wanted = network(X)
    assert not torch.equal(wanted[0], plain[0]) and not torch.equal(wanted[1], plain[1])
    assert equal(torch.compile(network, fullgraph=True, backend="eager")(X), wanted)
    assert list(network.model.unit._forward_hooks) == [theirs.id]
    assert hooked(network) == ["model.unit"]


class Raising(Small):
    def forward(self, x):
        logits = super().forward(x)
        if len(x) == 3:
            raise RuntimeError("three")
        return logits


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_it_leaves_no_hook_behind_also_where_the_network_raises(fullgraph):
    network = mhkd.MultiHead(Raising(), ["unit"], 5, width=4).eval()
    compiled = torch.compile(network, fullgraph=fullgraph, backend="eager", dynamic=False)
    for _ in range(2):
        assert equal(compiled(X), network(X))
        with pytest.raises((RuntimeError, torch._dynamo.exc.Unsupported)):
            compiled(images(3, 3, 8, 8))
        assert not hooked(network)
