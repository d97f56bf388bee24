#!/usr/bin/env python3
"""Multi-head knowledge distillation: a large frozen teacher network trains a small student.

    python mhkd.py --teacher resnet32x4 --student shufflenetv2       # the main job, CIFAR-100
    python mhkd.py --teacher wrn_40_2 --student wrn_16_2 --seed 1    # another pair, another seed
    python mhkd.py --teacher vgg13 --student vgg8 --method kd        # plain distillation
    python mhkd.py --student vgg8 --method ce                        # a network alone
    python mhkd.py --teacher vgg13 --student vgg8 --method crd+mhkd  # two methods combined
    python mhkd.py --teacher resnet20 --student resnet8 --dataset digits    # minutes, no download
    python mhkd.py --teacher torchvision:resnet50 --teacher-init pretrained \\
        --student timm:mobilenetv3_small_100 --dataset folder --data photos --image-size 224
    torchrun --nproc_per_node 2 mhkd.py --teacher resnet32x4 --student shufflenetv2
    python mhkd_tables.py report runs                                # tables of finished runs

The method (Wang, Lohit, Jones, Fu: "Multi-head knowledge distillation for model compression", 2020)
adds small auxiliary classifiers, the heads, at the ends of the first three units of both networks.
The loss on each pair of heads is that of ordinary distillation on the final outputs: the KL
divergence between softened probabilities, and the cross-entropy. After training the heads are
dropped.

Sections: 1 networks, 2 heads, 3 loss, 4 methods, 5 training, 6 batches, 7 processes, devices and
output. Sections 1 to 3 are the method; they depend on nothing below them. "Paper, section 3.1" in
comments refers to the publication. Copied alone, this file provides the networks, MultiHead,
mhkd_loss and kd_loss with PyTorch as the only requirement. Training also needs mhkd_code.py
(the hash of the code), mhkd_config.py (settings and the command line), mhkd_data.py (data sets),
mhkd_record.py (what is recorded of a run), mhkd_runs.py (folders of runs) and mhkd_teacher.py
(where the teacher comes from). Other modules beside this file are imported when an option asks for
them; mhkd_fused.py, the compiled loss, is used if it exists.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import hashlib
import importlib
import math
import os
import random
import sys
import threading
import time
import types
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

if TYPE_CHECKING:
    from mhkd_config import Config

__version__ = "0.3.0"


class UsageError(ValueError):
    """A mistake in the input. The message is one sentence that says what to do."""

    user_error = True  # mhkd_config.command_line() prints the message without a traceback


@contextlib.contextmanager
def explain(what: str, hint: str, kinds: Any = Exception) -> Iterator[None]:
    """Turn errors into a UsageError: what failed, why, and what to do."""
    try:
        yield
    except kinds as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{what} ({reason}): {hint}") from error


def check_name(what: str, name: str, names: Iterable[str]) -> str:
    """The name if it is one of the names, else a UsageError that lists similar ones, or all."""
    names = list(names)
    if name in names:
        return name
    near = difflib.get_close_matches(str(name).lower().replace("-", "_"), names, n=4, cutoff=0.5)
    some = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "")
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {some}."
    raise UsageError(f"there is no {what} '{name}': {hint}")


def sibling(name: str, optional: bool = False) -> Any:
    """Import a module that lies beside this file; None if it is optional and missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not missing.startswith("mhkd_"):
            raise
    if optional and missing == name:
        return None
    raise UsageError(
        f"{missing}.py is needed for this and was not found: copy it beside mhkd.py (training "
        "needs mhkd_code.py, mhkd_config.py, mhkd_data.py, mhkd_record.py, mhkd_runs.py and "
        "mhkd_teacher.py)"
    )


def import_optional(module: str, package: str, purpose: str) -> Any:
    """Import an optional dependency, or say how to install it."""
    # Also catches what a torchvision that was built for another PyTorch raises.
    with explain(f"{purpose} needs {package}", f"pip install {package}"):
        return importlib.import_module(module)


# Public names that other modules define.
ELSEWHERE = {"Config": "mhkd_config", "load_data": "mhkd_data", "load_student": "mhkd_deploy"}
ELSEWHERE |= {"DataSet": "mhkd_data", "DATASETS": "mhkd_data"}


def __getattr__(name: str) -> Any:
    if name in ELSEWHERE:
        return getattr(sibling(ELSEWHERE[name]), name)
    raise AttributeError(f"module 'mhkd' has no attribute '{name}'")


# --------------------------------------------------------------------------------------------------
# 1. The networks of the CRD benchmark, independent of distillation: forward(x) returns logits.
#    Names and order of the submodules are those of its checkpoints (HobbitLong/RepDistiller).
# --------------------------------------------------------------------------------------------------


def conv3x3(in_channels: int, channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 1, stride, bias=False)


def conv_bn_relu(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()]


def initialise(model: nn.Module, linear_std: float | None = None) -> None:
    """He initialisation of the convolutions: normal, variance 2 / (k^2 * C_out), biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, 0, linear_std)
            nn.init.zeros_(module.bias)


def unit(block: Callable, before: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """Residual blocks in a row, of which the first changes the channels and the size."""
    return nn.Sequential(
        block(before, width, stride), *(block(width, width, 1) for _ in range(blocks - 1))
    )


class ResNetBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential()  # empty: the identity
        if stride != 1 or in_channels != channels:
            projection = conv1x1(in_channels, channels, stride)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class ResNet(nn.Module):
    """CIFAR ResNet (He et al. 2016), depth 6n + 2; widths: of the stem and of the three units."""

    def __init__(self, num_classes: int, depth: int, widths: Sequence[int] = (16, 16, 32, 64)):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        for i, stride in ((1, 1), (2, 2), (3, 2)):
            layer = unit(ResNetBlock, widths[i - 1], widths[i], blocks, stride)
            setattr(self, f"layer{i}", layer)
        self.fc = nn.Linear(widths[-1], num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))  # [B, stem, S, S]
        x = self.layer3(self.layer2(self.layer1(x)))  # [B, C, S/4, S/4]
        return self.fc(x.mean(dim=(2, 3)))


class WideResNetBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        same = in_channels == channels
        self.convShortcut = None if same else conv1x1(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        # A projection starts from the normalised input, the identity from the raw one.
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class WideResNet(nn.Module):
    """Wide ResNet (Zagoruyko & Komodakis 2016), depth 6n + 4."""

    def __init__(self, num_classes: int, depth: int, width: int):
        super().__init__()
        blocks = (depth - 4) // 6
        widths = (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = conv3x3(3, 16)
        for i, stride in ((1, 1), (2, 2), (3, 2)):
            layer = unit(WideResNetBlock, widths[i - 1], widths[i], blocks, stride)
            setattr(self, f"block{i}", nn.Sequential(OrderedDict(layer=layer)))
        self.bn1 = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], num_classes)
        initialise(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))  # [B, C, S/4, S/4]
        return self.fc(F.relu(self.bn1(x)).mean(dim=(2, 3)))


class VGG(nn.Module):
    """VGG (Simonyan & Zisserman 2015) with batch norm; convs: of each of the five blocks."""

    def __init__(self, num_classes: int, convs: Sequence[int]):
        super().__init__()
        channels = 3
        for i, (count, width) in enumerate(zip(convs, (64, 128, 256, 512, 512))):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += conv_bn_relu(nn.Conv2d(channels, width, 3, padding=1))
                channels = width
            setattr(self, f"block{i}", nn.Sequential(*layers))
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        # The benchmark pools a fourth time for 64-pixel images only.
        pooled = (0, 1, 2, 3) if x.size(-1) == 64 else (0, 1, 2)
        for i in range(5):
            x = getattr(self, f"block{i}")(x)
            if i in pooled:
                x = F.max_pool2d(x, 2)
        return self.classifier(x.mean(dim=(2, 3)))


class InvertedResidual(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int = 6):
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            *conv_bn_relu(conv1x1(in_channels, hidden)),
            *conv_bn_relu(conv3x3(hidden, hidden, stride, groups=hidden)),
            conv1x1(hidden, channels),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018) at half width, with the benchmark's strides and ReLU."""

    # channels, blocks, stride of the first block; the first group (8 channels) has expansion 1
    GROUPS = ((12, 2, 1), (16, 3, 2), (32, 4, 2), (48, 3, 1), (80, 3, 2), (160, 1, 1))

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = nn.Sequential(*conv_bn_relu(conv3x3(3, 16, stride=2)))
        self.blocks = nn.Sequential(nn.Sequential(InvertedResidual(16, 8, 1, expansion=1)))
        before = 8
        for channels, blocks, stride in self.GROUPS:
            self.blocks.append(unit(InvertedResidual, before, channels, blocks, stride))
            before = channels
        self.conv2 = nn.Sequential(*conv_bn_relu(conv1x1(before, 1280)))
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        initialise(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.blocks(self.conv1(x)))  # [B, 1280, S/16, S/16]
        return self.classifier(x.mean(dim=(2, 3)))


class ShuffleBlock(nn.Module):
    """Half of the channels pass through, the other half are transformed."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = conv1x1(half, half), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = conv3x3(half, half, groups=half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv1x1(half, half), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        right = F.relu(self.bn1(self.conv1(right)))
        right = self.bn2(self.conv2(right))
        right = F.relu(self.bn3(self.conv3(right)))
        return torch.stack((left, right), dim=2).flatten(1, 2)  # channel shuffle, two groups


class ShuffleDownBlock(nn.Module):
    """Halves the map; both branches see all channels."""

    def __init__(self, before: int, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = conv3x3(before, before, 2, groups=before), nn.BatchNorm2d(before)
        self.conv2, self.bn2 = conv1x1(before, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv1x1(before, half), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = conv3x3(half, half, 2, groups=half), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = conv1x1(half, half), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = F.relu(self.bn3(self.conv3(x)))
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return torch.stack((left, right), dim=2).flatten(1, 2)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 (Ma et al. 2018), size 1, with a 1x1 stem for small images."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1, self.bn1 = conv1x1(3, 24), nn.BatchNorm2d(24)
        units = ((24, 116, 3), (116, 232, 7), (232, 464, 3))
        for i, (before, width, blocks) in enumerate(units, 1):
            layer = [ShuffleDownBlock(before, width), *(ShuffleBlock(width) for _ in range(blocks))]
            setattr(self, f"layer{i}", nn.Sequential(*layer))
        self.conv2, self.bn2 = conv1x1(464, 1024), nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))  # [B, 464, S/8, S/8]
        return self.linear(F.relu(self.bn2(self.conv2(x))).mean(dim=(2, 3)))


WIDE = (32, 64, 128, 256)
WRNS = ((16, 1), (16, 2), (40, 1), (40, 2))  # depth, width
VGGS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3)}
VGGS |= {19: (2, 2, 4, 4, 4)}
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    **{f"resnet{d}": (ResNet, {"depth": d}) for d in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{d}x4": (ResNet, {"depth": d, "widths": WIDE}) for d in (8, 32)},
    **{f"wrn_{d}_{k}": (WideResNet, {"depth": d, "width": k}) for d, k in WRNS},
    **{f"vgg{d}": (VGG, {"convs": convs}) for d, convs in VGGS.items()},
    "mobilenetv2": (MobileNetV2, {}),
    "shufflenetv2": (ShuffleNetV2, {}),
}
# The submodules at whose ends the heads are: the first three units (paper, section 3.2).
UNITS: dict[type[nn.Module], tuple[str, str, str]] = {
    ResNet: ("layer1", "layer2", "layer3"),
    WideResNet: ("block1", "block2", "block3"),
    VGG: ("block0", "block1", "block2"),
    MobileNetV2: ("blocks.1", "blocks.2", "blocks.4"),
    ShuffleNetV2: ("layer1", "layer2", "layer3"),
}


def build_model(
    name: str, num_classes: int, init: str = "random", image_size: int | None = None
) -> nn.Module:
    """A network that maps images [B, 3, S, S] to logits [B, num_classes].

    Args:
        name: one of MODELS, for S >= 16; or, with mhkd_custom.py, torchvision:NAME, timm:NAME or
            path/to/file.py:FUNCTION, which is called with num_classes.
        init: "random"; "pretrained", the library's weights; or file:PATH, a state dict. The
            classifier is initialised randomly if its number of classes differs.
        image_size: S, for networks that depend on it, such as vision transformers.

    Raises:
        UsageError, mhkd_runs.RunError: no such network; the library or the weights are missing.
    """
    if ":" in name:
        return sibling("mhkd_custom").build(name, num_classes, init, image_size)
    kind, variant = MODELS[check_name("network", name, MODELS)]
    model = kind(num_classes, **variant)
    if init.startswith("file:"):
        runs, what = sibling("mhkd_runs"), f"the weights '{init}' do not fit {name}"
        runs.load_state(model, runs.read_state(init[5:], model.state_dict()), what, num_classes)
    elif init != "random":
        raise UsageError(f"there are no pretrained weights for {name}: use random or file:PATH")
    return model


# --------------------------------------------------------------------------------------------------
# 2. Auxiliary heads (paper, section 3.1 and figure 1), attached to any network from outside
# --------------------------------------------------------------------------------------------------


class AuxHead(nn.Sequential):
    """Auxiliary classifier: two 3x3 convolutions with batch norm and ReLU, two linear layers.

    Maps a feature [B, C, H, W] to logits [B, K] (paper, section 3.1). Stride 1, bias, pooling over
    the whole map and PyTorch's initialisation are those of the authors' code (docs/choices.md).

    Args:
        in_channels: C.
        num_classes: K.
        width: channels of the convolutions and of the hidden linear layer.
        stride: of both convolutions. Stride 2 makes a head several times cheaper.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 256, stride: int = 1):
        super().__init__(
            *conv_bn_relu(nn.Conv2d(in_channels, width, 3, stride, padding=1)),
            *conv_bn_relu(nn.Conv2d(width, width, 3, stride, padding=1)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, num_classes),
        )


@dataclasses.dataclass
class Outputs:
    """What a network computes for a batch."""

    logits: Tensor  # [B, K]
    features: dict[int, Tensor]  # by unit, counted from 1: [B, C, H, W] each
    penultimate: Tensor | None  # [B, C], the input of the last linear layer
    # Logits [B, K] of the teacher's pretrained heads, if the method has them.
    heads: list[Tensor] = dataclasses.field(default_factory=list)

    def float(self) -> Outputs:
        """The same in float32."""
        features = {unit: feature.float() for unit, feature in self.features.items()}
        penultimate = None if self.penultimate is None else self.penultimate.float()
        return Outputs(self.logits.float(), features, penultimate, [z.float() for z in self.heads])


class AuxHeads(nn.ModuleDict):
    """The heads of a network, by unit. Maps Outputs to logits [final, head 1, ..., head D]."""

    def __init__(self, network: FeatureExtractor, units: Iterable[int], width: int, stride: int):
        channels = {unit: network.shapes[unit][0] for unit in units}
        K = network.num_classes
        super().__init__({str(u): AuxHead(C, K, width, stride) for u, C in channels.items()})

    def forward(self, outputs: Outputs) -> list[Tensor]:
        heads = (head(outputs.features[int(unit)]) for unit, head in self.items())
        return [outputs.logits, *heads]


class FeatureExtractor(nn.Module):
    """A network whose features are read from outside, by the names of submodules.

    forward(x) returns Outputs. The network itself, `model`, is not changed and can be used alone.
    The constructor runs a copy once to find the shape (C, H, W) of each feature, `shapes[unit]`,
    and the name of the last linear layer with K outputs, `classifier`, which has `width` inputs.
    Args: see MultiHead.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[str] | Mapping[int, str],
        num_classes: int,
        frozen: bool = False,
        *,
        example_input: Any = None,
        classifier: str | None = None,
        layout: str | Mapping[str, str] | None = None,
        output: Callable[[Any], Tensor] | None = None,
    ):
        super().__init__()
        if isinstance(units, str):
            raise UsageError(f"units must be a list of names: ['{units}']")
        self.model, self.num_classes, self.frozen = model, num_classes, frozen
        self.units = dict(units if isinstance(units, Mapping) else enumerate(units, 1))
        self.output, self.uses_penultimate = output, False
        modules = {name: module for name, module in model.named_modules() if name}
        of_unit = layout if isinstance(layout, Mapping) else dict.fromkeys(modules, layout)
        of_layout = layout if isinstance(layout, Mapping) else ()
        for name in (*self.units.values(), *([classifier] if classifier else []), *of_layout):
            check_name("submodule", name, modules)
        if example_input is None:
            first = next((m for m in modules.values() if isinstance(m, nn.Conv2d)), None)
            channels = first.in_channels if first else 0  # 0 in lazy layers, too
            example_input = torch.randn(2, channels or 3, 32, 32)
        result, seen = run_once(model, example_input)
        logits = self._logits(result)
        if logits.is_floating_point() and logits.numel() and not logits.is_meta:
            if (logits >= 0).all() and (logits.float().sum(dim=1) - 1).abs().max() < 0.01:
                warnings.warn(
                    "in eval mode the network returns probabilities, whose sum is 1, not logits: "
                    "remove its softmax, or give output=lambda p: p.clamp(min=1e-12).log()",
                    stacklevel=3,
                )
        self.shapes = {}
        self.layouts = {n: of_unit.get(n) or "channels_first" for n in self.units.values()}
        rerolled = any(type(module).__name__ == "Reroll" for module in modules.values())
        for unit, name in self.units.items():
            feature = self._feature(name, seen, len(logits))
            check_layout(feature, of_unit.get(name), name, example_input, seen)
            if rerolled and self.layouts[name].startswith("tokens"):
                raise UsageError(
                    f"the tokens of '{name}' are not in the order of the image (Hiera, before its "
                    "last stage): return model.reroll(...) from a module of your own, or use a "
                    "method without heads"
                )
            self.shapes[unit] = tuple(as_map(feature, self.layouts[name], name).shape[1:])
        linear = [
            (name, args[0], out) for name, args, out in seen
            if args and isinstance(m := modules[name], nn.Linear) and m.out_features == num_classes
        ]  # fmt: skip
        linear = [run for run in linear if is_close(run[2], logits)] or linear
        self.classifier = classifier or (linear[-1][0] if linear else None)
        # Two classifiers of two features may be averaged.
        others = [x for name, x, _ in linear if name != self.classifier]
        self.several = not classifier and not all(is_close(x, linear[-1][1]) for x in others)
        self.width = getattr(modules.get(self.classifier), "in_features", None)
        if frozen:
            model.requires_grad_(False).eval()

    def _logits(self, result: Any) -> Tensor:
        result, K = self.output(result) if self.output else result, self.num_classes
        if not isinstance(result, Tensor) or result.dim() != 2 or result.shape[1] != K:
            raise UsageError(
                f"the network returns {shape_of(result)}, not logits [B, {K}]: check num_classes; "
                "if they are inside of something else, give output=, a function that extracts them"
            )
        return result

    def _feature(self, name: str, seen: list[tuple], images: int) -> Tensor:
        runs = [out for other, _, out in seen if other == name]
        if len(runs) != 1:
            what = f"the submodule '{name}' must run once in a forward pass"
            parts = [*self.model.modules()]
            compiled = any(m._compiled_call_impl or hasattr(m, "_orig_mod") for m in parts)
            hint = ": compile the MultiHead, not the network inside of it" if compiled else ""
            if not runs and not compiled and any(n.startswith(f"{name}.") for n, _, _ in seen):
                hint = ", but only its parts run, for example with checkpointing: select one"
            raise UsageError(f"{what}, and it ran {len(runs)} times{hint}")
        if not isinstance(runs[0], Tensor) or runs[0].dim() not in (3, 4):
            got = shape_of(runs[0])
            raise UsageError(f"the submodule '{name}' returns {got}, not a feature [B, C, H, W]")
        if len(runs[0]) != images:
            got = shape_of(runs[0])
            raise UsageError(f"the submodule '{name}' returns {got} for {images} images")
        return runs[0]

    def train(self, mode: bool = True) -> FeatureExtractor:
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def forward(self, *inputs: Any, **keywords: Any) -> Outputs:
        if self.frozen and any(module.training for module in self.model.modules()):
            self.model.eval()  # train() was called on the network itself or on a part of it
        names = [*self.units.values(), *([self.classifier] if self.classifier else [])]
        modules = {name: self.model.get_submodule(name) for name in names}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            result, seen = watch(self.model, modules, *inputs, **keywords)
        logits, features = self._logits(result), {}
        for unit, name in self.units.items():
            feature = self._feature(name, seen, len(logits))
            features[unit] = as_map(feature, self.layouts[name], name)
        of_classifier = [args for other, args, _ in seen if other == self.classifier and args]
        penultimate = of_classifier[-1][0] if of_classifier else None
        if self.uses_penultimate and penultimate is not None:
            if self.several:
                what = (
                    f"several linear layers with {self.num_classes} outputs may be the classifier"
                )
                raise UsageError(f"{what}: name one with classifier=, or use kd or mhkd")
            if len(of_classifier) > 1 or penultimate.dim() != 2:
                ran = " and ".join(str(shape_of(args[0])) for args in of_classifier)
                what = f"the classifier '{self.classifier}' must run once on [B, C]"
                raise UsageError(f"{what}, but ran on {ran}: use kd or mhkd")
        if self.training and torch.is_grad_enabled() and not self.frozen:
            outputs = {"": logits, **dict(zip(self.units.values(), features.values()))}
            if self.uses_penultimate and penultimate is not None:
                outputs[self.classifier] = penultimate
            self._check_gradients(outputs)
        return Outputs(logits, features, penultimate)

    def _check_gradients(self, outputs: Mapping[str, Tensor]) -> None:
        """Without a gradient the heads would be trained, but not the network."""
        if not any(p.requires_grad for p in self.model.parameters()):
            raise UsageError(
                "no parameter of the network requires a gradient: a teacher needs frozen=True, and "
                "a student must share no modules with a frozen network"
            )
        for name, tensor in outputs.items():
            if not tensor.requires_grad:
                what = f"the output of the submodule '{name}'" if name else "the network's output"
                what = f"the input of '{name}'" if name == self.classifier else what
                raise UsageError(
                    f"{what} has no gradient, so nothing before it would be trained: use "
                    "checkpoint(..., use_reentrant=False), remove detach() or no_grad(), or select "
                    "a unit after the frozen layers"
                )


class MultiHead(FeatureExtractor):
    """A network with auxiliary heads at the ends of some submodules (paper, section 3.1).

    For your own training loop; train() uses FeatureExtractor and AuxHeads, see section 4.

        student = MultiHead(torchvision.models.resnet18(num_classes=10), ["layer1", "layer2"], 10)
        logits, logits_1, logits_2 = student(images)
        torch.save(student.model.state_dict(), "student.pt")  # the plain network, without heads

    Args:
        model: any module that maps a batch to logits [B, K].
        units: names of submodules, as in `model.named_modules()`, whose output is a feature
            [B, C, H, W]. May be empty.
        num_classes: K.
        frozen: keep the network in eval mode and without gradients. The heads still train, until
            freeze_heads() is called.
        width, stride: of the heads, see AuxHead.
        example_input: an input for one run of a copy in the constructor; a tuple for a network
            with several inputs. Default: random normal numbers [2, C, 32, 32].
        classifier: name of the last linear layer, whose input is the penultimate feature.
            Default: the last linear layer with K outputs that runs.
        layout: of the features: "channels_first" [B, C, H, W], "channels_last" [B, H, W, C], or
            "tokens+n", tokens [B, n + H * W, C] of a square map, row by row, after n others. A dict
            from names of submodules if they differ. mhkd_custom.find_layouts detects it.
        output: a function that extracts logits [B, K] from what the network returns.

    Raises:
        UsageError: a unit does not exist, does not run exactly once, or returns no feature; or the
            network does not return K logits. Later calls can raise it, too.
    """

    def __init__(
        self, model, units, num_classes, frozen=False, *, width: int = 256, stride: int = 1, **rest
    ):
        super().__init__(model, units, num_classes, frozen, **rest)
        parameter = next(model.parameters(), torch.empty(0))
        self.heads = AuxHeads(self, self.units, width, stride)
        self.heads.to(parameter.device, parameter.dtype)
        self.heads_frozen = False
        self.heads_learned = [False]  # a list: replicas share it
        self.head_versions = self._head_versions()

    def freeze_heads(self) -> MultiHead:
        """Keep the heads as they are: in eval mode, without gradients."""
        self.heads_frozen = True
        self.heads.requires_grad_(False).eval().zero_grad()  # else an optimizer goes on with them
        return self

    def train(self, mode: bool = True) -> MultiHead:
        super().train(mode)
        if not any(p.requires_grad for p in self.heads.parameters()):
            self.heads.eval()
        return self

    def forward(self, *inputs: Any, penultimate: bool = False, **keywords: Any) -> Any:
        """Logits [final, head 1, ..., head D], each [B, K].

        Backward hooks of a unit do not get the gradient of its head.
        With `penultimate` a pair of them and the classifier's input [B, C]. All other arguments are
        passed to the network.
        """
        self.uses_penultimate = penultimate
        outputs = super().forward(*inputs, **keywords)
        if penultimate and outputs.penultimate is None:
            K = self.num_classes
            raise UsageError(f"no linear layer with {K} outputs ran: name one with classifier=")
        logits = self.heads(outputs)
        trained_here = self.frozen and self.units and not self.heads_frozen
        if trained_here and not torch.compiler.is_compiling():
            self._check_heads(logits[1:])
        return (logits, outputs.penultimate) if penultimate else logits

    def _check_heads(self, logits: Sequence[Tensor]) -> None:
        """Warn if heads of a frozen network cannot learn; mark the logits if they never did."""
        mode = any(head.training for head in self.heads.values())
        learn = any(z.requires_grad for z in logits)
        if mode != learn:
            warnings.warn(
                "the heads of a frozen network learn if they are in train mode and outside of "
                f"torch.no_grad(), but they are in {'train' if mode else 'eval'} mode "
                f"{'with' if learn else 'without'} gradients: call freeze_heads() if they are "
                "trained already", stacklevel=5,
            )  # fmt: skip
        elif mode:
            self.heads_learned[0] = True
        elif not self.heads_learned[0] and self._head_versions() == self.head_versions:
            for z in logits:  # mhkd_loss() warns of a student that learns from them
                z.never_learned = True

    def _head_versions(self) -> list[int]:
        """They change when weights are updated or loaded."""
        return [p._version for p in self.heads.parameters() if not p.is_inference()]


def check_layout(
    feature: Tensor, layout: str | None, name: str, example: Any, seen: Sequence[tuple] = ()
) -> None:
    """Raise an error or warn if a feature looks as if it had another layout than the given one.

    seen: what the other submodules return, see watch().
    """
    inputs = [x for x in (example if type(example) is tuple else [example]) if hasattr(x, "shape")]
    shape = next((tuple(x.shape) for x in inputs if len(x.shape) == 4), ())
    height, width = shape[-2:] or (0, 0)  # (0, 0): any shape
    images = len(shape) == 4 and shape[1] in (1, 3)
    if layout and layout.startswith("tokens") and images and height != width:
        what = f"the layout '{layout}' of '{name}' is for square maps, and the images are"
        warnings.warn(f"{what} {height} x {width}", stacklevel=4)
    if feature.dim() == 4 and layout in (None, "channels_last"):
        # A map has the ratio of the input's sides, up to the rounding of its own.
        def distances(x: Tensor) -> list[int]:
            return [abs(a * width - b * height) for a, b in (x.shape[2:], x.shape[1:3])]

        def is_last(x: Any) -> bool:
            first, last = distances(x) if isinstance(x, Tensor) and x.dim() == 4 else (0, 0)
            return last < side <= first

        what, side = f"the submodule '{name}' returns {shape_of(feature)}", min(height, width)
        first, last = distances(feature)
        parent = name.rpartition(".")[0]
        beside = [out for other, _, out in seen if other.rpartition(".")[0] == parent]
        either = max(first, last) < side and any(map(is_last, beside))
        if not layout and (is_last(feature) or either):
            raise UsageError(
                f"{what}, which {'may be' if either else 'looks like'} channels last: "
                'give layout="channels_last" or layout="channels_first"'
            )
        if layout and images and first < side <= last:
            warnings.warn(f"{what}, which looks like channels first, not last", stacklevel=4)


def as_map(feature: Tensor, layout: str, name: str = "") -> Tensor:
    """A feature as a map [B, C, H, W]. layout: see MultiHead. name: of the submodule."""
    others = layout.partition("+")[2] or "0"
    if layout.startswith("tokens") and feature.dim() == 3 and others.isdigit():
        tokens = feature[:, int(others) :]  # [B, H * W, C]
        side = math.isqrt(tokens.shape[1])
        if side**2 == tokens.shape[1] > 0:
            return tokens.transpose(1, 2).unflatten(2, (side, side))
    elif feature.dim() == 4 and not layout.startswith("tokens"):
        check_name("layout", layout, ("channels_first", "channels_last", "tokens+0"))
        return feature if layout == "channels_first" else feature.permute(0, 3, 1, 2)
    raise UsageError(
        f"the submodule '{name}' returns {shape_of(feature)}, which does not fit the layout "
        f"'{layout}': give layout= channels_first, channels_last, or tokens+n"
    )


def is_close(x: Tensor, y: Tensor) -> bool:
    if not isinstance(x, Tensor) or x.shape != y.shape:
        return False
    return y.is_meta or torch.allclose(x.to(y), y, rtol=1e-4, atol=1e-5)


def shape_of(output: Any) -> Any:
    """For messages."""
    return tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__


_locks: Any = weakref.WeakKeyDictionary()  # one for each network


def watch(
    model: nn.Module, modules: Mapping[str, nn.Module], *inputs: Any, **keywords: Any
) -> tuple[Any, list[tuple]]:
    """Run the model; also return (name, inputs, output) of each run of these submodules, in order.

    The submodules have hooks only during the call, so that copies and pickles of the network have
    none. Concurrent calls with one network wait for each other. Outputs, and inputs [B, C], are
    copied because the next layer may work in place.
    """
    seen: list[tuple] = []
    active = [True]  # a copy of the network made during the call keeps a hook that does nothing

    def hook_of(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if active:
                args = (x.clone() if isinstance(x, Tensor) and x.dim() == 2 else x for x in args)
                output = output.clone() if isinstance(output, Tensor) else output
                seen.append((name, tuple(args), output))

        return hook

    compiling = torch.compiler.is_compiling()
    lock = contextlib.nullcontext() if compiling else _locks.setdefault(model, threading.RLock())
    with lock:
        before = {name: module._forward_hooks for name, module in modules.items()}
        try:
            # Assigned, not registered: torch.compile can trace this, and replicas of
            # DataParallel share the registry.
            for name, module in modules.items():
                module._forward_hooks = {**before[name], -1: hook_of(name)}  # no registered id
            return model(*inputs, **keywords), seen
        finally:
            active.clear()
            for name, module in modules.items():
                module._forward_hooks = before[name]


def run_once(model: nn.Module, x: Any) -> tuple[Any, list]:
    """watch() all submodules of a copy in eval mode, without gradients.

    A copy is used because a forward pass changes some networks: layers that initialise themselves
    from the first batch, observers of quantisation. A network that cannot be copied is run itself,
    and its modes and state are restored.
    """
    parameter = next(model.parameters(), torch.empty(0))
    what = f"the network cannot run on an input of shape {shape_of(x)}"
    inputs = x if type(x) is tuple else (x,)
    if not isinstance(parameter, nn.UninitializedParameter):
        kinds = [x.dtype if isinstance(x, Tensor) else None for x in inputs]
        kinds = [parameter.dtype if kind and kind.is_floating_point else kind for kind in kinds]
        inputs = [x.to(parameter.device, kind) if kind else x for x, kind in zip(inputs, kinds)]
    modes, state = {module: module.training for module in model.modules()}, None
    try:
        network = copy.deepcopy(model)
    except Exception:  # for example because of tensors that are no leaves
        network, state = model, {name: t.clone() for name, t in model.state_dict().items()}
        buffers = [(m, n, b) for m in modes for n, b in m._buffers.items()]
        held = [(*buffer, copy.deepcopy(buffer[2])) for buffer in buffers]
    try:
        with torch.no_grad(), explain(what, "give example_input=, an input that it accepts"):
            modules = {name: module for name, module in network.named_modules() if name}
            try:
                return watch(network.eval(), modules, *inputs)
            except TypeError:
                if type(x) is not tuple:
                    raise
                return watch(network, modules, x)  # a network whose input is a tuple
    finally:
        if state is not None:
            for module, name, buffer, value in held:  # also those that are not in the state dict
                module._buffers[name] = buffer
                if buffer is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)
            model.load_state_dict(state)
            for module, mode in modes.items():
                module.training = mode


# --------------------------------------------------------------------------------------------------
# 3. The loss: equations 1 and 2 of the paper
# --------------------------------------------------------------------------------------------------

UNLABELLED = -1  # the label of rows that count for the divergence, not for a cross-entropy


def mhkd_loss(
    student_logits: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    labels: Tensor | None,
    *,
    tau: float = 4.0,
    alpha: float = 0.9,
    beta: float = 0.5,
    head_weights: Sequence[float] | None = None,
    kl_weights: Sequence[float] | None = None,
    ce_weights: Sequence[float] | None = None,
    teacher_ce: Sequence[bool] | None = None,
    ignore_index: int = -100,
    return_terms: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head knowledge distillation loss (Wang et al. 2020, section 3, equations 1 and 2).

    The sum over the heads h = 0 (the final outputs), 1, ..., D with weights w_h, plus the
    cross-entropy from which the teacher's own heads learn (paper, section 3.1):

        sum_h w_h (alpha tau^2 KL(p_T || p_S) + (1 - alpha) CE(y, z_S))
            + sum of CE(y, z_T) over the heads with teacher_ce

    p_T and p_S are the softmax of the logits divided by tau. Each term is a mean over rows. KL is
    averaged over the rows whose label is not `ignore_index`; a cross-entropy also excludes those
    whose label is UNLABELLED. If all rows are ignored, the terms are NaN; if all others are
    unlabelled, the cross-entropies are 0 and have no gradient. Classes with p_T = 0 contribute
    0 to the divergence, also if p_S = 0 (masked classes, with logits -inf). A term with coefficient
    0 is left out with its gradients, even if it is infinite or NaN.

    Args:
        student_logits: a list with a tensor [..., K] for each head, the final output first: [B, K]
            for images, [B, T, K] for a language model.
        teacher_logits: as many tensors of the same shape. The divergence gives them no gradient.
        labels: class indices or UNLABELLED [...], int64. None: all rows are unlabelled; for logits
            [B, K] or [B, T, K].
        tau: temperature, > 0. tau, alpha and the weights are numbers and get no gradient. Above
            about 1000 the divergence is below the precision of float32: give float64 logits.
        alpha: weight of the divergence, 0 to 1; the student's cross-entropy has 1 - alpha.
        beta: weight of every auxiliary head if `head_weights` is None.
        head_weights: a weight w_h for each head. Default: [1, beta, beta, ...].
        kl_weights: coefficient of tau^2 KL for each head. Default: w_h alpha.
        ce_weights: coefficient of the student's cross-entropy for each head. Default:
            w_h (1 - alpha).
        teacher_ce: for each head, whether the teacher's own cross-entropy is added, with weight 1.
            Default: for teacher logits that require a gradient. Call the teacher outside of
            torch.no_grad() if its heads are to learn. For more students of the same teacher logits
            give [False] * H in all calls but one, else the heads learn several times as fast.
        ignore_index: rows with this label are not counted in any term, even if it is UNLABELLED.
        return_terms: also return the terms.
        backend: "reference" is plain PyTorch. "auto" uses the fused loss if it is installed; on
            CUDA only after it has agreed with plain PyTorch in this process. "fused" requires it.

    Returns:
        The loss, a scalar: float64 if any logits are float64, otherwise float32. float16 and
        bfloat16 logits are converted to float32. With `return_terms` also a detached tensor [H, 3]:
        KL * tau^2, the student's cross-entropy and the teacher's, which is 0 without teacher_ce.

    Raises:
        ValueError: lists or shapes that do not agree; tau, alpha or a weight out of range; an
            unknown backend.
        TypeError: logits that are no list or not floating point, labels that are not int64, a
            tensor in place of a number.
        IndexError: a label that is no class (on CUDA a device assertion).
        RuntimeError: tensors on different devices; backend "fused" is not available.
        mhkd_fused.KernelCrash: the fused loss failed on CUDA when it was first tried.
    """
    H = len(student_logits)
    for x in (*student_logits, *teacher_logits, *([] if labels is None else [labels])):
        if not isinstance(x, Tensor):
            raise TypeError(f"mhkd_loss: logits of a head, and labels, must be tensors: {type(x)}")
    compiling = torch.compiler.is_compiling()
    if not compiling and any(getattr(z, "never_learned", False) for z in teacher_logits):
        if any(z.requires_grad for z in student_logits):
            warnings.warn(
                "mhkd_loss: the student learns from heads of the teacher that have never been "
                "trained: call the teacher in train mode and outside of torch.no_grad(), or "
                "freeze_heads() if they are trained already", stacklevel=2,
            )  # fmt: skip
    head_weights = [1.0] + [beta] * (H - 1) if head_weights is None else head_weights
    if teacher_ce is None:
        teacher_ce = [z.requires_grad for z in teacher_logits]
        if H and teacher_ce[0] and not compiling:
            warnings.warn(
                "mhkd_loss: the teacher's final logits require a gradient, so that its own "
                "cross-entropy is a part of the loss: run the teacher under torch.no_grad(), or "
                "give teacher_ce", stacklevel=2,
            )  # fmt: skip
    weights = {"head_weights": head_weights, "kl_weights": kl_weights, "ce_weights": ce_weights}
    _check_settings(student_logits, teacher_logits, tau, alpha, weights, teacher_ce)
    kl_weights = [w * alpha for w in head_weights] if kl_weights is None else list(kl_weights)
    ce_weights = [w * (1 - alpha) for w in head_weights] if ce_weights is None else list(ce_weights)
    if labels is None:
        z, ignore_index = student_logits[0], -100
        if z.dim() > 3:
            hint = "mhkd.kd_loss(..., dim=1) is for maps"
            raise ValueError(f"mhkd_loss: logits must be [B, K] or [B, T, K], {hint}: {[*z.shape]}")
        labels = torch.full(z.shape[:-1], UNLABELLED, device=z.device)  # [...]
    fused = _use_fused(backend, labels.device, H)
    # The operator checks shapes faster. If it raises, the check here gives the better message.
    if not fused or labels.dim() != 1 or compiling:
        _check_tensors(student_logits, teacher_logits, labels)
    if labels.dim() != 1:
        labels = labels.reshape(-1)  # [B]
        student_logits = [z.reshape(-1, z.shape[-1]) for z in student_logits]  # [B, K] each
        teacher_logits = [z.reshape(-1, z.shape[-1]) for z in teacher_logits]
    numbers, tensors = [tau, *kl_weights, *ce_weights], []
    if fused and compiling:  # as numbers, each new value is compiled again
        one = torch.ones((), dtype=torch.float64, device="cpu")
        numbers, tensors = [0.0] * len(numbers), [one * number for number in numbers]
    settings = numbers, tensors, list(teacher_ce), ignore_index
    compute = _operator if fused else _reference_loss
    try:
        out = compute(student_logits, teacher_logits, labels, *settings)
    except Exception:
        _check_tensors(student_logits, teacher_logits, labels)
        raise
    return out[:2] if return_terms else out[0]


def _reference_loss(student, teacher, labels, numbers, tensors, teacher_ce, ignore_index):
    """The equations in plain PyTorch, the specification of the fused loss. Logits are [B, K].

    numbers: tau, kl_weights [H], ce_weights [H], in one list as the fused loss takes them. tensors:
    empty.
    """
    tau, H = numbers[0], len(student)
    dtypes = [z.dtype for z in (*student, *teacher)]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    counted = labels != ignore_index  # [B], for KL
    labelled = counted & (labels != UNLABELLED)  # [B], for the cross-entropies
    targets = torch.where(labelled, labels, ignore_index)
    # A mean over no labelled row is 0, over no row at all NaN.
    rows = labelled.sum().clamp(min=1) * counted.any()

    def cross_entropy(z):
        z = torch.where(labelled[:, None], z, 0)
        return F.cross_entropy(z, targets, ignore_index=ignore_index, reduction="sum") / rows

    loss = torch.zeros((), dtype=dtype, device=labels.device)
    terms = []
    coefficients = zip(numbers[1 : H + 1], numbers[H + 1 :], map(float, teacher_ce))
    for z_s, z_t, (*weights, ce_t_weight) in zip(student, teacher, coefficients):
        # NaN in a row that does not count for a term must not reach it or its gradients.
        z_s, z_t = z_s.to(dtype), z_t.to(dtype)
        log_p_s = F.log_softmax(torch.where(counted[:, None], z_s, 0) / tau, dim=1)  # [B, K]
        log_p_t = F.log_softmax(torch.where(counted[:, None], z_t.detach(), 0) / tau, dim=1)
        p_t = log_p_t.exp()
        kl = torch.where(p_t == 0, 0, p_t * (log_p_t - log_p_s)).sum()  # F.kl_div has inf - inf
        kl = kl / counted.sum() * tau**2
        ce = cross_entropy(z_s)
        ce_t = cross_entropy(z_t) if ce_t_weight else torch.zeros_like(kl)
        # Equation 1 for each head, equation 2 over the heads.
        for coefficient, term in zip((*weights, ce_t_weight), (kl, ce, ce_t)):
            if coefficient != 0:
                loss = loss + coefficient * term
        terms.append(torch.stack((kl, ce, ce_t)).detach())
    return loss, torch.stack(terms)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tau: float = 4.0,
    backend: str = "auto",
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    dim: int | None = None,
) -> Tensor:
    """tau^2 * KL(teacher || student) of logits [..., K], the mean (Hinton et al. 2015, section 2).

    Rows whose label is `ignore_index` are not counted; other labels have no effect. The teacher
    gets no gradient. `dim` is the dimension of the classes, by default the last one; it is required
    for 4 or more dimensions: dim=1 for maps [B, K, H, W]. Precision and errors are those of
    mhkd_loss, of which this is the first term.
    """
    if dim is None and student_logits.dim() > 3:
        shape = list(student_logits.shape)
        raise ValueError(f"kd_loss: give dim, the dimension of the classes in {shape}")
    if dim is not None:
        student_logits = student_logits.movedim(dim, -1)
        teacher_logits = teacher_logits.movedim(dim, -1)
    if labels is None:
        labels = torch.full(student_logits.shape[:-1], UNLABELLED, device=student_logits.device)
    else:  # others than the ignored ones may be no classes
        labels = torch.where(labels == ignore_index, -100, UNLABELLED)
    settings = {"tau": tau, "alpha": 1.0, "teacher_ce": [False]}
    return mhkd_loss([student_logits], [teacher_logits], labels, backend=backend, **settings)


BACKENDS = ("auto", "reference", "fused")
_operator: Any = None  # the fused loss; set by _use_fused, which may return only a constant


def _use_fused(backend: str, device: torch.device, heads: int) -> bool:
    """Whether the fused loss computes this call."""
    global _operator
    if backend not in BACKENDS:
        backends = ", ".join(BACKENDS)
        raise ValueError(f"mhkd_loss: backend must be one of {backends}, not {backend!r}")
    if backend == "reference":
        return False
    fused = sibling("mhkd_fused", optional=backend == "auto")
    use = fused is not None and fused.select(backend, device, heads, _reference_loss)
    if use:
        _operator = fused.operator
    return use


# torch.compile evaluates the function once for each compiled graph. This attribute is what
# torch.compiler.assume_constant_result sets; calling that would import the whole compiler here.
_use_fused._dynamo_marked_constant = True


def loss_backend() -> str:
    """What backend="auto" uses, for example "fused (CPU avx2, CUDA sm_90)"."""
    fused = sibling("mhkd_fused", optional=True)
    return fused.describe() if fused else "reference (mhkd_fused.py not found)"


def _check_settings(student, teacher, tau, alpha, weights, teacher_ce) -> None:
    if isinstance(student, Tensor) or isinstance(teacher, Tensor):
        raise TypeError("mhkd_loss: logits must be a list, a tensor for each head, not one tensor")
    weights = {name: values for name, values in weights.items() if values is not None}
    lists = {"student logits": student, "teacher logits": teacher, **weights}
    lengths = {name: len(values) for name, values in {**lists, "teacher_ce": teacher_ce}.items()}
    if len({*lengths.values()}) > 1 or not len(student):
        shown = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"mhkd_loss: the lists differ in length or are empty: {shown}")
    numbers = [(name, w) for name, values in weights.items() for w in values]
    if any(isinstance(value, Tensor) for value in (tau, alpha, *(w for _, w in numbers))):
        raise TypeError(
            "mhkd_loss: tau, alpha and the weights must be numbers, which get no gradient, "
            "not tensors (use item())"
        )
    rules = [
        ("tau must be a finite number above 0", tau, 0 < tau < math.inf),
        ("alpha must be between 0 and 1", alpha, 0 <= alpha <= 1),
    ]
    rule = "must be finite and not negative"
    rules += [(f"{name} {rule}", w, 0 <= w < math.inf) for name, w in numbers]
    rules += [("teacher_ce must contain True or False", x, x in (0, 1)) for x in teacher_ce]
    for rule, value, holds in rules:
        if not holds:
            raise ValueError(f"mhkd_loss: {rule}, not {value}")


def _check_tensors(student, teacher, labels) -> None:
    shape, device = student[0].shape, labels.device
    for z in (*student, *teacher):
        if z.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"mhkd_loss: logits must be floating point, not {z.dtype}")
        if z.shape != shape or not shape or shape[-1] == 0:
            shapes = f"{list(z.shape)}, {list(shape)}"
            raise ValueError(f"mhkd_loss: all logits must be [..., K] and of one shape: {shapes}")
        if z.device != device:
            devices = f"{z.device}, {device}"
            raise RuntimeError(f"mhkd_loss: logits and labels must be on one device: {devices}")
    if labels.dtype != torch.int64:
        raise TypeError(f"mhkd_loss: labels must be class indices, int64, not {labels.dtype}")
    if labels.shape != shape[:-1]:
        raise ValueError(
            "mhkd_loss: labels must be [...] for logits [..., K], a label for each row: "
            f"{list(labels.shape)} for {list(shape)}"
        )


# --------------------------------------------------------------------------------------------------
# 4. Methods: what each adds to both networks, and its loss terms
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Option:
    """A setting. rule: a test and a text that says what it requires.

    If the default is None, the recipe's value is used. The recipe contains the defaults for the
    data set, the network and the optimizer; see the help text.
    """

    default: Any
    help: str
    parse: Callable[[str], Any] = float
    rule: tuple[Callable[[Any], bool], str] | None = None


# Numbers that float32 can represent, too.
POSITIVE = (lambda v: 0 < v < 3e38, "a number above 0 and below 3e38")
NOT_NEGATIVE = (lambda v: 0 <= v < 3e38, "a number from 0 to 3e38")
FRACTION = (lambda v: 0 <= v <= 1, "between 0 and 1")
COUNT = (lambda v: 1 <= v < 2**31, "at least 1 and below 2^31")


def one_of(*values: str) -> tuple[Callable[[Any], bool], str]:
    return (lambda v: v in values, f"one of {', '.join(values)}")


def words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in words(text))


@dataclasses.dataclass
class Batch:
    """What a method gets in a training step."""

    student: Outputs
    teacher: Outputs | None
    labels: Tensor  # [B]; UNLABELLED for images without a label
    indices: Tensor  # [B], positions in data.train, not rows of data.images
    # Scalars for the log. Names that begin with train_accuracy: 100 for each correct image.
    metrics: dict[str, Tensor] = dataclasses.field(default_factory=dict)


class Method(nn.Module):
    """A way to train the student. A subclass in METHODS is available as Config(method=...).

    The loss is a sum of named terms: the final terms and each method's own terms. If methods are
    joined (`a+b`), the one with the highest priority computes the final terms; those of mhkd
    include its heads. Most methods define `units` and `own_terms`.
    The values of the options that a class declares are in `self.options`. See docs/methods.md.
    """

    options: dict[str, Option] = {}  # of its own terms
    final_options: dict[str, Option] = {}  # of its final terms
    priority = 0  # of joined methods the one with the highest priority gives the final terms
    needs_teacher = True
    needs_labels = False  # of all images: it refuses unlabelled ones
    needs_penultimate: Sequence[str] = ()  # of which networks: "student", "teacher"
    on_teacher = False  # the frozen teacher takes the student's place: batch.student

    def __init__(self, config: Config, student: FeatureExtractor, teacher: Any, data: Data):
        """student, teacher: FeatureExtractors, the teacher None without one."""
        super().__init__()
        self.config, self.options = config, types.SimpleNamespace(**config.options)

    @classmethod
    def units(cls, config: Config, network: str) -> Sequence[int]:
        """Units, counted from 1, whose features it needs of the "student" or the "teacher"."""
        return ()

    @classmethod
    def needs_maps(cls, config: Config) -> bool:
        """Whether a step needs the teacher's feature maps, which --teacher-store does not hold."""
        return bool(cls.units(config, "teacher"))

    @classmethod
    def adapt(cls, student: nn.Module, teacher: Any, num_classes: int, example: Tensor) -> None:
        """Change the plain student for its training; `plain` reverses this."""

    @classmethod
    def plain(cls, student: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of the plain network, from that of the adapted student."""
        return state

    def prepare(self, of_teacher: Callable[[], Iterator[Outputs]]) -> None:
        """Called once before the first step. of_teacher() yields its outputs for an epoch."""

    def frozen_heads(self, teacher: Outputs) -> list[Tensor]:
        """Logits [B, K] of the teacher's pretrained heads: batch.teacher.heads."""
        return []

    def final_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Loss terms on the final outputs. Default: the cross-entropy."""
        return {"ce": mean_cross_entropy(batch.student.logits, batch.labels)}

    def own_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Loss terms that the method adds."""
        return {}

    def saved(self) -> dict[str, Any]:
        """What student.pt contains besides the plain network."""
        return {}

    def backward(self, terms: dict, student: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Set the gradients of the student's parameters and of all others that are trained."""
        sum(terms.values()).backward()


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over the labelled rows of logits [B, K]; 0 if there are none."""
    total = F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")
    return total / (labels != UNLABELLED).sum().clamp(min=1)


class CrossEntropy(Method):
    """The network alone: the baseline, and how teachers are trained."""

    needs_teacher = False


class Distillation(Method):
    """Knowledge distillation (Hinton et al. 2015): equation 1 on the final outputs."""

    priority = 1
    final_options = {
        "tau": Option(4.0, "temperature of the softmax", rule=POSITIVE),
        "alpha": Option(
            0.9, "weight of the divergence; the cross-entropy has 1 - alpha", rule=FRACTION
        ),
        "gamma": Option(
            None, "weight of the final outputs' cross-entropy (default: 1 - alpha)",
            rule=NOT_NEGATIVE,
        ),
        "kd_weight": Option(
            None, "weight of the final outputs' divergence, tau^2 KL (default: alpha)",
            rule=NOT_NEGATIVE,
        ),
    }  # fmt: skip

    def final_weights(self) -> tuple[float, float]:
        """Weights of tau^2 KL and of the cross-entropy of the final outputs."""
        o = self.options
        kl = o.alpha if o.kd_weight is None else o.kd_weight
        return kl, 1 - o.alpha if o.gamma is None else o.gamma

    def final_terms(self, batch: Batch) -> dict[str, Tensor]:
        kl, ce = self.final_weights()
        loss = mhkd_loss(
            [batch.student.logits], [batch.teacher.logits], batch.labels, tau=self.options.tau,
            kl_weights=[kl], ce_weights=[ce], teacher_ce=[False], backend=self.config.backend,
        )  # fmt: skip
        return {"kd": loss}


HEAD_OPTIONS = {
    "units": Option(
        None, "units with a head, counted from 1 (default: all, 1,2,3)", integers,
        (lambda v: v and len({*v}) == len(v) and min(v) > 0, "different units: 1,2,3"),
    ),
    "head_width": Option(None, "channels of the heads (default: 256; digits 64)", int, COUNT),
    "head_stride": Option(
        None, "stride of the heads' convolutions (default: 1; digits 2)", int, COUNT
    ),
}  # fmt: skip


class MultiHeadDistillation(Distillation):
    """Equation 2 over the final outputs and the auxiliary heads (Wang et al. 2020)."""

    priority = 2
    final_options = {
        **Distillation.final_options,
        "beta": Option(
            None, "weight of each auxiliary head (default: 0.5; svhn 5)", rule=NOT_NEGATIVE
        ),
        "head_ce": Option(
            None, "weight of the student heads' cross-entropy, times beta (default: 1 - alpha)",
            rule=NOT_NEGATIVE,
        ),
        **HEAD_OPTIONS,
        "teacher_heads": Option(
            "scratch", "targets of the student's heads: scratch, teacher heads that are trained at "
            "the same time; pretrained, teacher heads that are trained before and frozen; logits, "
            "the teacher's final logits", str, one_of("scratch", "pretrained", "logits"),
        ),
        "teacher_heads_epochs": Option(
            None, "epochs of training for pretrained heads (default: a third of --epochs)",
            int, COUNT,
        ),
    }  # fmt: skip

    def __init__(self, config: Config, student: FeatureExtractor, teacher: Any, data: Data):
        super().__init__(config, student, teacher, data)
        o = self.options
        self.student_heads = AuxHeads(student, o.units, o.head_width, o.head_stride)
        if o.teacher_heads != "logits":
            self.teacher_heads = AuxHeads(teacher, o.units, o.head_width, o.head_stride)
        if o.teacher_heads == "pretrained":
            self.teacher_heads.requires_grad_(False)

    @classmethod
    def units(cls, config: Config, network: str) -> Sequence[int]:
        no_heads = network == "teacher" and config.options["teacher_heads"] == "logits"
        return () if no_heads else config.options["units"]

    @classmethod
    def needs_maps(cls, config: Config) -> bool:
        return config.options["teacher_heads"] == "scratch"

    def train(self, mode: bool = True) -> MultiHeadDistillation:
        super().train(mode)
        if self.options.teacher_heads == "pretrained":
            self.teacher_heads.eval()
        return self

    def frozen_heads(self, teacher: Outputs) -> list[Tensor]:
        pretrained = self.options.teacher_heads == "pretrained"
        return self.teacher_heads(teacher)[1:] if pretrained else []

    def final_terms(self, batch: Batch) -> dict[str, Tensor]:
        o, D = self.options, len(self.student_heads)
        with autocast(self.config, batch.labels.device):
            student = self.student_heads(batch.student)
            if o.teacher_heads == "scratch":
                teacher = self.teacher_heads(batch.teacher)
            elif o.teacher_heads == "pretrained":
                teacher = [batch.teacher.logits, *batch.teacher.heads]
            else:
                teacher = [batch.teacher.logits] * (1 + D)
        kl_weight, ce_weight = self.final_weights()
        head_ce = 1 - o.alpha if o.head_ce is None else o.head_ce
        # The teacher's heads learn from their cross-entropy alone (paper, section 3.1).
        loss, terms = mhkd_loss(
            student, teacher, batch.labels, tau=o.tau,
            kl_weights=[kl_weight] + [o.beta * o.alpha] * D,
            ce_weights=[ce_weight] + [o.beta * head_ce] * D,
            teacher_ce=[False] + [o.teacher_heads == "scratch"] * D,
            return_terms=True, backend=self.config.backend,
        )  # fmt: skip
        for unit, (kl, ce, ce_teacher) in zip((0, *o.units), terms):
            batch.metrics |= {f"kl_{unit}": kl, f"ce_{unit}": ce}
            if unit and o.teacher_heads == "scratch":
                batch.metrics[f"ce_teacher_{unit}"] = ce_teacher
        return {"mhkd": loss}


METHODS: dict[str, type[Method]] = {
    "ce": CrossEntropy,
    "kd": Distillation,
    "mhkd": MultiHeadDistillation,
}


def find_methods(method: str) -> dict[str, type[Method]]:
    """The methods joined by `+` in `method`, sorted by priority, then by name."""
    names = method.split("+")
    if not METHODS.keys() >= {*names}:
        others = sibling("mhkd_baselines", optional=True)  # registers its methods
        for name in names:
            if not others and name not in METHODS:
                raise UsageError(
                    f"there is no method '{name}' in mhkd.py: those of other authors are in "
                    "mhkd_baselines.py, which must be copied beside it"
                )
            check_name("method", name, METHODS)
    if len({*names}) < len(names):
        raise UsageError(f"--method {method} contains a method twice")
    *first, last = names = sorted(names, key=lambda name: (METHODS[name].priority, name))
    for name in first:
        if METHODS[name].own_terms is Method.own_terms:
            raise UsageError(f"--method {method}: {name} adds nothing to {last}, so leave it out")
    special = [name for name in names if METHODS[name].backward is not Method.backward]
    if len(special) > 1:
        raise UsageError(f"--method {method}: {' and '.join(special)} cannot be joined")
    return {name: METHODS[name] for name in names}


def takes_unlabelled(method: str) -> bool:
    """Whether a method trains on unlabelled images, too. If not, they are left out.

    Raises:
        UsageError: it needs the labels of all images.
    """
    methods = find_methods(method)
    for name, kind in methods.items():
        if kind.needs_labels:
            raise UsageError(
                f"--method {name} needs the labels of all images, and some are unlabelled: move "
                "these out of the data, or use kd or mhkd"
            )
    return all(kind.needs_teacher and not kind.on_teacher for kind in methods.values())


# --------------------------------------------------------------------------------------------------
# 5. Training
# --------------------------------------------------------------------------------------------------


def build_student(config: Config, num_classes: int, images: Tensor) -> nn.Module:
    """The student before training. Lazy layers take their size from the images."""
    init, size = config.student_init, config.image_size
    student = build_model(config.student, num_classes, init, size)
    if any(isinstance(p, nn.UninitializedParameter) for p in student.parameters()):
        with torch.no_grad():
            student.eval()(images)
    return student


class Distiller(nn.Module):
    """Student, frozen teacher and methods as one module: what a training step runs.

    Args:
        teacher: its network, or None.
        heads: the state dict of the teacher's pretrained heads, if the method uses them.
    """

    def __init__(
        self, config: Config, data: Data, teacher: nn.Module | None, heads: dict | None = None
    ):
        super().__init__()
        K, methods = len(data.classes), find_methods(config.method)
        x = data.center_crop(data.train[:2]).cpu()  # real images, to inspect the networks
        self.config = config
        # The student comes first: its initial weights depend on the seed, not on the method.
        set_seed(config.seed)
        on_teacher = any(method.on_teacher for method in methods.values())
        if on_teacher:
            student, teacher = teacher, None
        else:
            student = build_student(config, K, x)
        self.initial_sha256 = sibling("mhkd_runs").sha256_of_state(student.state_dict())
        networks = {"student": student} | ({"teacher": teacher} if teacher else {})
        for network in networks.values():
            network.to(memory_format=memory_format(data.device))
            dtypes = {p.dtype for p in network.parameters() if p.is_floating_point()}
            if dtypes - {torch.float32}:
                role = "student" if network is student else "teacher"
                raise UsageError(
                    f"{role} {getattr(config, role)}: its weights are not float32: build it in "
                    "float32, and use --precision bfloat16"
                )
        for method in methods.values():
            method.adapt(student, teacher, K, x)
        self.units, extractors = {}, {}
        for name, network in networks.items():
            needed = sorted({u for method in methods.values() for u in method.units(config, name)})
            names, layouts = find_units(config, name, network, x) if needed else ((), None)
            if needed and needed[-1] > len(names):
                raise UsageError(f"the {name} has no unit {needed[-1]}: it has {len(names)}")
            self.units[name] = {unit: names[unit - 1] for unit in needed}
            with self.naming(name):
                extractors[name] = FeatureExtractor(
                    network, self.units[name], K, frozen=name == "teacher" or on_teacher,
                    example_input=x, layout=layouts,
                )  # fmt: skip
            needy = [n for n, method in methods.items() if name in method.needs_penultimate]
            extractors[name].uses_penultimate = bool(needy)
            if needy and (extractors[name].width is None or extractors[name].several):
                number = "several" if extractors[name].several else "none"
                raise UsageError(
                    f"--method {needy[0]} needs the input of a linear classifier, and the {name} "
                    f"{getattr(config, name)} has {number}: use kd or mhkd"
                )
        self.student = extractors["student"]
        self._teacher = (extractors.get("teacher"),)  # in a tuple: not part of the state dict
        arguments = config, self.student, self.teacher, data
        self.methods = nn.ModuleList(method(*arguments) for method in methods.values())
        if heads:
            self.methods[-1].teacher_heads.load_state_dict(heads)
        self.to(data.device, memory_format=memory_format(data.device))
        self.store: Any = None  # of the teacher's outputs

    @contextlib.contextmanager
    def naming(self, role: str) -> Iterator[None]:
        """Errors name the network, and have no hints for programs."""
        try:
            yield
        except UsageError as error:
            what = str(error).partition(": give ")[0].partition(": check num_classes")[0]
            hint = ": wrap it in a function of a FILE.py, or select other units"
            what += hint if what != str(error) else ""
            raise UsageError(f"{role} {getattr(self.config, role)}: {what}") from error

    @property
    def teacher(self) -> FeatureExtractor | None:
        return self._teacher[0]

    def forward(self, images: Tensor, labels: Tensor, indices: Tensor) -> tuple[dict, dict]:
        """Images [B, 3, S, S], labels [B], indices [B], positions in data.train.

        Returns the loss's named terms, and metrics for the log.
        """
        student = self.observe(self.student, images)
        teacher = self.targets(images, indices) if self.teacher else None
        batch = Batch(student, teacher, labels, indices)
        terms = self.methods[-1].final_terms(batch)
        names = {*LOG_ENTRIES, *terms}
        for method in self.methods:
            own = method.own_terms(batch)
            names = check_new(names, own)
            terms |= own
        check_new(names, batch.metrics)
        hits, labelled = student.logits.argmax(dim=1) == labels, labels != UNLABELLED
        # The loss is the first metric: train() and mhkd_record.means_of() rely on it.
        metrics = {"loss": sum(terms.values()), **terms, **batch.metrics}
        # means_of() divides them: batches may differ in size, and one may have no label.
        metrics["train_accuracy"] = 100 * hits.float().sum()
        metrics["labelled"] = labelled.float().sum()
        return terms, {name: metric.detach() for name, metric in metrics.items()}

    def targets(self, images: Tensor, indices: Tensor) -> Outputs:
        """The teacher's outputs, read from the store if it has them."""

        def compute() -> Outputs:
            outputs = self.observe(self.teacher, images)
            with autocast(self.config, images.device):
                outputs.heads = [z for m in self.methods for z in m.frozen_heads(outputs)]
            return outputs

        if not self.store:
            return compute()
        found = self.store.outputs(indices, lambda: named_outputs(compute()))
        heads = [z for name, z in found.items() if name.startswith("head_")]
        return Outputs(found["logits"], {}, found.get("penultimate"), heads)

    def first_targets(self, data: Data) -> Iterator[Outputs]:
        """The teacher's outputs for the batches of the first epoch."""
        for images, _, indices in epoch_batches(data, self.config, 1):
            yield self.targets(images, indices)

    def observe(self, network: FeatureExtractor, images: Tensor) -> Outputs:
        """A network's outputs, computed in the precision of the run, for losses in float32."""
        role = "teacher" if network is self.teacher else "student"
        with autocast(self.config, images.device), self.naming(role):
            outputs = network(images)
        return outputs.float() if self.config.precision == "bfloat16" else outputs

    def backward(self, terms: dict[str, Tensor]) -> None:
        if not any(term.requires_grad for term in terms.values()):
            raise UsageError(NO_GRADIENT)
        student = [p for p in self.student.parameters() if p.requires_grad]
        others = [p for p in self.methods.parameters() if p.requires_grad]
        special = [m for m in self.methods if type(m).backward is not Method.backward]
        # At most one method has a backward of its own, see find_methods().
        (special or self.methods)[0].backward(terms, student, others)

    def plain_state(self, student: nn.Module | None = None) -> dict[str, Any]:
        """The state dict of the plain student, or of an average of it, on the CPU."""
        student = student or self.student.model
        state = student.state_dict()
        versions = getattr(state, "_metadata", None)  # of its modules; MNASNet needs them to load
        for method in self.methods:
            state = method.plain(student, state)
        tensors = {name: t for name, t in state.items() if isinstance(t, Tensor)}
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        return sibling("mhkd_runs").with_versions({**state, **tensors}, versions)


NO_GRADIENT = "the student gets no gradient: give a term of the loss a weight above 0"
LOG_ENTRIES = ("loss", "labelled", "train_accuracy", "val_accuracy", "test_accuracy", "epoch", "lr")
LOG_ENTRIES += ("images_per_second", "seconds")


def check_new(names: set[str], own: Mapping[str, Any]) -> set[str]:
    """All names, if those of a method's own terms or metrics are new."""
    for name in names & own.keys():
        raise UsageError(f"the log has a '{name}' already: rename the method's term or metric")
    return names | own.keys()


def train(config: Config, data: Data | None = None) -> dict[str, Any]:
    """Train the student of a configuration, and its teacher first if there is no checkpoint.

    A finished run is not repeated. An interrupted one continues after its last finished epoch.
    Under `torchrun` every process computes a part of each batch, and the first one writes.

    Args:
        data: the data set, if it is loaded already; it must be the one that `config` names.

    Returns:
        The content of result.json. "accuracy", in percent of the test images, is that of the
        student in student.pt (config.keep), saved without heads and loaded into the plain network.

    Raises:
        UsageError, mhkd_runs.RunError: a mistake in the input; nothing has been overwritten.
    """
    runs, records = sibling("mhkd_runs"), sibling("mhkd_record")
    if not torch.is_grad_enabled():
        raise UsageError("call train() outside of torch.no_grad() and torch.inference_mode()")
    find_device(config)  # reports errors before the data are loaded, as check() does
    for name in filter(None, (config.student, config.teacher)):
        if ":" in name:
            sibling("mhkd_custom").check(name)
    # Loaded before the processes are joined, because PyTorch then limits the time that they wait.
    data = data or sibling("mhkd_data").load_data(config)
    with runtime(config) as device:
        data = sibling("mhkd_data").on_device(data, device)
        data = sibling("mhkd_data").for_run(config, data)
        teachers = sibling("mhkd_teacher")
        teachers.check_init(config, data)
        code = records.code_of(config)  # before hours of training of the teacher
        # Both may call train() for a run of their own.
        teacher, path, teacher_record = teachers.find_teacher(config, data)
        heads, teacher_record["teacher_heads_sha256"] = teachers.find_heads(config, data, path)
        record = records.record_of(config, data, teacher_record, code)
        folder = Path(config.out) / record["name"]
        with runs.locked_by_main(folder, f"another process is training in '{folder}'"):
            # Also before a finished run is used: weights or units of its networks may have changed.
            distiller = Distiller(config, data, teacher, heads)
            kinds = ("student_code", "student_init", "teacher_code", "teacher_init")
            records.check_files(config, code, kinds)
            # Random initial weights are recorded, not compared: they depend on the processor.
            record |= {"units": distiller.units, "initial_weights": distiller.initial_sha256}
            record["initial_state_sha256"] = records.initial_state_sha256(config, data)
            run = runs.Run(folder, record, config.overwrite)
            runs.wait_for_all()  # until the main process has moved a replaced run away
            if run.result:
                log(f"already finished: '{folder}'")
                return run.result
            if config.compile:
                for network in filter(None, (distiller.student, distiller.teacher)):
                    network.compile(dynamic=False)
            parameters = [p for p in distiller.parameters() if p.requires_grad]
            optimizer = make_optimizer(config, parameters)
            state = {"distiller": distiller, "optimizer": optimizer}
            student = distiller.student.model  # what is tested and saved
            if config.ema:
                with explain("--ema needs a copy of the student", "leave --ema out"):
                    state["average"] = average = AveragedModel(
                        student, multi_avg_fn=moving_average(config.ema), use_buffers=True
                    )
                student = average.module
            if config.keep == "best":
                state["best"] = records.Best()
            run.restore(state, records.environment(config, device))
            runs.check_processes(distiller, len(run.log))
            begin = f"continues after epoch {len(run.log)} of" if run.log else "starts:"
            size = f"images of {data.size} x {data.size} pixels"
            log(f"'{folder}' {begin} {config.epochs} epochs on {device}, {size}")
            if config.teacher_store:
                distiller.store = teachers.open_store(config, data, distiller, record)
            if not run.log:
                distiller.train()  # frozen heads are in eval mode
                if distiller.store:
                    distiller.store.open(0)
                for method in distiller.methods:
                    set_seed(seed_of(config.seed, 0, rank()))
                    method.prepare(lambda: distiller.first_targets(data))
                if distiller.store:
                    distiller.store.save()
            if config.tensorboard:
                run.show_in_tensorboard()
            N = len(data.train)
            bar = progress_bar(config.epochs * N, config.student, len(run.log) * N)
            for epoch in range(len(run.log) + 1, config.epochs + 1):
                started = time.perf_counter()
                set_seed(seed_of(config.seed, epoch, rank()))  # for dropout, CRD
                distiller.train()
                if distiller.store:  # a view: one augmentation of every image
                    distiller.store.open((epoch - 1) % config.views)
                # Metrics stay on the device: the host waits once per epoch.
                steps, sizes, names = [], [], []
                for images, labels, indices in epoch_batches(data, config, epoch):
                    lr = learning_rate(config, epoch - 1 + len(steps) * config.batch_size / N, N)
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                    terms, metrics = distiller(images, labels, indices)
                    optimizer.zero_grad()
                    distiller.backward(terms)
                    average_gradients(parameters)
                    if config.clip_grad:
                        nn.utils.clip_grad_norm_(parameters, config.clip_grad)
                    optimizer.step()
                    if config.ema:
                        average.update_parameters(distiller.student.model)
                    names = names or [*metrics]
                    if {*names} != metrics.keys():
                        text = f"{', '.join(metrics)} after {', '.join(names)}"
                        raise UsageError(f"the metrics differ between steps: {text}")
                    steps.append(torch.stack([metrics[name] for name in names]))
                    sizes.append(len(labels))
                    if epoch == 1 and len(steps) == 1:
                        records.check_saved(distiller, images[:2])
                        records.check_trained(distiller, parameters, metrics["labelled"])
                    # means_of() raises an error. Elsewhere reading the loss waits for the device.
                    if device.type == "cpu" and world_size() == 1 and not steps[-1][0].isfinite():
                        break
                    bar.update(len(labels) * world_size())
                entry = {"epoch": epoch, "lr": lr}
                entry |= records.means_of(steps, sizes, names, parameters, epoch)
                seconds = time.perf_counter() - started  # without the tests
                entry["images_per_second"] = round(len(data.train) / seconds, 1)
                for name in ("test", "val") if len(data.val) else ("test",):
                    key = f"{name}_accuracy"
                    if distiller.student.frozen and run.log:  # the teacher, on which heads learn
                        entry[key] = run.log[-1][key]
                    else:
                        entry[key] = evaluate(student, data, getattr(data, name))["accuracy"]
                entry["seconds"] = round(time.perf_counter() - started, 3)
                run.log.append(entry)
                if config.keep == "best":
                    state["best"].update(entry, distiller.plain_state(student))
                if distiller.store:
                    distiller.store.save()
                    runs.wait_for_all()  # the next epoch may read the rows of other processes
                run.save(state)
                log(records.line_of(config, entry))
            if config.keep == "best":
                kept, content = state["best"].epoch, state["best"].student
            else:
                kept, content = config.epochs, distiller.plain_state(student)
            return records.finish(run, config, data, distiller, content, kept)


def make_optimizer(config: Config, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        # Not fused: on the CPU that is wrong if a gradient has another layout than its parameter.
        return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)
    settings = {"momentum": config.momentum, "weight_decay": config.weight_decay}
    return torch.optim.SGD(parameters, config.lr, **settings)


def moving_average(decay: float) -> Callable:
    """For AveragedModel: the exponential moving average; integer buffers are copied."""
    average = get_ema_multi_avg_fn(decay)

    def update(averages: list[Tensor], current: list[Tensor], steps: Any) -> None:  # of one dtype
        if averages[0].is_floating_point():
            average(averages, current, steps)
        else:
            for old, new in zip(averages, current):
                old.copy_(new)

    return update


def learning_rate(config: Config, at: float, images: int) -> float:
    """The learning rate of a step. at: epochs before it, with fractions. images: of an epoch."""
    if config.schedule == "cosine":
        factor = (1 + math.cos(math.pi * at / config.epochs)) / 2
    else:  # a milestone s is the last epoch with the old rate; s + 1 has the lower one
        factor = config.lr_decay ** sum(at >= step for step in config.lr_steps)
    if at < config.warmup:
        factor *= min(1, (at + config.batch_size / images) / config.warmup)
    return config.lr * factor


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """PyTorch's autocast to bfloat16 if --precision asks for it, for networks and heads."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def memory_format(device: torch.device) -> torch.memory_format:
    """Channels-last on the CPU, where it makes a step of most pairs 5 to 10 % faster."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def seed_of(*parts: Any) -> int:
    """A seed below 2^62 from a run's seed, epoch and process.

    Each epoch is seeded anew, so that checkpoints contain no state of a generator.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 2


def set_seed(seed: int) -> None:
    """Seed PyTorch, and NumPy and random, from which a user's network may draw."""
    torch.manual_seed(seed)
    random.seed(seed)
    with contextlib.suppress(ImportError):
        import numpy

        numpy.random.seed(seed % 2**32)


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, part: Tensor | None = None) -> dict[str, Any]:
    """Accuracies in percent on images of the data, by default the test images.

    Top-1, top-5, and of each class that has images, in float32. The modes are restored.

    Raises:
        UsageError: the network returns NaN.
    """
    part, K = data.test if part is None else part, len(data.classes)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    batches = part.split(max(10, 500 * 32**2 // data.size**2))  # 500 images of 32 x 32
    best, bad = [], torch.zeros((), dtype=torch.bool, device=part.device)
    for batch in batches:
        logits = model(data.center_crop(batch))
        bad |= logits.isnan().any()
        best.append(logits.topk(min(5, K), dim=1).indices)
    for module, mode in modes.items():
        module.training = mode
    if bad:
        raise UsageError(
            "the network returns NaN for test or validation images: try a lower --lr, and leave "
            "out --ema if a buffer of the network contains infinities, which have no average"
        )
    labels = data.labels[part]
    hit = torch.cat(best) == labels[:, None]  # [N, 5]
    right, counts = (torch.bincount(y, minlength=K) for y in (labels[hit[:, 0]], labels))
    often = Counter(data.classes)
    names = [f"{c} (class {i})" if often[c] > 1 else c for i, c in enumerate(data.classes)]
    pairs = zip(names, right.tolist(), counts.tolist())
    of_class = {name: 100 * r / n for name, r, n in pairs if n}
    return {
        "accuracy": 100 * hit[:, 0].sum().item() / len(part),
        "top5_accuracy": 100 * hit.sum().item() / len(part) if K > 5 else None,
        "mean_class_accuracy": sum(of_class.values()) / len(of_class),
        "class_accuracy": of_class,
    }


def find_units(config: Config, role: str, model: nn.Module, image: Tensor) -> tuple[Any, Any]:
    """The names of a network's units, and their layouts as FeatureExtractor takes them."""
    names = getattr(config, f"{role}_units") or UNITS.get(type(model))
    if type(model) in UNITS:
        return names, None
    return sibling("mhkd_custom").find_units(model, image, role, getattr(config, role), names)


def named_outputs(outputs: Outputs) -> dict[str, Tensor]:
    """The outputs that a store can hold, [B, size] each."""
    heads = {f"head_{i}": z for i, z in enumerate(outputs.heads, 1)}
    named = {"logits": outputs.logits, "penultimate": outputs.penultimate, **heads}
    return {name: z for name, z in named.items() if z is not None}


# --------------------------------------------------------------------------------------------------
# 6. Batches: all images as one uint8 tensor; batched augmentation
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Data:
    """A data set in memory: images uint8 [N, M, M, 3], labels int64 [N], indices of its parts.

    Training images may be unlabelled: their label is UNLABELLED.
    M >= size, the side that the networks see. mean and std of each channel are on the 0-1 scale.
    The images may stay in host memory or in a file; all other tensors are on `device`.
    """

    images: Tensor
    labels: Tensor
    train: Tensor
    val: Tensor
    test: Tensor
    classes: list[str]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str  # of all labelled images and their labels
    name: str = ""  # in DATASETS
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # for the record
    prefetch: Callable[[Tensor, Tensor], None] | None = None  # for images mapped from a file
    unlabelled_sha256: str | None = None  # of the unlabelled images, if any
    settings: dict[str, Any] | None = None  # of load_data(): of its Config, and what is hashed
    labels_sha256: str | None = None  # of labels and parts as loaded

    def __post_init__(self) -> None:
        self.device, self.train_labels = self.labels.device, self.labels[self.train]
        self.labelled_fraction = (self.train_labels != UNLABELLED).double().mean().item()
        # On the 0-255 scale, and sent to the device once: the host would wait for each copy.
        statistics = (torch.tensor(values, device=self.device) for values in (self.mean, self.std))
        self.mean_255, self.std_255 = (255 * values for values in statistics)

    def to(self, device: torch.device, fraction: float = 0.5) -> Data:
        """On a device. Images that need more than this fraction of its free memory stay."""
        names = ["labels", "train", "val", "test"]
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
        if fits := self.images.nbytes <= fraction * free:
            names.append("images")
        moved = {name: getattr(self, name).to(device) for name in names}
        prefetch = None if fits and device.type != "cpu" else self.prefetch
        return dataclasses.replace(self, **moved, prefetch=prefetch)

    def labelled(self) -> Data:
        """The same without unlabelled training images."""
        facts = {name: fact for name, fact in self.facts.items() if name != "unlabelled"}
        train = self.train[self.train_labels != UNLABELLED]
        return dataclasses.replace(
            self, train=train, facts=facts, unlabelled_sha256=None, labels_sha256=None
        )

    def normalise(self, images: Tensor) -> Tensor:
        """Images [B, S, S, 3], 0 to 255, to float32 [B, 3, S, S]."""
        images = ((images - self.mean_255) / self.std_255).permute(0, 3, 1, 2)
        return images.contiguous(memory_format=memory_format(images.device))

    def gather(self, indices: Tensor) -> Tensor:
        """The images with these indices, uint8 [B, M, M, 3], on the device."""
        indices = indices.to(self.images.device)
        if self.prefetch:
            self.prefetch(self.images, indices)
        return self.images[indices].to(self.device)

    def center_crop(self, indices: Tensor) -> Tensor:
        """Center crops of images, normalised, [B, 3, S, S]: the input of a network in a test."""
        at = (self.images.shape[1] - self.size) // 2
        span = slice(at, at + self.size)
        return self.normalise(self.gather(indices)[:, span, span])


def augment(images: Tensor, corners: Tensor, flipped: Tensor, padding: int) -> Tensor:
    """Random crop and horizontal flip of uint8 images [B, S, S, 3], for given random numbers.

    Args:
        images: the batch, which is padded with `padding` black pixels on each side.
        corners: row and column [B, 2] of each crop's corner in the padded image.
        flipped: bool [B], which images are flipped.
    """
    B, S = images.shape[:2]
    span = torch.arange(S, device=images.device)
    rows = corners[:, 0, None] + span  # [B, S]
    columns = corners[:, 1, None] + torch.where(flipped[:, None], span.flip(0), span)  # [B, S]
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))  # [B, S + 2p, S + 2p, 3]
    batch = torch.arange(B, device=images.device)
    return padded[batch[:, None, None], rows[:, :, None], columns[:, None, :]]


RESIZED_CROP_FROM = 64  # pixels; smaller images are cropped from a black border as in the paper


def draw_epoch(config: Config, size: int, epoch: int) -> tuple[Tensor, ...]:
    """All random numbers for an epoch's images: order [N], crops [N, 2 or 4], flips [N], seeds [N].

    The seeds are for --augment. All are drawn on the CPU: they are the same on every device. With a
    view seed, adding images at the end does not change the numbers of the existing images.
    """
    generator = torch.Generator().manual_seed(seed_of(config.seed, epoch))
    order = torch.randperm(size, generator=generator)

    def source(of: str) -> torch.Generator:
        if config.view_seed is not None:
            view = (epoch - 1) % config.views
            generator.manual_seed(seed_of("view", config.view_seed, view, of))
        return generator

    if config.image_size < RESIZED_CROP_FROM:
        crops = torch.randint(2 * config.crop_padding + 1, (size, 2), generator=source("crops"))
    else:
        # Written in this way because mhkd_code.parts_of_code() looks for it.
        crops = sibling("mhkd_images").draw_boxes(size, config.crop_scale, source("crops"))
    flipped = (torch.rand(size, generator=source("flips")) < 0.5) & config.flip
    seeds = torch.randint(2**62, (size,), generator=source("seeds"))
    if config.view_seed is not None:  # drawn for each image, whatever the order
        crops, flipped, seeds = crops[order], flipped[order], seeds[order]
    return order, crops, flipped, seeds


def epoch_batches(data: Data, config: Config, epoch: int) -> Iterator[tuple[Tensor, ...]]:
    """An epoch of images [B, 3, S, S], labels [B] and indices [B], positions in data.train.

    With several processes each gets an equal part of every batch.
    """
    draws = draw_epoch(config, len(data.train), epoch)
    order, crops, flipped, seeds = (draw.to(data.device) for draw in draws)
    starts = list(range(0, len(order), config.batch_size))
    if len(order) - starts[-1] < 2 * world_size():
        starts.pop()  # batch norm cannot train on a single image

    def pieces() -> Iterator[tuple[slice, Tensor]]:
        for start in starts:
            stop = min(start + config.batch_size, len(order))
            stop -= (stop - start) % world_size()
            mine = slice(start + rank(), stop, world_size())
            yield mine, data.gather(data.train[order[mine]])

    for mine, images in one_ahead(pieces()) if data.prefetch else pieces():
        if config.image_size < RESIZED_CROP_FROM:
            images = augment(images, crops[mine], flipped[mine], config.crop_padding)
        else:
            crop = sibling("mhkd_images").resized_crop
            images = crop(images, crops[mine], flipped[mine], config.image_size)
        if config.augment != "crop":
            images = sibling("mhkd_images").apply_policy(images, config.augment, seeds[mine])
        images = data.normalise(images)
        yield images, data.labels[data.train[order[mine]]], order[mine]


def one_ahead(items: Iterator) -> Iterator:
    """The same items; a thread computes the next one while the current one is used."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item


# --------------------------------------------------------------------------------------------------
# 7. Processes, as torchrun or torch.multiprocessing start them; devices; output
# --------------------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def log(text: str) -> None:
    """Print a line in the main process."""
    sibling("mhkd_runs").log(text)


def progress_bar(total: int, title: str, done: int) -> Any:
    """A bar of images, on a terminal and if tqdm is installed; else an object that does nothing."""
    try:
        from tqdm import tqdm
    except ImportError:
        return types.SimpleNamespace(update=lambda images: None)
    hidden = None if sibling("mhkd_runs").is_main() else True  # None: if there is no terminal
    options = {"unit": " images", "unit_scale": True, "disable": hidden}
    return tqdm(None, title, total, initial=done, **options)


def average_over_processes(values: Tensor) -> Tensor:
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world_size()
    return values


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """The mean over the processes, in one message.

    A process that has no gradient of a parameter, because it left out a layer at random, counts
    with 0. A parameter without a gradient in all processes keeps none.
    """
    if world_size() > 1:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        exist = gradients[0].new_tensor([p.grad is not None for p in parameters])
        mean = average_over_processes(torch.cat([*(g.flatten() for g in gradients), exist]))
        *parts, exist = mean.split([*(g.numel() for g in gradients), len(parameters)])
        for i, (p, gradient, part) in enumerate(zip(parameters, gradients, parts)):
            if p.grad is not None or exist[i] > 0:
                p.grad = gradient.copy_(part.view_as(gradient))


def gather_from_processes(rows: Tensor) -> Tensor:
    """Rows [B, ...] of all processes, the same number of each, in the order of the processes."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


@contextlib.contextmanager
def runtime(config: Config) -> Iterator[torch.device]:
    """The device, the process group under torchrun and PyTorch's switches.

    At the end the switches and the generators of the CPU and of this device are as before.
    """
    device = find_device(config)
    start = sibling("mhkd_runs").under_torchrun() and not dist.is_initialized()
    if start:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    numpy, state = sys.modules.get("numpy"), random.getstate()
    of_numpy = numpy and numpy.random.get_state()
    switches[0].allow_tf32 = config.precision in ("auto", "tf32")
    switches[1].allow_tf32 = config.precision == "tf32"
    try:
        B, count = config.batch_size, world_size()
        if B % count or B < 2 * count:
            raise UsageError(
                f"--batch-size {B} must be a multiple of {count}, at least {2 * count}: "
                f"there are {count} processes"
            )
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield device
        sibling("mhkd_runs").wait_for_all()  # a process that ends earlier would abort the others
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(of_numpy)
        for switch, allowed in zip(switches, before):
            switch.allow_tf32 = allowed
        if start:
            dist.destroy_process_group()


def find_device(config: Config) -> torch.device:
    """The device of a run, or under torchrun of this process; it must do what is asked for."""
    several = sibling("mhkd_runs").under_torchrun()
    device = pick_device(config.device, int(os.environ.get("LOCAL_RANK", 0)) if several else None)
    if config.precision == "tf32" and device.type != "cuda":
        raise UsageError(f"--precision tf32 is for CUDA, not for {device}: use auto or float32")
    if config.backend == "fused" and (missing := sibling("mhkd_fused").missing(device.type)):
        raise UsageError(f"--backend fused: {missing}: use auto")
    return device


def pick_device(name: str | None, local_rank: int | None = None) -> torch.device:
    """The device of that name. Default: CUDA, then MPS, then the CPU."""
    if name is None:
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    with explain(f"--device {name} cannot be used", "use cpu, cuda or mps, if available"):
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise ValueError("unknown kind of device")
        if device.type == "cuda" and local_rank is not None:
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    return device


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line, see mhkd_config.py; returns the exit status."""
    try:
        config = sibling("mhkd_config")
    except UsageError as error:
        sys.exit(f"mhkd.py: {error}")
    return config.main(arguments)


if __name__ == "__main__":
    sys.modules["mhkd"] = sys.modules["__main__"]  # the module that the others import
    sys.exit(main())
