#!/usr/bin/env python3
"""Multi-head knowledge distillation in one script: a large frozen teacher trains a small student.

    python mhkd.py --teacher resnet32x4 --student shufflenetv2          # the main job, CIFAR-100
    python mhkd.py --teacher wrn_40_2 --student wrn_16_2 --seed 1       # another pair, another seed
    python mhkd.py --teacher vgg13 --student vgg8 --method kd           # plain distillation
    python mhkd.py --student vgg8 --method ce                           # a network alone
    python mhkd.py --teacher vgg13 --student vgg8 --method crd+mhkd     # two methods joined
    python mhkd.py --teacher resnet20 --student resnet8 --dataset digits    # no download, minutes on a laptop
    python mhkd.py --report runs/                                       # the paper's tables, as far as they have run
    torchrun --nproc_per_node 2 mhkd.py --teacher resnet32x4 --student shufflenetv2     # batches shared by processes

The method (Wang, Lohit, Jones, Fu: "Multi-head knowledge distillation for model compression", 2020)
puts small auxiliary classifiers at the ends of the first three units of both networks and matches
each pair as the final outputs are matched in ordinary distillation: by the KL divergence between
softened probabilities, and the cross-entropy. The heads are dropped after the training.

This file works alone: copy it into another repository and `import mhkd`, which needs torch only.

Rooms: 1 networks, 2 heads, 3 losses (reading to there is reading the paper), 4 methods, 5 data,
6 configuration, 7 files, 8 training, 9 the tables and their report, 10 command line.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import dataclasses
import datetime
import difflib
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import platform
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__version__ = "0.1.0"


class UsageError(ValueError):
    """A mistake that the user can mend. The message is one sentence; the command line prints it without a traceback."""


# ----------------------------------------------------------------------------------------------------------------------
# 1. The networks of the benchmark. They know nothing of distillation: forward(x) gives logits.
#    Names of submodules and their order are those of the published checkpoints (HobbitLong/RepDistiller).
# ----------------------------------------------------------------------------------------------------------------------


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


class ResNetBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential()  # empty: the identity
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(conv1x1(in_channels, channels, stride), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class ResNet(nn.Module):
    """CIFAR ResNet (He et al. 2016), depth 6n + 2; widths: the stem's channels, then those of the three units."""

    def __init__(self, num_classes: int, depth: int, widths: Sequence[int] = (16, 16, 32, 64)):
        super().__init__()
        blocks = (depth - 2) // 6
        stem, *units = widths
        self.conv1 = conv3x3(3, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                ResNetBlock(before, width, stride), *(ResNetBlock(width, width, 1) for _ in range(blocks - 1))
            )
            for before, width, stride in zip(widths, units, (1, 2, 2))
        )
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
        self.convShortcut = conv1x1(in_channels, channels, stride) if in_channels != channels else None

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
        self.block1, self.block2, self.block3 = (
            nn.Sequential(
                OrderedDict(
                    layer=nn.Sequential(
                        WideResNetBlock(before, channels, stride),
                        *(WideResNetBlock(channels, channels, 1) for _ in range(blocks - 1)),
                    )
                )
            )
            for before, channels, stride in zip(widths, widths[1:], (1, 2, 2))
        )
        self.bn1 = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], num_classes)
        initialise(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))  # [B, C, S/4, S/4]
        return self.fc(F.relu(self.bn1(x)).mean(dim=(2, 3)))


class VGG(nn.Module):
    """VGG (Simonyan & Zisserman 2015) with batch norm; convs: how many convolutions each of the five blocks has."""

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
    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int):
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
    """MobileNetV2 (Sandler et al. 2018) at half width, with the benchmark's strides and its ReLU for ReLU6."""

    # expansion, channels at full width, blocks, stride of the first block
    GROUPS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, num_classes: int):
        super().__init__()
        channels = 16
        self.conv1 = nn.Sequential(*conv_bn_relu(conv3x3(3, channels, stride=2)))
        groups = []
        for expansion, full_width, blocks, first_stride in self.GROUPS:
            group = []
            for i in range(blocks):
                group.append(InvertedResidual(channels, full_width // 2, first_stride if i == 0 else 1, expansion))
                channels = full_width // 2
            groups.append(nn.Sequential(*group))
        self.blocks = nn.Sequential(*groups)
        self.conv2 = nn.Sequential(*conv_bn_relu(conv1x1(channels, 1280)))
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        initialise(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.blocks(self.conv1(x)))  # [B, 1280, S/16, S/16]
        return self.classifier(x.mean(dim=(2, 3)))


def channel_shuffle(left: Tensor, right: Tensor) -> Tensor:
    """Concatenate two maps [B, C, H, W] with their channels interleaved, which is a shuffle in two groups."""
    return torch.stack((left, right), dim=2).flatten(1, 2)


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
        return channel_shuffle(left, F.relu(self.bn3(self.conv3(right))))


class ShuffleDownBlock(nn.Module):
    """Halves the map; both branches see all channels."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = conv3x3(in_channels, in_channels, 2, groups=in_channels), nn.BatchNorm2d(in_channels)
        self.conv2, self.bn2 = conv1x1(in_channels, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv1x1(in_channels, half), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = conv3x3(half, half, 2, groups=half), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = conv1x1(half, half), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = F.relu(self.bn3(self.conv3(x)))
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return channel_shuffle(left, right)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 (Ma et al. 2018), size 1, with a 1x1 stem for small images."""

    def __init__(self, num_classes: int):
        super().__init__()
        widths = (24, 116, 232, 464)
        self.conv1, self.bn1 = conv1x1(3, 24), nn.BatchNorm2d(24)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(ShuffleDownBlock(before, width), *(ShuffleBlock(width) for _ in range(blocks)))
            for before, width, blocks in zip(widths, widths[1:], (3, 7, 3))
        )
        self.conv2, self.bn2 = conv1x1(464, 1024), nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))  # [B, 464, S/8, S/8]
        return self.linear(F.relu(self.bn2(self.conv2(x))).mean(dim=(2, 3)))


WIDE = (32, 64, 128, 256)
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    **{f"resnet{depth}": (ResNet, {"depth": depth}) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": (ResNet, {"depth": depth, "widths": WIDE}) for depth in (8, 32)},
    **{f"wrn_{depth}_{k}": (WideResNet, {"depth": depth, "width": k}) for depth in (16, 40) for k in (1, 2)},
    "vgg8": (VGG, {"convs": (1, 1, 1, 1, 1)}),
    "vgg11": (VGG, {"convs": (1, 1, 2, 2, 2)}),
    "vgg13": (VGG, {"convs": (2, 2, 2, 2, 2)}),
    "vgg16": (VGG, {"convs": (2, 2, 3, 3, 3)}),
    "vgg19": (VGG, {"convs": (2, 2, 4, 4, 4)}),
    "mobilenetv2": (MobileNetV2, {}),
    "shufflenetv2": (ShuffleNetV2, {}),
}
UNITS_OF = {
    ResNet: ("layer1", "layer2", "layer3"),
    WideResNet: ("block1", "block2", "block3"),
    VGG: ("block0", "block1", "block2"),
    MobileNetV2: ("blocks.1", "blocks.2", "blocks.4"),
    ShuffleNetV2: ("layer1", "layer2", "layer3"),
}
# The submodules at whose ends the auxiliary heads sit: the first three units (section 3.2).
UNITS: dict[str, tuple[str, str, str]] = {name: UNITS_OF[kind] for name, (kind, _) in MODELS.items()}


def build_model(name: str, num_classes: int) -> nn.Module:
    """One of the networks of MODELS, freshly initialised, for square images [B, 3, S, S], S >= 16.

    Raises:
        UsageError: there is no network of that name (the message gives the near ones).
    """
    kind, variant = MODELS[known("network", name, MODELS)]
    return kind(num_classes, **variant)


def known(what: str, name: str, names: Sequence[str] | dict) -> str:
    """The name, if it is one of the names; otherwise a UsageError that lists the near ones, or all."""
    if name in names:
        return name
    near = difflib.get_close_matches(str(name).lower().replace("-", "_"), names, n=4, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}."
    raise UsageError(f"there is no {what} '{name}': {hint}")


# ----------------------------------------------------------------------------------------------------------------------
# 2. Auxiliary heads (section 3.1), put on any network from outside
# ----------------------------------------------------------------------------------------------------------------------


class AuxHead(nn.Sequential):
    """Auxiliary classifier (section 3.1): two 3x3 convolutions with batch norm and ReLU, two fully connected layers.

    It maps a feature [B, C, H, W] to logits [B, K]. The paper gives the 256 kernels and is silent on the stride, the
    pooling and the width between the fully connected layers; the README lists these choices.

    Args:
        in_channels: C.
        num_classes: K.
        width: kernels of the convolutions, and units between the fully connected layers.
        stride: of both convolutions.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 256, stride: int = 2):
        super().__init__(
            *conv_bn_relu(conv3x3(in_channels, width, stride)),
            *conv_bn_relu(conv3x3(width, width, stride)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, num_classes),
        )
        initialise(self)


class _Tap:
    """A forward hook that keeps a copy of what its submodule returned, but only while it is `on`.

    A copy, because the next operation may work in place (a ReLU after the unit, say). Plain calls of the network and
    deepcopy are not disturbed by it.
    """

    def __init__(self) -> None:
        self.on = False
        self.feature: Tensor | None = None

    def keep(self, feature: Tensor) -> None:
        if self.on:
            self.feature = feature.clone() if isinstance(feature, Tensor) else feature

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.keep(output)

    def before(self, module: nn.Module, args: tuple) -> None:
        self.keep(args[0])

    def take(self) -> Tensor:
        self.on = False
        feature, self.feature = self.feature, None
        return feature


@dataclasses.dataclass
class Outputs:
    """What a network gives for a batch."""

    logits: Tensor  # [B, K]
    features: dict[str, Tensor]  # [B, C, H, W] each, by the names of the submodules that returned them
    penultimate: Tensor | None  # [B, C], the input of the last linear layer

    def float(self) -> Outputs:
        """The same in float32."""
        features = {name: feature.float() for name, feature in self.features.items()}
        return Outputs(self.logits.float(), features, None if self.penultimate is None else self.penultimate.float())


class Tapped(nn.Module):
    """A network whose features are taken from outside, by the names of submodules: forward(x) gives Outputs.

    The network itself, `model`, stays usable alone. It is run once on a small image of zeros to find out the shape of
    each feature: `shapes[name]` is (C, H, W), `width` the length of the penultimate feature. `remove()` takes the
    hooks off.

    Args: see MultiHead, which adds heads.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[str],
        num_classes: int,
        frozen: bool = False,
        *,
        penultimate: bool = False,
        example_input: Tensor | None = None,
        classifier: str | None = None,
    ):
        super().__init__()
        if isinstance(units, str):
            raise UsageError(f"units must be a list of names: ['{units}']")
        self.model = model
        self.units = tuple(units)
        self.frozen = frozen
        modules = dict(model.named_modules())
        for name in (*self.units, *([classifier] if classifier else [])):
            if name not in modules or not name:
                names = [n for n in modules if n and n.count(".") < 2]
                near = difflib.get_close_matches(name, modules, n=3)
                hint = f"did you mean {' or '.join(near)}? " if near else ""
                raise UsageError(
                    f"the network has no submodule '{name}': {hint}it has {', '.join(names[:40])}"
                    + (", ..." if len(names) > 40 else "")
                )
        self.memory_format = torch.contiguous_format  # of the images
        self.shapes, self.classifier = self._probe(modules, num_classes, example_input, classifier)
        self.width = getattr(modules.get(self.classifier), "in_features", None)
        self._taps = [_Tap() for _ in self.units]
        self._handles = [modules[n].register_forward_hook(tap.after) for n, tap in zip(self.units, self._taps)]
        self._penultimate, self._wants_penultimate = _Tap(), penultimate
        if self.classifier:
            self._handles.append(modules[self.classifier].register_forward_pre_hook(self._penultimate.before))
        if frozen:
            model.requires_grad_(False).eval()

    def _probe(
        self, modules: dict[str, nn.Module], num_classes: int, example: Tensor | None, classifier: str | None
    ) -> tuple[dict[str, tuple[int, int, int]], str | None]:
        """Run the network once; the shape (C, H, W) at each unit, and the name of the last linear layer (or None)."""
        shapes: dict[str, list] = {name: [] for name in self.units}
        linear: list[str] = []

        def note_unit(name: str) -> Callable:
            return lambda module, args, output: shapes[name].append(getattr(output, "shape", type(output).__name__))

        def note_linear(name: str) -> Callable:
            return lambda module, args: linear.append(name)

        handles = [modules[name].register_forward_hook(note_unit(name)) for name in shapes]
        handles += [m.register_forward_pre_hook(note_linear(n)) for n, m in modules.items() if isinstance(m, nn.Linear)]
        if example is None:
            first = next((m for m in modules.values() if isinstance(m, nn.Conv2d)), None)
            example = torch.zeros(1, first.in_channels if first else 3, 32, 32)
        parameter = next(self.model.parameters(), example)
        modes = {module: module.training for module in modules.values()}
        try:
            self.model.eval()
            with torch.no_grad():
                logits = self.model(example.to(parameter.device, parameter.dtype))
        except Exception as error:
            raise UsageError(
                f"the network could not be run on an input of shape {list(example.shape)} "
                f"({error}): pass an example_input that it accepts"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in modes.items():
                module.training = mode
        if not isinstance(logits, Tensor) or logits.shape != (len(example), num_classes):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UsageError(f"the network returns {got}, not logits [{len(example)}, {num_classes}]")
        for name, seen in shapes.items():
            if len(seen) != 1:
                raise UsageError(
                    f"the submodule '{name}' runs {len(seen)} times in a forward pass; name one that runs exactly once"
                )
            if not isinstance(seen[0], torch.Size) or len(seen[0]) != 4:
                got = list(seen[0]) if isinstance(seen[0], torch.Size) else seen[0]
                raise UsageError(f"the submodule '{name}' returns {got}, not a feature [B, C, H, W]")
            _, channels, height, width = seen[0]
            if channels == height != width and example.shape[-2] == example.shape[-1]:
                raise UsageError(f"the submodule '{name}' returns {list(seen[0])}, with the channels last")
        return {name: tuple(shape[0][1:]) for name, shape in shapes.items()}, classifier or (linear or [None])[-1]

    def remove(self) -> nn.Module:
        """Take the hooks off the network and return it, as plain as it came."""
        for handle in self._handles:
            handle.remove()
        return self.model

    def train(self, mode: bool = True) -> Tapped:
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def forward(self, x: Tensor) -> Outputs:
        x = x.contiguous(memory_format=self.memory_format)
        logits, features, penultimate = self._observe(x, self._wants_penultimate)
        return Outputs(logits, dict(zip(self.units, features)), penultimate)

    def _observe(self, x: Tensor, penultimate: bool) -> tuple[Tensor, list[Tensor], Tensor | None]:
        if penultimate and not self.classifier:
            raise UsageError("the network has no linear layer for the penultimate feature: name its classifier")
        if self.frozen and any(module.training for module in self.model.modules()):
            self.model.eval()  # somebody called train() on the network itself, or on a part of it
        for tap in self._taps:
            tap.on = True
        self._penultimate.on = penultimate
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                logits = self.model(x)
        finally:
            features = [tap.take() for tap in self._taps]
            feature = self._penultimate.take()
        if not isinstance(logits, Tensor):
            raise UsageError(f"the network returns {type(logits).__name__}, not logits [B, K]")
        for name, f in zip(self.units, features):
            if f is None:  # the probe saw it run, but in training it may be dropped at random
                raise UsageError(f"the submodule '{name}' did not run in this forward pass")
        return logits, features, feature


class MultiHead(Tapped):
    """A network with auxiliary heads at the ends of some of its submodules (section 3.1, figure 1).

        student = MultiHead(torchvision.models.resnet18(num_classes=10), ["layer1", "layer2", "layer3"], 10)
        logits, logits_1, logits_2, logits_3 = student(images)
        torch.save(student.model.state_dict(), "student.pt")  # the plain network, without the heads

    The network itself, `model`, stays usable alone, its state dict is the plain one; the heads are in `heads`. The
    network is run once on a small image of zeros to find out the channels at each unit. `remove()` takes the hooks off.

    Args:
        model: any module that maps images [B, C, H, W] to logits [B, K].
        units: names of submodules, as in `model.named_modules()`, that return a feature [B, C, H, W].
        num_classes: K.
        frozen: keep the network in eval mode and without gradients, whatever `train()` is called. The heads train.
        width, stride: of the heads, see AuxHead.
        example_input: what to run the network on once; by default zeros [1, C, 32, 32].
        classifier: name of the last linear layer, whose input is the penultimate feature; found out by default.

    Raises:
        UsageError: a unit does not exist, is not run exactly once, or does not return a feature [B, C, H, W]; or the
            network does not give K logits.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[str],
        num_classes: int,
        frozen: bool = False,
        *,
        width: int = 256,
        stride: int = 2,
        example_input: Tensor | None = None,
        classifier: str | None = None,
    ):
        super().__init__(model, units, num_classes, frozen, example_input=example_input, classifier=classifier)
        parameter = next(model.parameters(), torch.empty(0))
        self.heads = nn.ModuleList(AuxHead(self.shapes[name][0], num_classes, width, stride) for name in self.units)
        self.heads.to(parameter.device, parameter.dtype)

    def forward(self, x: Tensor, penultimate: bool = False) -> list[Tensor] | tuple[list[Tensor], Tensor]:
        """Logits [final, head 1, ..., head D], each [B, K]; with `penultimate` also the classifier's input [B, C]."""
        logits, features, feature = self._observe(x, penultimate)
        outputs = [logits, *(head(f) for head, f in zip(self.heads, features))]
        return (outputs, feature) if penultimate else outputs


# ----------------------------------------------------------------------------------------------------------------------
# 3. The loss: equations 1 and 2
# ----------------------------------------------------------------------------------------------------------------------

BACKENDS = ("auto", "reference", "fused")
MAX_FUSED_HEADS = 16  # kMaxHeads in csrc/mhkd_loss.h


_fused_is_there: bool | None = None  # not looked for yet
_fused_loss = None  # the operator: looking it up in torch.ops would take longer than a short batch


def _load_fused() -> bool:
    """Whether the compiled kernel is installed. The first call loads it, which registers torch.ops.mhkd."""
    global _fused_is_there, _fused_loss
    if _fused_is_there is None:
        _fused_is_there = hasattr(torch.ops.mhkd, "loss")  # another copy of this file may have loaded it
        spec = importlib.util.find_spec("mhkd_fused")  # finds the library; it is no Python module and never imported
        if not _fused_is_there and spec is not None and spec.origin is not None:
            try:
                torch.ops.load_library(spec.origin)
                _fused_is_there = True
            except OSError as error:  # built for another PyTorch
                warnings.warn(f"the fused kernel cannot be loaded, plain PyTorch is used: {error}", stacklevel=2)
        if _fused_is_there:
            _fused_loss = torch.ops.mhkd.loss.default
    return _fused_is_there


# torch.compile calls it and takes the answer for a constant. This is what torch.compiler.assume_constant_result sets,
# which would import the whole compiler here.
_load_fused._dynamo_marked_constant = True


def loss_backend() -> str:
    """The backend that mhkd_loss(backend="auto") takes, for example "fused (CPU avx2, CUDA sm_90)"."""
    if not _load_fused():
        return "reference (fused kernel not installed)"
    parts = [torch.ops.mhkd.cpu_capability()]
    if hasattr(torch.ops.mhkd, "cuda_architectures"):
        parts.append(torch.ops.mhkd.cuda_architectures())
    return f"fused ({', '.join(parts)})"


def _use_fused(backend: str, heads: int, labels: Tensor) -> bool:
    """Whether the kernel computes this call: where it can for "auto", or an error that says why not for "fused"."""
    if backend not in BACKENDS:
        raise ValueError(f"mhkd_loss: backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend == "reference" or (backend == "auto" and heads > MAX_FUSED_HEADS):
        return False
    device = labels.device.type
    if not _load_fused():
        missing = "the fused kernel is not installed"
    elif device == "cpu" or device == "meta":
        return True
    elif device != "cuda":
        missing = f"there is no fused kernel for {device} tensors"
    elif not hasattr(torch.ops.mhkd, "cuda_architectures"):
        missing = "the fused kernel was built without CUDA"
    else:
        # The CUDA kernel has been compiled and emulated but has never run on a GPU: only who insists tries it.
        return backend == "fused"
    if backend == "fused":
        raise RuntimeError(f'mhkd_loss: {missing}: use backend="auto" or backend="reference"')
    return False


def mhkd_loss(
    student_logits: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    labels: Tensor,
    *,
    tau: float = 4.0,
    alpha: float = 0.9,
    beta: float = 0.5,
    head_weights: Sequence[float] | None = None,
    teacher_ce: Sequence[bool] | None = None,
    ignore_index: int = -100,
    return_terms: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head knowledge distillation loss (Wang et al. 2020, section 3, equations 1 and 2).

    Over the heads h = 0 (the final outputs), 1, ..., D with weights w_h, plus the cross-entropy from which the
    teacher's own heads learn (section 3.1):

        sum_h w_h * (alpha * tau^2 * KL(p_T || p_S) + (1 - alpha) * CE(y, z_S))  +  sum_{h marked} CE(y, z_T)

    p_T and p_S are the softmax of the teacher's and the student's logits divided by tau. All terms are means over the
    rows whose label is not `ignore_index`; with no such row they are NaN, as PyTorch's own means are. A class of
    teacher probability 0 contributes 0 to the divergence, also where the student's probability is 0 (masked classes,
    whose logits are -inf).

    Args:
        student_logits: a tensor [B, K] for each head, the final output first.
        teacher_logits: as many tensors of the same shapes. The divergence sends them no gradient.
        labels: class indices [B], int64.
        tau: temperature, > 0.
        alpha: weight of the divergence against the student's cross-entropy, 0 to 1.
        beta: weight of every auxiliary head, used where `head_weights` is None.
        head_weights: a weight for each head; None means [1, beta, beta, ...].
        teacher_ce: for each head, whether the teacher's own cross-entropy is added, with weight 1; None marks the
            teacher logits that require a gradient.
        ignore_index: rows with this label count nowhere.
        return_terms: return the terms too.
        backend: "reference" is plain PyTorch; "auto" takes the fused kernel on the CPU where it is installed; "fused"
            insists, also on CUDA.

    Returns:
        The loss, a scalar: float64 if any logits are, otherwise float32 (the arithmetic, too, of half types). With
        `return_terms` also a detached tensor [H, 3]: KL * tau^2, the student's cross-entropy and the teacher's, which
        is 0 where it is not marked.

    Raises:
        ValueError: lists or shapes that do not agree; tau, alpha or a weight out of range; an unknown backend.
        TypeError: logits that are not floating point, labels that are not int64.
        IndexError: a label that is no class (on CUDA a device assertion).
        RuntimeError: tensors on different devices; backend "fused", and the kernel is not installed.
    """
    H = len(student_logits)
    head_weights = [1.0] + [beta] * (H - 1) if head_weights is None else list(head_weights)
    teacher_ce = [z.requires_grad for z in teacher_logits] if teacher_ce is None else list(teacher_ce)
    if _use_fused(backend, H, labels):
        settings = (tau, alpha, head_weights, teacher_ce, ignore_index)
        loss, terms, _ = _fused_loss(student_logits, teacher_logits, labels, *settings)  # makes the same checks
        return (loss, terms) if return_terms else loss
    _check_loss_arguments(student_logits, teacher_logits, labels, tau, alpha, head_weights, teacher_ce)

    dtypes = [z.dtype for z in (*student_logits, *teacher_logits)]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    counted = labels != ignore_index  # [B]
    loss = torch.zeros((), dtype=dtype, device=labels.device)
    terms = []
    for z_s, z_t, weight, marked in zip(student_logits, teacher_logits, head_weights, teacher_ce):
        # A NaN in a row that does not count must reach neither the loss nor the gradients.
        z_s = torch.where(counted[:, None], z_s.to(dtype), 0)  # [B, K]
        z_t = torch.where(counted[:, None], z_t.to(dtype), 0)  # [B, K]
        log_p_s = F.log_softmax(z_s / tau, dim=1)
        log_p_t = F.log_softmax(z_t.detach() / tau, dim=1)
        p_t = log_p_t.exp()
        kl = torch.where(p_t == 0, 0, p_t * (log_p_t - log_p_s)).sum()  # F.kl_div would give inf - inf = NaN
        kl = kl / counted.sum() * tau**2
        ce = F.cross_entropy(z_s, labels, ignore_index=ignore_index)
        ce_t = F.cross_entropy(z_t, labels, ignore_index=ignore_index) if marked else torch.zeros_like(kl)
        # Equation 1 for each head, equation 2 over them. A coefficient of 0 leaves its term out, were it infinite.
        for coefficient, term in ((weight * alpha, kl), (weight * (1 - alpha), ce), (float(marked), ce_t)):
            if coefficient != 0:
                loss = loss + coefficient * term
        terms.append(torch.stack((kl, ce, ce_t)).detach())
    return (loss, torch.stack(terms)) if return_terms else loss


def _check_loss_arguments(student_logits, teacher_logits, labels, tau, alpha, head_weights, teacher_ce) -> None:
    H = len(student_logits)
    if H == 0 or not H == len(teacher_logits) == len(head_weights) == len(teacher_ce):
        raise ValueError(
            f"mhkd_loss: the lists differ in length: {H} student logits, {len(teacher_logits)} teacher logits, "
            f"{len(head_weights)} head weights, {len(teacher_ce)} marks in teacher_ce"
        )
    for z in (*student_logits, *teacher_logits):
        if not z.is_floating_point():
            raise TypeError(f"mhkd_loss: logits must be floating point, not {z.dtype}")
        if z.dim() != 2 or z.shape[1] == 0 or z.shape != student_logits[0].shape:
            raise ValueError(
                "mhkd_loss: all logits must be [B, K] and of one shape: "
                f"{list(z.shape)}, {list(student_logits[0].shape)}"
            )
        if z.device != labels.device:
            raise RuntimeError(f"mhkd_loss: logits and labels must be on one device: {z.device}, {labels.device}")
    if labels.dtype != torch.int64:
        raise TypeError(f"mhkd_loss: labels must be class indices of dtype int64, not {labels.dtype}")
    if labels.shape != student_logits[0].shape[:1]:
        raise ValueError(
            f"mhkd_loss: labels must be [B]: {list(labels.shape)} for logits {list(student_logits[0].shape)}"
        )
    if not (math.isfinite(tau) and tau > 0):
        raise ValueError(f"mhkd_loss: tau must be a finite number above 0, not {tau}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"mhkd_loss: alpha must be between 0 and 1, not {alpha}")
    if not all(math.isfinite(w) and w >= 0 for w in head_weights):
        raise ValueError(f"mhkd_loss: the head weights must be finite and not negative, not {list(head_weights)}")


# ----------------------------------------------------------------------------------------------------------------------
# 4. Methods: what each needs, the modules it adds, its named loss terms. The training loop knows none of them.
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Step:
    """What a method sees of a training step."""

    student: Outputs
    teacher: Outputs | None
    labels: Tensor  # [B]
    indices: Tensor  # [B], places in the training set


class Method(nn.Module):
    """A way to train the student. Register a subclass in METHODS and `--method` knows it, alone and joined by `+`.

    The loss is a sum of named terms: those on the final outputs, which methods that are joined take from one of them,
    and the method's own. Few methods need more than `units` or `needs_penultimate`, and `own_terms`.

    Args:
        config: resolved.
        student, teacher: the networks (the teacher None without one), for the shapes of what they give.
        data: for the training labels and the number of classes.
    """

    options: tuple[str, ...] = ()  # the fields of Config that matter to its own terms
    final_options: tuple[str, ...] = ()  # and to its terms on the final outputs
    rank = 0  # of joined methods the one of the highest rank, the last of equals, gives the terms on the final outputs
    needs_teacher = True
    needs_penultimate = False  # the penultimate features of both networks

    def __init__(self, config: Config, student: Tapped, teacher: Tapped | None, data: Data):
        super().__init__()
        self.config = config

    @classmethod
    def units(cls, config: Config, role: str) -> tuple[str, ...]:
        """Names of the submodules of the "student" or the "teacher" whose features it needs."""
        return ()

    @classmethod
    def adapt(cls, config: Config, student: nn.Module, teacher: nn.Module | None, num_classes: int) -> None:
        """Change the plain student for its training; `plain` takes that back."""

    @classmethod
    def plain(cls, student: nn.Module) -> nn.Module:
        """The plain network that computes what the adapted student does."""
        return student

    def prepare(self, teacher: Tapped | None, epoch: Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]]) -> None:
        """Called once, before the first step; epoch() gives batches of images [B, 3, S, S], labels [B], indices [B]."""

    def final_terms(self, step: Step) -> dict[str, Tensor]:
        """Terms of the loss on the final outputs: the cross-entropy alone, unless a method has others."""
        return {"ce": F.cross_entropy(step.student.logits, step.labels)}

    def own_terms(self, step: Step) -> dict[str, Tensor]:
        """Terms of the loss that the method adds."""
        return {}

    def backward(self, terms: dict[str, Tensor], student: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Turn the terms into the gradients of the student's parameters and of all others that train.

        A method that does so in its own way averages them over the processes, too.
        """
        sum(terms.values()).backward()

    @classmethod
    def sets_gradients(cls) -> bool:
        """Whether it has a backward of its own."""
        return cls.backward is not Method.backward


def autocast(config: Config, device: torch.device) -> contextlib.AbstractContextManager:
    """PyTorch's autocast to bfloat16, where --precision asks for it: for networks and heads; losses are in float32."""
    return torch.autocast(device.type, torch.bfloat16) if config.precision == "bfloat16" else contextlib.nullcontext()


class CrossEntropy(Method):
    """The network alone: the baseline, and the way teachers are trained."""

    needs_teacher = False


class Distillation(Method):
    """Knowledge distillation (Hinton et al. 2015): equation 2 without auxiliary heads."""

    final_options = ("tau", "alpha")
    rank = 1

    def final_terms(self, step: Step) -> dict[str, Tensor]:
        c, z_s, z_t = self.config, step.student.logits, step.teacher.logits
        return {"kd": mhkd_loss([z_s], [z_t], step.labels, tau=c.tau, alpha=c.alpha, backend=c.backend)}


class MultiHeadDistillation(Method):
    """Equation 2 over the final outputs and the auxiliary heads, in one call."""

    final_options = ("tau", "alpha", "beta", "units", "teacher_units", "student_units", "head_width", "head_stride")
    rank = 2

    def __init__(self, config: Config, student: Tapped, teacher: Tapped, data: Data):
        super().__init__(config, student, teacher, data)
        self.student_heads, self.teacher_heads = (
            nn.ModuleList(
                AuxHead(network.shapes[name][0], len(data.classes), config.head_width, config.head_stride)
                for name in self.units(config, role)
            )
            for network, role in ((student, "student"), (teacher, "teacher"))
        )

    @classmethod
    def units(cls, config: Config, role: str) -> tuple[str, ...]:
        named = getattr(config, f"{role}_units")
        return named or tuple(UNITS[getattr(config, role)][unit - 1] for unit in config.units)

    def all_logits(self, outputs: Outputs, role: str) -> list[Tensor]:
        """[final, head 1, ..., head D], each [B, K]."""
        heads = {"student": self.student_heads, "teacher": self.teacher_heads}[role]
        features = (outputs.features[name] for name in self.units(self.config, role))
        with autocast(self.config, outputs.logits.device):
            return [outputs.logits, *(head(feature) for head, feature in zip(heads, features))]

    def final_terms(self, step: Step) -> dict[str, Tensor]:
        return {"mhkd": self.loss(*(self.all_logits(getattr(step, r), r) for r in ("student", "teacher")), step.labels)}

    def loss(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> Tensor:
        c, marked = self.config, [False] + [True] * len(self.teacher_heads)
        return mhkd_loss(
            student, teacher, labels, tau=c.tau, alpha=c.alpha, beta=c.beta, teacher_ce=marked, backend=c.backend
        )


# The methods that Table 1 compares with, as the CRD benchmark has them (HobbitLong/RepDistiller).


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float = 4.0, backend: str = "auto") -> Tensor:
    """tau^2 * KL(teacher || student) of logits [B, K], the mean over the batch (Hinton et al. 2015, section 2).

    No gradient goes to the teacher. For the arithmetic and the errors raised see mhkd_loss, whose first term it is.
    """
    labels = torch.zeros(len(student_logits), dtype=torch.int64, device=student_logits.device)  # they weigh nothing
    settings = {"tau": tau, "alpha": 1.0, "teacher_ce": [False], "backend": backend}
    return mhkd_loss([student_logits], [teacher_logits], labels, **settings)


class BenchmarkMethod(Method):
    """gamma * CE + kd_weight * tau^2 * KL on the final outputs; subclasses add a term of their own."""

    final_options = ("tau", "gamma", "kd_weight")

    def final_terms(self, step: Step) -> dict[str, Tensor]:
        c = self.config
        terms = {}
        if c.gamma:
            terms["ce"] = c.gamma * F.cross_entropy(step.student.logits, step.labels)
        if c.kd_weight:
            terms["kd"] = c.kd_weight * kd_loss(step.student.logits, step.teacher.logits, c.tau, c.backend)
        return terms


class FitNet(BenchmarkMethod):
    """Hints (Romero et al. 2015): mean squared error between one feature of each network.

    The student's goes through a convolution to the teacher's size, batch norm and ReLU. The feature is that of the
    second unit; of a vgg, as in the benchmark, that of the third.
    """

    options = ("fitnet_weight",)

    def __init__(self, config: Config, student: Tapped, teacher: Tapped, data: Data):
        super().__init__(config, student, teacher, data)
        shapes = [n.shapes[self.units(config, r)[0]] for n, r in ((student, "student"), (teacher, "teacher"))]
        (channels, *s), (target, *t) = shapes
        if [2 * size for size in t] == s:
            conv: nn.Module = nn.Conv2d(channels, target, 3, stride=2, padding=1)
        elif t == [2 * size for size in s]:
            conv = nn.ConvTranspose2d(channels, target, 4, stride=2, padding=1)
        elif s[0] >= t[0]:
            conv = nn.Conv2d(channels, target, [1 + a - b for a, b in zip(s, t)])
        else:  # the benchmark has no such pair
            conv = nn.ConvTranspose2d(channels, target, [1 + b - a for a, b in zip(s, t)])
        self.regressor = nn.Sequential(conv, nn.BatchNorm2d(target), nn.ReLU())

    @classmethod
    def units(cls, config: Config, role: str) -> tuple[str, ...]:
        name = getattr(config, role)
        return (UNITS[name][2 if MODELS[name][0] is VGG else 1],)

    def own_terms(self, step: Step) -> dict[str, Tensor]:
        (f_s,), (f_t,) = (
            [outputs.features[name] for name in self.units(self.config, role)]
            for outputs, role in ((step.student, "student"), (step.teacher, "teacher"))
        )
        return {"fitnet": self.config.fitnet_weight * F.mse_loss(self.regressor(f_s), f_t)}


def cc_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Correlation congruence of embeddings [B, D] (Peng et al. 2019), as the CRD benchmark computes it.

    With delta = student - teacher: the mean over neighbours i, i + 1 of sum_d |delta_i,d| |delta_i+1,d|. It sends
    gradients to both. With a single row it is NaN, the mean over no pair.
    """
    delta = (student - teacher).abs()  # [B, D]
    return (delta[:-1] * delta[1:]).sum(dim=1).mean()


class CorrelationCongruence(BenchmarkMethod):
    """Correlation congruence (Peng et al. 2019) of the penultimate features, each through a linear layer."""

    options = ("cc_weight", "embed_dim")
    needs_penultimate = True

    def __init__(self, config: Config, student: Tapped, teacher: Tapped, data: Data):
        super().__init__(config, student, teacher, data)
        self.embed_student = nn.Linear(student.width, config.embed_dim)
        self.embed_teacher = nn.Linear(teacher.width, config.embed_dim)

    def own_terms(self, step: Step) -> dict[str, Tensor]:
        embedded = self.embed_student(step.student.penultimate), self.embed_teacher(step.teacher.penultimate)
        return {"cc": self.config.cc_weight * cc_loss(*embedded)}


def rkd_loss(student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    """Relational knowledge distillation of embeddings [B, C], [B, C'] (Park et al. 2019), as in the CRD benchmark.

    distance_weight * smooth L1 of the pairwise distances, each divided by its own mean over those above 0, plus
    angle_weight * smooth L1 of the cosines of the angles of all triplets. No gradient goes to the teacher. Takes
    memory for B * B * (C + C') and B * B * B numbers.
    """

    def relations(x: Tensor) -> tuple[Tensor, Tensor]:
        difference = x[None, :, :] - x[:, None, :]  # [B, B, C], at [i, j] the way from i to j
        distance = difference.norm(dim=2)  # [B, B]; its gradient at 0 is 0
        apart = distance > 0
        mean = distance.sum() / apart.sum().clamp(min=1)
        # A distance of 0 has no direction: it gives a cosine of 0 and a finite gradient.
        direction = difference / torch.where(apart, distance, 1)[:, :, None]
        cosine = direction @ direction.transpose(1, 2)  # [B, B, B], at [i, j, k] of the angle at i
        return distance / torch.where(mean > 0, mean, 1), cosine

    (d_s, c_s), (d_t, c_t) = relations(student), relations(teacher.detach())
    return distance_weight * F.smooth_l1_loss(d_s, d_t) + angle_weight * F.smooth_l1_loss(c_s, c_t)


class RelationalDistillation(BenchmarkMethod):
    """Relational knowledge distillation (Park et al. 2019) of the penultimate features."""

    options = ("rkd_weight",)
    needs_penultimate = True

    def own_terms(self, step: Step) -> dict[str, Tensor]:
        return {"rkd": self.config.rkd_weight * rkd_loss(step.student.penultimate, step.teacher.penultimate)}


class CRDLoss(nn.Module):
    """Contrastive representation distillation (Tian, Krishnan, Isola 2020), as the authors' benchmark computes it.

    Both features go through a linear layer to `embed_dim` and are normalised. Two memory banks hold an embedding of
    each training sample, one for each network. The student's embedding is told from the teacher bank which row is its
    own sample's among rows of other classes, and the reverse. With anchor v, bank row u and N samples

        P(u) = exp(v.u / tau) / Z,    Z = N * the mean of exp(v.u / tau) over the first batch, then fixed
        loss = - 1/B sum_b [ log P+ / (P+ + m/N + eps)  +  sum over m negatives of log (m/N) / (P- + m/N + eps) ]

    for both directions together, eps = 1e-7. Afterwards (in training mode) the batch's rows become
    normalise(momentum * old + (1 - momentum) * new). The banks are buffers: they belong to the state dict. Under
    torch.distributed every process stores the rows of all.

    Scores are computed against the whole bank, one matrix product, and picked out afterwards: B * N numbers instead of
    the B * m * embed_dim of gathered rows, 40 times fewer at m = 16384 and N = 50000.

    Args:
        student_dim, teacher_dim: lengths of the two features.
        num_samples: N, of the training set.
        embed_dim, negatives, tau, momentum: as above; m = negatives.
        labels: class indices [N] of all training samples, to draw negatives of other classes than the anchor's,
            uniformly and without replacement where there are enough. Not needed where `contrast` is given.

    Raises:
        ValueError: no labels and no contrast; labels of one class only, or not [N].
    """

    EPSILON = 1e-7

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_samples: int,
        embed_dim: int = 128,
        negatives: int = 16384,
        tau: float = 0.07,
        momentum: float = 0.5,
        labels: Tensor | None = None,
    ):
        super().__init__()
        self.num_samples, self.negatives, self.tau, self.momentum = num_samples, negatives, tau, momentum
        self.embed_student = nn.Linear(student_dim, embed_dim)
        self.embed_teacher = nn.Linear(teacher_dim, embed_dim)
        bound = 1 / math.sqrt(embed_dim / 3)
        for name in ("student_bank", "teacher_bank"):
            self.register_buffer(name, torch.empty(num_samples, embed_dim).uniform_(-bound, bound))
        self.register_buffer("normaliser", torch.zeros(2))  # Z of each direction; 0 before the first batch
        self.register_buffer("labels", labels, persistent=False)
        if labels is not None:
            if labels.shape != (num_samples,):
                raise ValueError(f"CRDLoss: labels must be [{num_samples}], not {list(labels.shape)}")
            counts = torch.bincount(labels)
            if counts.max() == num_samples:
                raise ValueError("CRDLoss: all labels are of one class, so there are no negatives")
            self.register_buffer("others", (num_samples - counts)[labels], persistent=False)  # [N]
            self.enough = num_samples - counts.max().item() >= negatives

    @torch.no_grad()
    def draw(self, indices: Tensor) -> Tensor:
        """Indices to contrast with [B, 1 + m], the sample's own first, then negatives of other classes."""
        if self.labels is None:
            raise ValueError("CRDLoss: give it labels, or forward the indices to contrast with")
        N, m, B = self.num_samples, self.negatives, len(indices)
        keys = torch.rand(B, N, device=indices.device)
        keys.masked_fill_(self.labels == self.labels[indices, None], -1)  # [B, N], below all of other classes
        # The places of the m largest of independent random keys are a uniform choice without replacement.
        negatives = keys.topk(min(m, N), dim=1, sorted=not self.enough).indices
        if not self.enough:  # all of the other classes, and to fill up some of them again
            others = self.others[indices, None]  # [B, 1]
            again = (torch.rand(B, m, device=indices.device) * others).long().clamp(max=others - 1)
            place = torch.arange(m, device=indices.device).expand(B, m)
            negatives = negatives.gather(1, torch.where(place < others, place, again))
        return torch.cat((indices[:, None], negatives), dim=1)

    def forward(self, student: Tensor, teacher: Tensor, indices: Tensor, contrast: Tensor | None = None) -> Tensor:
        """Penultimate features [B, C], [B, C'], places in the training set [B]; returns the loss, a scalar.

        contrast: the bank rows to contrast with [B, 1 + m], the positive first; drawn where it is None.
        """
        contrast = self.draw(indices) if contrast is None else contrast
        v_s = F.normalize(self.embed_student(student), dim=1)  # [B, embed_dim]
        v_t = F.normalize(self.embed_teacher(teacher), dim=1)
        # A bank may not change before the backward has read it: the update makes a new one.
        scores = [v_s @ self.teacher_bank.T, v_t @ self.student_bank.T]  # [B, N] each
        loss = sum(self._nce(score, contrast, direction) for direction, score in enumerate(scores))
        if self.training:
            self._remember(v_s.detach(), v_t.detach(), indices)
        return loss

    def _nce(self, scores: Tensor, contrast: Tensor, direction: int) -> Tensor:
        m, N = contrast.shape[1] - 1, self.num_samples
        likeness = (scores.gather(1, contrast) / self.tau).exp()  # [B, 1 + m]
        first = average_over_processes(N * likeness.detach().mean())
        Z = torch.where(self.normaliser[direction] > 0, self.normaliser[direction], first)
        if self.training:
            self.normaliser = torch.stack((Z, self.normaliser[1]) if direction == 0 else (self.normaliser[0], Z))
        p = likeness / Z
        q = m / N + self.EPSILON
        positive, negative = p[:, :1], p[:, 1:]
        per_row = (positive / (positive + q)).log().sum(dim=1) + ((m / N) / (negative + q)).log().sum(dim=1)
        return -per_row.mean()

    @torch.no_grad()
    def _remember(self, v_s: Tensor, v_t: Tensor, indices: Tensor) -> None:
        indices = gather_from_processes(indices)
        for name, new in (("student_bank", v_s), ("teacher_bank", v_t)):
            bank = getattr(self, name)
            new = self.momentum * bank[indices] + (1 - self.momentum) * gather_from_processes(new)
            setattr(self, name, bank.index_copy(0, indices, F.normalize(new, dim=1)))


class ContrastiveDistillation(BenchmarkMethod):
    """Contrastive representation distillation (Tian et al. 2020) of the penultimate features."""

    options = ("crd_weight", "crd_tau", "negatives", "embed_dim")
    needs_penultimate = True

    def __init__(self, config: Config, student: Tapped, teacher: Tapped, data: Data):
        super().__init__(config, student, teacher, data)
        N = len(data.train_labels)
        if len(data.train_labels.unique()) < 2:
            raise UsageError("--method crd needs training images of two classes at least, to draw negatives from")
        c, labels = config, data.train_labels
        self.crd = CRDLoss(student.width, teacher.width, N, c.embed_dim, c.negatives, c.crd_tau, labels=labels)

    def own_terms(self, step: Step) -> dict[str, Tensor]:
        crd = self.crd(step.student.penultimate, step.teacher.penultimate, step.indices)
        return {"crd": self.config.crd_weight * crd}


# Two neighbours.


def lsh_loss(student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor, counted: Tensor | None = None) -> Tensor:
    """Locality-sensitive hashing loss of features [B, C] (Wang, Ge, Wu 2021, "Distilling knowledge by mimicking
    features").

    Binary cross-entropy between sigmoid(W f_s + b) and the teacher's hash bits 1[W f_t + b > 0], for weight W [H, C]
    and bias b [H]: the mean over the bits and the rows that are `counted` (bool [B], None: all), 0 where none is. No
    gradient goes to the teacher.
    """
    bits = (F.linear(teacher.detach(), weight, bias) > 0).to(student.dtype)  # [B, H]
    rows = F.binary_cross_entropy_with_logits(F.linear(student, weight, bias), bits, reduction="none").mean(dim=1)
    return _mean_of_counted(rows, counted)


def _mean_of_counted(rows: Tensor, counted: Tensor | None) -> Tensor:
    """The mean of values [B] where `counted`, without asking the device how many that are."""
    return rows.mean() if counted is None else torch.where(counted, rows, 0).sum() / counted.sum().clamp(min=1)


class FeatureMimicking(Method):
    """Feature mimicking with LSH (Wang, Ge, Wu 2021): the penultimate features' direction and length, no KL.

    A student whose penultimate feature has another width gets a linear layer to the teacher's width before its
    classifier while it trains; nothing is between the two, so they fold into the plain network's classifier.
    """

    options = ("lsh_weight", "lsh_samples", "lsh_bits")
    needs_penultimate = True
    HASH_VALUES = 2**24  # at once: 64 MiB, where all of them, [N, 32 C], would take 13 GB for a feature of 2048

    def __init__(self, config: Config, student: Tapped, teacher: Tapped, data: Data):
        super().__init__(config, student, teacher, data)
        std = teacher.model.get_submodule(teacher.classifier).weight.std().item()
        C = teacher.width
        self.register_buffer("weight", torch.empty(config.lsh_bits * C, C).normal_(0, std))
        self.register_buffer("bias", torch.zeros(len(self.weight)))

    @classmethod
    def adapt(cls, config: Config, student: nn.Module, teacher: nn.Module, num_classes: int) -> None:
        example = example_input(config)
        probes = [Tapped(network, (), num_classes, example_input=example) for network in (student, teacher)]
        width, target = (probe.width for probe in probes)
        if width != target:
            student.set_submodule(probes[0].classifier, WidenedClassifier(width, target, num_classes))
        for probe in probes:
            probe.remove()

    @classmethod
    def plain(cls, student: nn.Module) -> nn.Module:
        student = copy.deepcopy(student)
        for name, module in list(student.named_modules()):
            if isinstance(module, WidenedClassifier):
                student.set_submodule(name, module.folded())
        return student

    @torch.no_grad()
    def prepare(self, teacher: Tapped, epoch: Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]]) -> None:
        """b = - the (lower) median of W f_t over the training set: each bit is set for half of it."""
        features = torch.cat([teacher(images).penultimate for images, _, _ in epoch()])  # [N, C]
        chunk = max(1, self.HASH_VALUES // len(features))  # bits at a time
        medians = [(part @ features.T).median(dim=1).values for part in self.weight.split(chunk)]
        self.bias.copy_(-torch.cat(medians))

    def own_terms(self, step: Step) -> dict[str, Tensor]:
        f_s, f_t = step.student.penultimate, step.teacher.penultimate
        # The authors' default: only of samples that the teacher gets right.
        counted = step.teacher.logits.argmax(dim=1) == step.labels if self.config.lsh_samples == "correct" else None
        mimic = _mean_of_counted((f_s - f_t).square().mean(dim=1), counted)
        return {"lsh": self.config.lsh_weight * (mimic + lsh_loss(f_s, f_t, self.weight, self.bias, counted))}


class WidenedClassifier(nn.Sequential):
    """Two linear layers in a row, C -> width -> K, in the place of a network's classifier."""

    def __init__(self, in_features: int, width: int, num_classes: int):
        super().__init__(nn.Linear(in_features, width), nn.Linear(width, num_classes))

    def folded(self) -> nn.Linear:
        """The one linear layer that computes the same: W2 (W1 x + b1) + b2, multiplied out in float64."""
        widen, classify = self
        folded = nn.Linear(widen.in_features, classify.out_features).to(widen.weight)
        W1, b1, W2, b2 = (p.detach().double() for p in (*widen.parameters(), *classify.parameters()))
        with torch.no_grad():
            folded.weight.copy_(W2 @ W1)
            folded.bias.copy_(W2 @ b1 + b2)
        return folded


def binary_kl_norm_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float = 2.0) -> Tensor:
    """BinaryKL-Norm of logits [B, K] (Yang et al. 2024, "Dual-head knowledge distillation").

    tau^2 / B * the sum over rows and classes of KL(Bernoulli(1/2) || Bernoulli(sigmoid((z_s - z_t) / tau))). No
    gradient goes to the teacher. By log-sigmoid, which stays finite where the sigmoid rounds to 0 or 1.
    """
    x = (student_logits - teacher_logits.detach()) / tau  # [B, K]
    kl = -(F.logsigmoid(x) + F.logsigmoid(-x)) / 2 - math.log(2)
    return tau**2 * kl.sum(dim=1).mean()


class DualHead(Method):
    """Dual-head knowledge distillation (Yang et al. 2024): the teacher's logits train a second classifier only.

    The student's own classifier sees the cross-entropy alone. Where the two gradients disagree the second one is
    aligned: the part that points against the first is taken off.
    """

    options = ("dhkd_weight", "dhkd_tau", "dhkd_head", "dhkd_align")
    needs_penultimate = True

    def __init__(self, config: Config, student: Tapped, teacher: Tapped, data: Data):
        super().__init__(config, student, teacher, data)
        K = len(data.classes)
        self.head: nn.Module = nn.Linear(student.width, K)
        if config.dhkd_head == "nonlinear":
            layers = nn.Linear(student.width, 200), nn.Dropout(0.1), nn.BatchNorm1d(200), nn.ReLU(), nn.Linear(200, K)
            self.head = nn.Sequential(*layers)

    def own_terms(self, step: Step) -> dict[str, Tensor]:
        kl = binary_kl_norm_loss(self.head(step.student.penultimate), step.teacher.logits, self.config.dhkd_tau)
        return {"dhkd": self.config.dhkd_weight * kl}

    def backward(self, terms: dict[str, Tensor], student: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        parameters = [*student, *others]
        if self.config.dhkd_align:
            g2 = self._gradient(terms["dhkd"], parameters, retain_graph=True)
            g1 = self._gradient(sum(term for name, term in terms.items() if name != "dhkd"), parameters)
            n = sum(p.numel() for p in student)  # the two are compared on the student alone
            dot, square = g1[:n] @ g2[:n], g1[:n] @ g1[:n]
            against = torch.where(square > 0, dot.clamp(max=0) / square, 0)
            g1[:n] *= 1 - against  # g1 + (g2 - against * g1)
            gradient = g1 + g2
        else:
            gradient = self._gradient(sum(terms.values()), parameters)
        for p, part in zip(parameters, gradient.split([p.numel() for p in parameters])):
            p.grad = part.view_as(p)

    @staticmethod
    def _gradient(term: Tensor, parameters: Sequence[Tensor], **options: bool) -> Tensor:
        """The gradient over all parameters as one vector, the mean over the processes."""
        gradients = torch.autograd.grad(term, parameters, allow_unused=True, materialize_grads=True, **options)
        return average_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))


METHODS: dict[str, type[Method]] = {
    "ce": CrossEntropy,
    "fitnet": FitNet,
    "cc": CorrelationCongruence,
    "rkd": RelationalDistillation,
    "crd": ContrastiveDistillation,
    "lsh": FeatureMimicking,
    "dhkd": DualHead,
    "kd": Distillation,
    "mhkd": MultiHeadDistillation,
}


def methods_of(config: Config) -> dict[str, type[Method]]:
    """The methods that `config.method` joins by `+`, in ascending rank, those of one rank in the order of METHODS.

    Raises:
        UsageError: one does not exist or is there twice; one adds nothing; two have a gradient of their own.
    """
    names = config.method.split("+")
    for name in names:
        known("method", name, METHODS)
    methods = {name: METHODS[name] for name in sorted(METHODS, key=lambda name: METHODS[name].rank) if name in names}
    if len(methods) < len(names):
        raise UsageError(f"--method {config.method} names a method twice")
    *first, last = methods
    for name in first:
        if METHODS[name].own_terms is Method.own_terms:
            raise UsageError(f"--method {config.method}: {name} adds nothing to {last}, so leave it out")
    special = [name for name, method in methods.items() if method.sets_gradients()]
    if len(special) > 1:
        raise UsageError(f"--method {config.method}: only one of {' and '.join(special)} can set the gradients")
    return methods


class Objective(nn.Module):
    """The methods of a run together, as in `--method crd+mhkd`.

    The terms on the final outputs are those of the last method that methods_of gives; every method adds its own.
    """

    def __init__(self, config: Config, student: Tapped, teacher: Tapped | None, data: Data):
        super().__init__()
        self.methods = nn.ModuleList(m(config, student, teacher, data) for m in methods_of(config).values())

    def forward(self, step: Step) -> dict[str, Tensor]:
        terms = self.methods[-1].final_terms(step)
        for method in self.methods:
            terms |= method.own_terms(step)
        return terms

    def backward(self, terms: dict[str, Tensor], student: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        max(self.methods, key=lambda method: method.sets_gradients()).backward(terms, student, others)

    def sets_gradients(self) -> bool:
        return any(method.sets_gradients() for method in self.methods)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Data: whole data sets as one uint8 tensor on the device; augmentation in batched tensor operations
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Data:
    """A data set. Images are uint8 [N, S, S, 3], labels int64 [N]; mean and std of each channel on the 0-1 scale."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str  # of all images and labels

    def to(self, device: torch.device) -> Data:
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **tensors)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] to float32 [B, 3, S, S]."""
        mean, std = self._statistics
        return ((images - mean) / std).permute(0, 3, 1, 2).contiguous()

    @functools.cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and std on the 0-255 scale, sent to the device once: with each batch the host would have to wait."""
        device = self.train_images.device
        return torch.tensor(self.mean, device=device) * 255, torch.tensor(self.std, device=device) * 255


def augment(images: Tensor, corners: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """Random crop and horizontal flip of uint8 images [B, S, S, 3], for given draws.

    Args:
        images: the batch, which is padded with `padding` black pixels on each side.
        corners: row and column [B, 2] where each crop of S x S begins in the padded image, 0 to 2 * padding.
        mirrored: bool [B], which images are flipped.
    """
    B, S = images.shape[:2]
    span = torch.arange(S, device=images.device)
    rows = corners[:, 0, None] + span  # [B, S]
    columns = corners[:, 1, None] + torch.where(mirrored[:, None], span.flip(0), span)  # [B, S]
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))  # [B, S + 2p, S + 2p, 3]
    return padded[torch.arange(B, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def draw_epoch(config: Config, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """All that is random in an epoch: the order [N], and for each step of it crop corners [N, 2] and flips [N].

    Drawn on the CPU before the epoch begins, so that a seed means the same on every device.
    """
    order = torch.randperm(size, generator=generator)
    corners = torch.randint(2 * config.crop_padding + 1, (size, 2), generator=generator)
    mirrored = torch.rand(size, generator=generator) < 0.5
    return order, corners, mirrored & config.flip


def epoch_batches(
    data: Data, config: Config, generator: torch.Generator, processes: int = 1, process: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """An epoch of normalised images [B, 3, S, S], labels [B] and indices [B] of the training set.

    Of several processes each gets an equal share of every batch.
    """
    device = data.train_images.device
    order, corners, mirrored = (t.to(device) for t in draw_epoch(config, len(data.train_labels), generator))
    batches = [slice(i, i + config.batch_size) for i in range(0, len(order), config.batch_size)]
    if len(order) - batches[-1].start < 2 * processes:
        batches.pop()  # batch norm cannot train on one image alone
    for batch in batches:
        stop = min(batch.stop, len(order))
        stop -= (stop - batch.start) % processes
        mine = slice(batch.start + process, stop, processes)
        images = augment(data.train_images[order[mine]], corners[mine], mirrored[mine], config.crop_padding)
        yield data.normalise(images), data.train_labels[order[mine]], order[mine]


# What each data set brings: the sources return train images, train labels, test images, test labels, class names.
Source = tuple[Tensor, Tensor, Tensor, Tensor, list[str]]

STATISTICS = {  # mean and standard deviation of the channels, as the benchmark has them; measured for the others
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


def need(module: str, package: str, purpose: str) -> Any:
    """Import an optional dependency, or say in one sentence how to get it."""
    try:
        return __import__(module, fromlist=["*"])
    except Exception as error:  # also what a torchvision built for another PyTorch raises
        raise UsageError(f"{purpose} needs {package} ({error}): pip install {package}") from error


def _from_torchvision(config: Config) -> Source:
    name, files = {
        "cifar10": ("CIFAR10", "cifar-10-python.tar.gz, or the folder cifar-10-batches-py from it,"),
        "cifar100": ("CIFAR100", "cifar-100-python.tar.gz, or the folder cifar-100-python from it,"),
        "svhn": ("SVHN", "train_32x32.mat and test_32x32.mat"),
    }[config.dataset]
    dataset = getattr(need("torchvision.datasets", "torchvision", f"--dataset {config.dataset}"), name)
    if config.dataset == "svhn":
        need("scipy.io", "scipy", "--dataset svhn")
    root = Path(config.data)

    def parts(download: bool) -> list:
        if config.dataset == "svhn":
            return [dataset(root, split=split, download=download) for split in ("train", "test")]
        return [dataset(root, train=train, download=download) for train in (True, False)]

    try:
        train, test = parts(download=False)
    except Exception:
        try:
            with locked(root / ".download.lock", "another run is downloading the data"):
                train, test = parts(download=True)
        except Exception as error:
            raise UsageError(
                f"{name} is not in '{root}' and could not be downloaded ({error}): put {files} there, "
                "or try --dataset digits, which needs no data"
            ) from error
    if config.dataset == "svhn":  # [N, 3, 32, 32]
        images = [torch.from_numpy(part.data).permute(0, 2, 3, 1).contiguous() for part in (train, test)]
        labels = [torch.as_tensor(part.labels, dtype=torch.int64) for part in (train, test)]
        classes = [str(digit) for digit in range(10)]
    else:  # [N, 32, 32, 3]
        images = [torch.from_numpy(part.data).contiguous() for part in (train, test)]
        labels = [torch.as_tensor(part.targets) for part in (train, test)]
        classes = list(train.classes)
    return images[0], labels[0], images[1], labels[1], classes


def _from_digits(config: Config) -> Source:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: 1,437 to train on, 360 to test."""
    digits = need("sklearn.datasets", "scikit-learn", "--dataset digits").load_digits()
    grey = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    images = grey[..., None].repeat(1, 1, 1, 3)  # [1797, 8, 8, 3]
    labels = torch.from_numpy(digits.target).to(torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[360:], order[:360]
    return images[train], labels[train], images[test], labels[test], [str(digit) for digit in range(10)]


IMAGE_FILES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}


def _from_folder(config: Config) -> Source:
    """The user's images: train/<class>/... and test/<class>/... (or val/), decoded once and cached below --out."""
    root, size = Path(config.data), config.image_size
    if not root.is_dir():
        raise UsageError(f"there is no data folder '{root}': --data names the folder that holds train/ and test/")
    parts = [root / "train", next((root / n for n in ("test", "val") if (root / n).is_dir()), root / "test")]
    for part in parts:
        if not part.is_dir():
            raise UsageError(f"there is no folder '{part}': a data folder holds train/ and test/ (or val/)")
    names = [sorted(d.name for d in part.iterdir() if d.is_dir() and d.name[0] != ".") for part in parts]
    for part, found in zip(parts, names):
        if not found:
            raise UsageError(f"'{part}' has no classes: it must hold one folder of images for each class")
    if names[0] != names[1]:
        only = [", ".join(sorted(set(a) - set(b))[:5]) or "none" for a, b in (names, names[::-1])]
        raise UsageError(
            f"'{parts[0]}' and '{parts[1]}' differ in their classes: only in the first {only[0]}; "
            f"only in the second {only[1]}"
        )
    files: list[list[tuple[Path, int]]] = []
    for part in parts:
        files.append([])
        for label, name in enumerate(names[0]):
            found = sorted(f for f in (part / name).rglob("*") if f.suffix.lower() in IMAGE_FILES)
            if not found:
                raise UsageError(f"the class folder '{part / name}' holds no images")
            files[-1] += [(file, label) for file in found]

    # The cache is good for these very files: their names, sizes and times, not where the folder lies.
    key = hashlib.sha256(repr((names[0], size)).encode())
    for part, listed in zip(parts, files):
        for file, _ in listed:
            stat = file.stat()
            key.update(repr((file.relative_to(part).as_posix(), stat.st_size, stat.st_mtime_ns)).encode())
    cache = Path(config.out) / "cache" / f"folder-{key.hexdigest()[:16]}.pt"
    with locked(cache.parent / ".lock", "another run is decoding images"):
        if cache.is_file():
            with contextlib.suppress(Exception):  # a cache that cannot be read is made again
                content = torch.load(cache, weights_only=True)
                return (*content["images_and_labels"], names[0])
        result = []
        for part, listed in zip(parts, files):
            images = torch.empty(len(listed), size, size, 3, dtype=torch.uint8)
            _decode([file for file, _ in listed], images, f"decoding {part.name}")
            result += [images, torch.tensor([label for _, label in listed])]
        write_atomically(cache, lambda f: torch.save({"images_and_labels": result}, f))
    return (*result, names[0])


def _decode(files: list[Path], images: Tensor, title: str) -> None:
    """Decode image files into uint8 [N, S, S, 3]: the shorter side resized to S, the middle square cut out.

    Transparent pixels become black, 16-bit grey levels 8-bit.
    """
    from concurrent.futures import ThreadPoolExecutor

    numpy = need("numpy", "numpy", "--dataset folder")
    pil = need("PIL.Image", "pillow", "--dataset folder")
    ops = need("PIL.ImageOps", "pillow", "--dataset folder")
    S = images.shape[1]

    def rgb(image: Any) -> Any:
        if image.mode.startswith("I;16"):  # convert() would clip 16 bits to white
            return pil.fromarray((numpy.asarray(image) >> 8).astype("uint8")).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError(f"pixels of mode {image.mode} have no known range")
        if "A" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            image = pil.alpha_composite(pil.new("RGBA", image.size, "black"), image)
        return image.convert("RGB")

    def decode(i: int) -> None:
        try:
            with pil.open(files[i]) as image:
                image = rgb(ops.exif_transpose(image))
                if image.size != (S, S):
                    image = ops.fit(image, (S, S), method=pil.Resampling.BILINEAR)
                images[i] = torch.from_numpy(numpy.array(image))
        except Exception as error:
            raise UsageError(f"the image '{files[i]}' cannot be read ({error}): mend or remove it") from error

    with ThreadPoolExecutor() as pool, Progress(len(files), title) as progress:
        for _ in pool.map(decode, range(len(files))):
            progress.step(1)


SOURCES: dict[str, Callable[[Config], Source]] = {
    "cifar100": _from_torchvision,
    "cifar10": _from_torchvision,
    "svhn": _from_torchvision,
    "folder": _from_folder,
    "digits": _from_digits,
}


def load_data(config: Config) -> Data:
    """The data set that a resolved configuration names, resized, its subset taken, with its normalisation.

    Raises:
        UsageError: it is not there and cannot be downloaded, or a folder of images is not as it should be.
    """
    train_images, train_labels, test_images, test_labels, classes = SOURCES[config.dataset](config)

    def resize(images: Tensor) -> Tensor:
        size = (config.image_size, config.image_size)
        if images.shape[1:3] == size:
            return images
        resized = torch.empty(len(images), *size, 3, dtype=torch.uint8)
        for old, new in zip(images.split(1000), resized.split(1000)):
            part = F.interpolate(old.permute(0, 3, 1, 2).float(), size, mode="bilinear", antialias=True)
            new.copy_(part.round().clamp(0, 255).permute(0, 2, 3, 1))
        return resized

    train_images, test_images = resize(train_images), resize(test_images)
    if config.dataset in STATISTICS:
        mean, std = STATISTICS[config.dataset]
    else:
        mean, std = measure(train_images)
    if config.subset:
        fixed = torch.Generator().manual_seed(0)  # the same images for every run
        train, test = (torch.randperm(len(y), generator=fixed)[: config.subset] for y in (train_labels, test_labels))
        train_images, train_labels = train_images[train], train_labels[train]
        test_images, test_labels = test_images[test], test_labels[test]
    digest = hashlib.sha256()
    for tensor in (train_images, train_labels, test_images, test_labels):
        digest.update(str(tensor.shape).encode())
        digest.update(tensor.numpy())
    return Data(train_images, train_labels, test_images, test_labels, classes, mean, std, digest.hexdigest())


def measure(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images [N, S, S, 3], on the 0-1 scale, exactly."""
    value = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(3):
        count = torch.bincount(images[..., channel].flatten(), minlength=256).double()
        mean = (count * value).sum() / count.sum()
        variance = (count * (value - mean) ** 2).sum() / count.sum()
        means.append(round(mean.item(), 6))
        stds.append(round(max(variance.sqrt().item(), 1 / 255), 6))  # a channel of one value is not divided by 0
    return tuple(means), tuple(stds)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Configuration: one dataclass is the command line, what is recorded, and the argument of train()
# ----------------------------------------------------------------------------------------------------------------------


def option(default: Any, help: str, parse: Callable = str, recorded: bool = True) -> Any:
    """A field of Config. What is not `recorded` is no configuration: a run may go on where it differs."""
    return dataclasses.field(default=default, metadata={"help": help, "parse": parse, "recorded": recorded})


def words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in words(text))


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run does. None means: the paper's value for the data set and network (see RECIPES)."""

    teacher: str | None = option(None, "network that teaches")
    student: str | None = option(None, "network that learns")
    method: str = option("mhkd", "ce, kd, mhkd, fitnet, cc, rkd, crd, lsh, dhkd, or some joined by +: crd+mhkd")
    dataset: str = option("cifar100", "cifar100, cifar10, svhn, folder (your images) or digits (no download)")
    data: str = option("data", "folder of the data; downloads go there", recorded=False)
    units: tuple[int, ...] = option((1, 2, 3), "units with an auxiliary head, entries of UNITS: 1,2,3", integers)
    teacher_units: tuple[str, ...] | None = option(None, "or the teacher's submodules by name: layer1,layer2", words)
    student_units: tuple[str, ...] | None = option(None, "or the student's submodules by name", words)
    epochs: int | None = option(None, "epochs: 240; svhn 150; digits 30", int)
    batch_size: int | None = option(None, "images a step: 64; svhn 200", int)
    lr: float | None = option(None, "learning rate: 0.05, mobilenetv2 and shufflenetv2 0.01; svhn 0.001", float)
    lr_steps: tuple[int, ...] | None = option(
        None, "epochs after which it falls: 150,180,210; svhn 80,110,135; scaled with --epochs", integers
    )
    lr_decay: float = option(0.1, "factor by which it falls", float)
    momentum: float = option(0.9, "of SGD", float)
    weight_decay: float = option(5e-4, "of SGD", float)
    tau: float = option(4.0, "temperature", float)
    alpha: float = option(0.9, "weight of the divergence against the cross-entropy (equation 1)", float)
    beta: float | None = option(None, "weight of the auxiliary heads (equation 2): 0.5; svhn 5", float)
    head_width: int = option(256, "kernels in the auxiliary heads' convolutions", int)
    head_stride: int = option(2, "stride of the auxiliary heads' convolutions", int)
    gamma: float = option(1.0, "fitnet, cc, rkd, crd: weight of the cross-entropy beside their own term", float)
    kd_weight: float = option(1.0, "fitnet, cc, rkd, crd: weight of the divergence beside their own term", float)
    fitnet_weight: float = option(100.0, "fitnet: weight of its term", float)
    cc_weight: float = option(0.02, "cc: weight of its term", float)
    rkd_weight: float = option(1.0, "rkd: weight of its term", float)
    crd_weight: float = option(0.8, "crd: weight of its term", float)
    crd_tau: float = option(0.07, "crd: temperature", float)
    negatives: int = option(16384, "crd: negatives for each image", int)
    embed_dim: int = option(128, "crd, cc: length of the embeddings", int)
    lsh_weight: float = option(6.0, "lsh: weight of its term", float)
    lsh_bits: int = option(32, "lsh: hash bits for each entry of the teacher's feature", int)
    lsh_samples: str = option("correct", "lsh: samples that count: those the teacher gets right (correct), or all")
    dhkd_weight: float = option(1.0, "dhkd: weight of its term", float)
    dhkd_tau: float = option(2.0, "dhkd: temperature", float)
    dhkd_head: str = option("nonlinear", "dhkd: second classifier, nonlinear or linear")
    dhkd_align: bool = option(True, "dhkd: do not align the gradients", bool)  # --no-dhkd-align
    precision: str = option(
        "auto", "of networks and heads: float32, tf32, bfloat16 (autocast); auto: float32, on CUDA tf32 in convolutions"
    )
    crop_padding: int | None = option(None, "padding for the random crop: 4; digits 2", int)
    flip: bool | None = option(None, "do not flip images at random", bool)  # --no-flip
    image_size: int | None = option(None, "side of the images in pixels, at least 16: 32; digits 16", int)
    subset: int | None = option(None, "train on and test with at most so many images, always the same", int)
    seed: int = option(0, "the student's initial weights, batch order and augmentation", int)
    teacher_seed: int = option(0, "of the teacher, where it is trained here", int)
    teacher_weights: str | None = option(None, "checkpoint of the teacher; else it is trained first", recorded=False)
    out: str = option("runs", "where run folders go", recorded=False)
    device: str | None = option(None, "cpu, cuda, cuda:1, mps: the best there is", recorded=False)
    backend: str = option("auto", "of the loss: auto, reference or fused", recorded=False)
    channels_last: str = option("auto", "memory layout: yes, no; auto: of the teacher on the CPU", recorded=False)
    compile: str = option("auto", "torch.compile the networks: yes, no; auto: long CPU runs try it", recorded=False)

    def recorded(self) -> dict[str, Any]:
        """The fields that make two runs different, as JSON would give them back."""
        fields = [f.name for f in dataclasses.fields(self) if f.metadata["recorded"]]
        return json.loads(json.dumps({name: getattr(self, name) for name in fields}))


# Section 4.1 for CIFAR-100 and section 4.2 for SVHN. Milestones are those of the full schedule.
_CIFAR = {"epochs": 240, "lr_steps": (150, 180, 210), "batch_size": 64, "lr": 0.05, "beta": 0.5}
_CIFAR |= {"crop_padding": 4, "flip": True, "image_size": 32}
RECIPES: dict[str, dict[str, Any]] = {
    "cifar100": _CIFAR,
    "cifar10": _CIFAR,
    "folder": _CIFAR,
    "svhn": _CIFAR | {"epochs": 150, "lr_steps": (80, 110, 135), "batch_size": 200, "lr": 0.001, "beta": 5.0},
    "digits": _CIFAR | {"epochs": 30, "lr_steps": (19, 23, 26), "crop_padding": 2, "flip": False, "image_size": 16},
}
# The benchmark that Table 1 compares with trains these with 0.01, except on SVHN, which it does not have.
LOW_LR, LOW_LR_MODELS = 0.01, ("mobilenetv2", "shufflenetv2")
TEACHER_OPTIONS = ("teacher", "teacher_seed", "teacher_weights")


def special_options() -> set[str]:
    """The fields of Config that do not matter to every method."""
    return {name for m in METHODS.values() for name in (*m.options, *m.final_options)} | set(TEACHER_OPTIONS)


def resolve(config: Config, note: Callable[[str], None] = lambda text: None) -> Config:
    """The same configuration with every value filled in, checked.

    Options that do not matter to the method go back to their defaults, so that they do not tell two runs apart.

    Raises:
        UsageError: a name that does not exist, a value that makes no sense.
    """
    known("data set", config.dataset, SOURCES)
    methods = methods_of(config)
    config = dataclasses.replace(config, method="+".join(methods))
    needs_teacher = any(method.needs_teacher for method in methods.values())
    if not config.student:
        raise UsageError("--student is missing: python mhkd.py --teacher resnet32x4 --student shufflenetv2")
    known("network", config.student, MODELS)
    if needs_teacher:
        if not config.teacher:
            raise UsageError(f"--teacher is missing: --method {config.method} needs one (--method ce does not)")
        known("network", config.teacher, MODELS)
    values: dict[str, Any] = {}
    relevant = [name for method in methods.values() for name in method.options]
    relevant += list(methods.values())[-1].final_options
    relevant += TEACHER_OPTIONS if needs_teacher else ()
    special = special_options()
    for field in dataclasses.fields(config):
        if field.name in special and field.name not in relevant:
            if getattr(config, field.name) != field.default:
                note(f"--{field.name.replace('_', '-')} has no effect with --method {config.method}")
            values[field.name] = field.default
    config = dataclasses.replace(config, **values)

    recipe = dict(RECIPES[config.dataset])
    if config.student in LOW_LR_MODELS and config.dataset != "svhn":
        recipe["lr"] = LOW_LR
    milestones, full = recipe.pop("lr_steps"), recipe["epochs"]
    if "beta" not in relevant:
        del recipe["beta"]
    values = {name: value for name, value in recipe.items() if getattr(config, name) is None}
    if config.teacher_weights:
        values["teacher_seed"] = 0  # nothing is trained with it
    config = dataclasses.replace(config, **values)
    if config.lr_steps is None:
        steps = tuple(round(step * config.epochs / full) for step in milestones)
        config = dataclasses.replace(config, lr_steps=steps)
    _check_values(config)
    if config.backend == "fused" and not loss_backend().startswith("fused"):
        raise UsageError("--backend fused: the fused kernel is not installed, so use auto or reference")
    return config


def _check_values(config: Config) -> None:
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "epochs": (lambda v: v >= 1, "at least 1"),
        "batch_size": (lambda v: v >= 2, "at least 2 (batch norm needs two images)"),
        "lr": (lambda v: 0 < v < math.inf, "a number above 0"),
        "lr_steps": (lambda v: all(s >= 0 for s in v) and list(v) == sorted(v), "epochs in ascending order"),
        "lr_decay": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
        "momentum": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
        "weight_decay": (lambda v: 0 <= v < math.inf, "a number not below 0"),
        "tau": (lambda v: 0 < v < math.inf, "a number above 0"),
        "alpha": (lambda v: 0 <= v <= 1, "between 0 and 1"),
        "beta": (lambda v: 0 <= v < math.inf, "a number not below 0"),
        **dict.fromkeys(
            ("head_width", "head_stride", "negatives", "embed_dim", "lsh_bits"), (lambda v: v >= 1, "at least 1")
        ),
        **dict.fromkeys(
            ("gamma", *(f"{name}_weight" for name in ("kd", "fitnet", "cc", "rkd", "crd", "lsh", "dhkd"))),
            (lambda v: 0 <= v < math.inf, "a number not below 0"),
        ),
        **dict.fromkeys(("crd_tau", "dhkd_tau"), (lambda v: 0 < v < math.inf, "a number above 0")),
        "lsh_samples": (lambda v: v in ("correct", "all"), "correct or all"),
        "dhkd_head": (lambda v: v in ("nonlinear", "linear"), "nonlinear or linear"),
        "crop_padding": (lambda v: v >= 0, "at least 0"),
        "image_size": (lambda v: v >= 16, "at least 16"),
        "subset": (lambda v: v >= 2, "at least 2"),
        "seed": (lambda v: 0 <= v < 2**62, "not negative"),
        "teacher_seed": (lambda v: 0 <= v < 2**62, "not negative"),
        "teacher_units": (lambda v: bool(v), "at least one name"),
        "student_units": (lambda v: bool(v), "at least one name"),
        "precision": (lambda v: v in ("auto", "float32", "tf32", "bfloat16"), "auto, float32, tf32 or bfloat16"),
        **dict.fromkeys(("channels_last", "compile"), (lambda v: v in ("auto", "yes", "no"), "auto, yes or no")),
        "backend": (lambda v: v in BACKENDS, f"one of {', '.join(BACKENDS)}"),
        "units": (
            lambda v: bool(v) and set(v) <= {1, 2, 3} and len(set(v)) == len(v),
            "some of 1,2,3, each at most once",
        ),
    }
    for name, (holds, wanted) in rules.items():
        value = getattr(config, name)
        if value is not None and not holds(value):
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise UsageError(f"--{name.replace('_', '-')} must be {wanted}, not {shown}")
    if any(len(m.units(config, "teacher")) != len(m.units(config, "student")) for m in methods_of(config).values()):
        raise UsageError("--teacher-units and --student-units must name as many submodules as each other")


def check_teacher_weights(config: Config) -> None:
    if config.teacher_weights and not Path(config.teacher_weights).is_file():
        raise UsageError(f"there is no checkpoint '{config.teacher_weights}'")


def units_of(config: Config, role: str) -> tuple[str, ...]:
    """The submodules of the "teacher" or the "student" whose features the methods need."""
    return tuple(dict.fromkeys(name for m in methods_of(config).values() for name in m.units(config, role)))


def example_input(config: Config) -> Tensor:
    """An image of zeros, to run a network on."""
    return torch.zeros(1, 3, config.image_size, config.image_size)


def run_name(config: Config, data: Data, teacher_sha256: str | None) -> str:
    """The name of a run's folder: data set, teacher, student, method, seed, and whatever is not the default."""
    who = {name: getattr(config, name) for name in ("dataset", "teacher", "student", "method")}
    standard = resolve(Config(**who)).recorded()
    standard["lr_steps"] = resolve(Config(**who, epochs=config.epochs)).recorded()["lr_steps"]
    if config.dataset == "folder":
        who["dataset"] += f"_{data.sha256[:8]}"  # two folders of images are two data sets
    parts = [value for value in who.values() if value] + [f"seed{config.seed}"]
    for name, value in config.recorded().items():
        if name not in who and name != "seed" and value != standard[name]:
            parts.append(f"{name}={'+'.join(map(str, value)) if isinstance(value, list) else value}")
    if world_size() > 1:  # batch norm sees each process's share alone
        parts.append(f"processes={world_size()}")
    if config.teacher_weights:
        parts.append(f"weights={teacher_sha256[:8]}")
    name = "-".join(parts)
    if len(name) > 200:  # file systems end at 255
        name = f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name


# ----------------------------------------------------------------------------------------------------------------------
# 7. Files: nothing that was computed is lost, whenever a run is killed
# ----------------------------------------------------------------------------------------------------------------------


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder '{folder}' cannot be made ({error})") from error


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Write beside the file, flush to the disk, then rename: at every moment the old content or the new is there."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        kept = "; the file of before is untouched" if path.exists() else ""
        raise UsageError(
            f"'{path}' could not be written ({error}){kept}; with that mended, run the same again"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


def read_json(path: Path, *keys: str) -> dict[str, Any] | None:
    """The content of a JSON file, None where there is none. It must have these keys."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or not all(key in content for key in keys):
            raise ValueError(f"it must have {', '.join(keys)}")
    except ValueError as error:
        raise UsageError(f"'{path}' is damaged ({error}): move its folder away") from error
    return content


def sha256_of(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@contextlib.contextmanager
def locked(lock: Path, waiting: str) -> Iterator[None]:
    """Hold a lock file for this process alone; the system lets it go however the process ends."""
    from filelock import FileLock, Timeout  # PyTorch itself depends on it

    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock)
        try:
            held.acquire(timeout=0)
        except Timeout:
            print(f"{waiting}: waiting for it ('{lock}')", flush=True)
            held.acquire()
    except OSError as error:
        raise UsageError(f"the lock '{lock}' cannot be made ({error}): give another --out or --data") from error
    try:
        yield
    finally:
        held.release()


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a checkpoint, {"model": state_dict} or a state dict alone, strictly into a network, which is returned.

    Raises:
        UsageError: the file is missing or broken, holds another network or another number of classes.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no checkpoint '{path}'")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the benchmark saves its options so
            content = torch.load(path, map_location="cpu", weights_only=True)
        state = content.get("model", content.get("state_dict", content))
        for prefix in ("module.", "_orig_mod."):  # from DataParallel, from torch.compile
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"'{path}' is no checkpoint, or holds more than tensors, which could run code: save "
            "{'model': network.state_dict()} alone"
        ) from error
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"'{path}' cannot be read as a checkpoint, it may be truncated ({reason})") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    differing = [name for name in wanted if shapes.get(name) != wanted[name]] + [n for n in shapes if n not in wanted]
    if differing:
        last = list(wanted)[-2:]  # the classifier's weight and bias
        if set(differing) <= set(last) and all(n in shapes and shapes[n][1:] == wanted[n][1:] for n in last):
            raise UsageError(f"'{path}' has {shapes[last[0]][0]} classes where {wanted[last[0]][0]} are needed")
        holds = next((name for name in MODELS if _same_network(name, shapes)), "another network")
        first = differing[0]
        raise UsageError(
            f"'{path}' holds {holds}, not this network: '{first}' is {shapes.get(first, 'missing')} there, "
            f"{wanted.get(first, 'missing')} here"
        )
    model.load_state_dict(state)
    return model


def _same_network(name: str, shapes: dict[str, tuple]) -> bool:
    with torch.device("meta"):
        wanted = {key: tuple(tensor.shape) for key, tensor in build_model(name, 1).state_dict().items()}
    last = list(wanted)[-2:]
    return wanted.keys() == shapes.keys() and all(shapes[k] == wanted[k] for k in wanted if k not in last)


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on beside the configuration."""
    from importlib import metadata

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        return ""

    commit = git("rev-parse", "HEAD")
    if commit and git("status", "--porcelain", "--", Path(__file__).name):
        commit += " with changes"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("torchvision", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "device": str(device),
        "hardware": hardware_name(device),
        "threads": torch.get_num_threads(),
        **versions,
        "mhkd": __version__,
        "commit": commit or None,
    }


def hardware_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


# ----------------------------------------------------------------------------------------------------------------------
# 8. Training
# ----------------------------------------------------------------------------------------------------------------------


def precision_on(device: torch.device, config: Config) -> str:
    """What --precision auto means on a device: float32, on CUDA with TF32 in convolutions, as by PyTorch's default."""
    if config.precision == "tf32" and device.type != "cuda":
        raise UsageError(f"--precision tf32 is for CUDA, and this is {device}: use auto, float32 or bfloat16")
    auto = "tf32" if device.type == "cuda" else "float32"
    return auto if config.precision == "auto" else config.precision


@contextlib.contextmanager
def tf32_in_convolutions(allowed: bool) -> Iterator[None]:
    """PyTorch's switch for CUDA, put back at the end."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class Distiller(nn.Module):
    """Student, frozen teacher and objective as one module: what a training step runs."""

    def __init__(self, config: Config, student: Tapped, teacher: Tapped | None, objective: Objective):
        super().__init__()
        self.config, self.student, self.teacher, self.objective = config, student, teacher, objective

    def forward(self, images: Tensor, labels: Tensor, indices: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Images [B, 3, S, S], labels [B], places in the training set [B].

        Returns the loss's named terms and the student's logits [B, K].
        """
        student = self.observe(self.student, images)
        teacher = self.observe(self.teacher, images) if self.teacher else None
        return self.objective(Step(student, teacher, labels, indices)), student.logits

    def observe(self, network: Tapped, images: Tensor) -> Outputs:
        """What the student or the teacher gives, computed in the precision of the run."""
        with autocast(self.config, images.device):
            outputs = network(images)
        return outputs.float() if self.config.precision == "bfloat16" else outputs

    def backward(self, terms: dict[str, Tensor]) -> None:
        student = [p for p in self.student.parameters() if p.requires_grad]
        self.objective.backward(terms, student, [p for p in self.objective.parameters() if p.requires_grad])

    def compile_networks(self) -> None:
        """Each is compiled in place; names and state dicts stay."""
        for network in (self.student, self.teacher):
            if network is not None:
                network.compile(dynamic=False)

    def trained_state(self) -> dict[str, Tensor]:
        """The state dict without the frozen teacher."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("teacher.")}


def folded(model: nn.Module, units: Sequence[str], example: Tensor) -> nn.Module:
    """A copy of a network, in eval mode, with batch norms multiplied into the convolutions before them.

    The same but for rounding. A pair is folded where the batch norm alone uses the convolution's output and no unit
    gives that output, which the autograd graph of one forward pass tells. (In wide resnets of width 1 the stem's
    output goes to a batch norm and round it, too.)
    """
    original = copy.deepcopy(model).eval().requires_grad_(False)
    model = copy.deepcopy(model).eval().requires_grad_(True)
    made: dict[str, Any] = {}  # by each submodule, the node of the graph behind its output

    def note(name: str) -> Callable:
        return lambda module, args, output: made.__setitem__(name, getattr(output, "grad_fn", None))

    modules = dict(model.named_modules())
    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    parameter = next(model.parameters())
    with torch.enable_grad():
        output = model(example.to(parameter.device, parameter.dtype))
    for handle in handles:
        handle.remove()
    uses: dict[Any, int] = {output.grad_fn: 1}
    to_visit = [output.grad_fn]
    while to_visit:
        for node, _ in to_visit.pop().next_functions:
            if node is not None and node not in uses:
                to_visit.append(node)
            uses[node] = uses.get(node, 0) + 1
    convolutions = {made[n]: n for n, m in modules.items() if type(m) is nn.Conv2d and n in made}
    kept = {made.get(name) for name in units}
    for name, module in modules.items():
        if type(module) is nn.BatchNorm2d and made.get(name) is not None:
            source = made[name].next_functions[0][0]
            if source in convolutions and uses[source] == 1 and source not in kept:
                conv = modules[convolutions[source]]
                fused = nn.utils.fusion.fuse_conv_bn_eval(conv, module)
                model.set_submodule(convolutions[source], fused)
                model.set_submodule(name, nn.Identity())
    model.requires_grad_(False)
    with torch.no_grad():  # a network that runs a convolution twice, say, is not what the graph suggests
        image = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
        image = image.to(parameter.device, parameter.dtype)
        ours, theirs = model(image), original(image)
    return model if (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max() else original


def build_distiller(config: Config, teacher: nn.Module | None, data: Data) -> Distiller:
    """Student and objective, freshly initialised from config.seed, beside the trained teacher, on the data's device."""
    K, device = len(data.classes), data.train_images.device
    torch.manual_seed(config.seed)
    # The student comes first, so that its initial weights depend on the seed alone, not on the method.
    student = build_model(config.student, K)
    methods = methods_of(config).values()
    for method in methods:
        method.adapt(config, student, teacher, K)
    taps = {"penultimate": any(method.needs_penultimate for method in methods), "example_input": example_input(config)}
    tapped = Tapped(student, units_of(config, "student"), K, **taps)
    teaching = None
    if teacher:
        units = units_of(config, "teacher")
        teaching = Tapped(folded(teacher, units, example_input(config)), units, K, frozen=True, **taps)
    distiller = Distiller(config, tapped, teaching, Objective(config, tapped, teaching, data)).to(device)
    if config.channels_last == "yes":
        distiller.to(memory_format=torch.channels_last)
        tapped.memory_format = torch.channels_last
    if teaching and (config.channels_last == "yes" or (config.channels_last == "auto" and device.type == "cpu")):
        teaching.to(memory_format=torch.channels_last)
        teaching.memory_format = torch.channels_last
    return distiller


def build_optimizer(config: Config, distiller: Distiller) -> torch.optim.Optimizer:
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


# A run on the CPU is long enough to try torch.compile, which takes minutes, from so many steps and seconds on.
WORTH_TRYING_STEPS, WORTH_TRYING_SECONDS = 500, 1800


def choose_compile(
    config: Config, data: Data, teacher: nn.Module | None, environments: Sequence[dict[str, Any]]
) -> bool:
    """Whether a run compiles its networks: as --compile says; for auto as the run did before, or as a trial tells."""
    if config.compile == "no":
        return False
    if any(method.sets_gradients() for method in methods_of(config).values()):
        if config.compile == "yes":  # two backward passes through one graph
            say(f"note: --compile has no effect with --method {config.method}")
        return False
    if config.compile == "yes":
        return True
    if environments:
        return environments[-1].get("compiled", False)
    steps = config.epochs * len(data.train_labels) // config.batch_size
    if data.train_images.device.type != "cpu" or world_size() > 1 or steps < WORTH_TRYING_STEPS:
        return False
    eager = step_seconds(config, data, teacher, compiled=False)
    if steps * eager < WORTH_TRYING_SECONDS:
        return False
    try:
        compiled = step_seconds(config, data, teacher, compiled=True)
    except Exception as error:  # no C++ compiler, for one
        say(f"note: torch.compile does not work here ({str(error).strip().splitlines()[0]})")
        return False
    say(f"torch.compile: {compiled:.3f} s a step, without it {eager:.3f} s")
    return compiled < 0.95 * eager  # less is not worth the compilation for the last short batch


def step_seconds(config: Config, data: Data, teacher: nn.Module | None, compiled: bool, steps: int = 5) -> float:
    """The fastest of some training steps of a run like this one, which is not touched."""
    distiller = build_distiller(config, teacher, data).train()
    if compiled:
        distiller.compile_networks()
    optimizer = build_optimizer(config, distiller)
    seconds = []
    for batch in itertools.islice(epoch_batches(data, config, torch.Generator().manual_seed(config.seed)), steps):
        started = time.perf_counter()
        train_step(distiller, optimizer, *batch)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def train(config: Config) -> dict[str, Any]:
    """Train the student that the configuration describes, and the teacher first where it has no weights.

    A finished run is not repeated; an interrupted one goes on from its last finished epoch. Under `torchrun` every
    process takes its share of each batch, and the first one writes.

    Returns:
        The content of result.json. "accuracy", in percent of the test images, is that of the last epoch's student,
        saved without heads and loaded into the plain network.

    Raises:
        UsageError: something is wrong that the user can mend; nothing has been overwritten.
    """
    resolved = resolve(config, note=lambda text: say(f"note: {text}"))
    device = pick_device(resolved.device)
    precision = precision_on(device, resolved)
    random_state = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with team(device), random_state, tf32_in_convolutions(precision == "tf32"):
        check_teacher_weights(resolved)
        if resolved.teacher_units or resolved.student_units:  # better now than after the teacher's training
            for role in ("teacher", "student"):
                network = build_model(getattr(resolved, role), 10)
                Tapped(network, units_of(resolved, role), 10, example_input=example_input(resolved))
        with main_process_first():
            data = load_data(resolved)
        N = len(data.train_labels)
        if resolved.batch_size > N:
            raise UsageError(f"--batch-size {resolved.batch_size} is larger than the data, {N} training images")
        if resolved.batch_size % world_size() or resolved.batch_size < 2 * world_size():
            raise UsageError(
                f"--batch-size {resolved.batch_size} does not give each of the {world_size()} processes the same "
                "number of images, two at least"
            )
        data = data.to(device)
        if not resolved.teacher:
            return _train_one(resolved, data, device)
        if resolved.teacher_weights:
            weights, sha256, accuracy = Path(resolved.teacher_weights), sha256_of(resolved.teacher_weights), None
        else:
            say(f"teacher {resolved.teacher}: no --teacher-weights, so it is trained with the same recipe, and kept")
            alone = {"student": config.teacher, "teacher": None, "method": "ce"}
            alone |= {"seed": config.teacher_seed, "teacher_seed": 0}
            result = _train_one(resolve(dataclasses.replace(config, **alone)), data, device)
            weights = Path(resolved.out) / result["name"] / "student.pt"
            sha256, accuracy = result["student_sha256"], result["accuracy"]
        teacher = load_weights(build_model(resolved.teacher, len(data.classes)), weights).to(device)
        return _train_one(resolved, data, device, teacher, sha256, accuracy)


def _train_one(
    config: Config,
    data: Data,
    device: torch.device,
    teacher: nn.Module | None = None,
    teacher_sha256: str | None = None,
    teacher_accuracy: float | None = None,
) -> dict[str, Any]:
    """One run in its folder, under its lock. Data and teacher are on the device."""
    folder = Path(config.out) / run_name(config, data, teacher_sha256)
    record = {
        "config": {**config.recorded(), "processes": world_size()},
        "units": {role: list(units_of(config, role)) for role in ("teacher", "student")},
        "teacher_sha256": teacher_sha256,
        "data_sha256": data.sha256,
    }
    lock = locked(folder.parent / ".locks" / f"{folder.name}.lock", f"another run is at work on '{folder}'")
    with lock if is_main() else contextlib.nullcontext():
        wait_for_all()
        before = read_json(folder / "config.json", "config", "teacher_sha256", "data_sha256", "environments")
        result = read_json(folder / "result.json", "config", "teacher_sha256", "data_sha256", "student_sha256")
        for written in (before, result):
            if written:
                _refuse_other_configuration(folder, written, record)
        if is_main():
            make_folder(folder)
        student = folder / "student.pt"
        if result and student.is_file() and sha256_of(student) == result["student_sha256"]:
            say(f"finished before: '{folder}'")
            return result
        here = {**environment(device), **{name: getattr(config, name) for name in ("data", "out", "teacher_weights")}}
        here |= {"precision": precision_on(device, config), "channels_last": config.channels_last}
        here["loss"] = loss_backend() if _use_fused(config.backend, 1, data.test_labels) else "reference"
        environments = before["environments"] if before else []
        here["compiled"] = choose_compile(config, data, teacher, environments)
        if environments and environments[-1] != here:
            last = environments[-1]
            changes = [f"{name} {last.get(name)} -> {here[name]}" for name in here if last.get(name) != here[name]]
            say(f"note: this run goes on in other surroundings: {', '.join(changes)}")
        if is_main() and (not environments or environments[-1] != here):
            facts = {"classes": data.classes, "mean": data.mean, "std": data.std}
            facts |= {"train_images": len(data.train_labels), "test_images": len(data.test_labels)}
            content = {**record, "data": facts, "environments": [*environments, here]}
            write_json(folder / "config.json", content)
        if teacher:
            teacher_accuracy = evaluate(teacher, data) if teacher_accuracy is None else teacher_accuracy
            say(f"teacher {config.teacher}: {teacher_accuracy:.2f} % on the test images")
        student, log = _train_in(folder, config, data, device, teacher, record, here["compiled"])
        return _finish(folder, config, data, student, log, {**record, "environment": here}, teacher_accuracy)


def _refuse_other_configuration(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    sums = ("teacher_sha256", "data_sha256")
    # What a record of an earlier version lacks was not there to choose: it had what is now the default.
    old, new = ({**Config().recorded(), **r["config"], **{k: r[k] for k in sums}} for r in (before, now))
    differing = [f"{k} {old.get(k)} there, {new.get(k)} now" for k in {**old, **new} if old.get(k) != new.get(k)]
    if differing:
        raise UsageError(
            f"'{folder}' was written with another configuration ({'; '.join(differing)}): "
            "move it away, or give another --out"
        )


def _train_in(
    folder: Path,
    config: Config,
    data: Data,
    device: torch.device,
    teacher: nn.Module | None,
    record: dict[str, Any],
    compiled: bool,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The epochs that are left. Returns the plain student and its log, an entry for each epoch."""
    distiller = build_distiller(config, teacher, data)
    if compiled:
        distiller.compile_networks()
    optimizer = build_optimizer(config, distiller)
    generator = torch.Generator().manual_seed(config.seed)
    log: list[dict[str, Any]] = []

    if (folder / "checkpoint.pt").is_file():
        log = _restore(folder, distiller, optimizer, generator, record)
        say(f"'{folder}' goes on after epoch {len(log)} of {config.epochs}")
    else:
        say(f"'{folder}': {config.epochs} epochs on {device}, {len(data.train_labels)} training images")
        for method in distiller.objective.methods:
            first = torch.Generator().manual_seed(config.seed)  # that of the first epoch; its own is not disturbed
            method.prepare(distiller.teacher, lambda first=first: epoch_batches(data, config, first))
    step_module = parallel(distiller, device)
    N = len(data.train_labels)
    with Progress(config.epochs * N, config.student, done=len(log) * N) as progress:
        for epoch in range(len(log) + 1, config.epochs + 1):
            started = time.perf_counter()
            # Epochs 1 to s of a milestone s keep the rate; epoch s + 1 is the first with the lower one.
            lr = config.lr * config.lr_decay ** sum(epoch > step for step in config.lr_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            try:
                means = train_epoch(step_module, optimizer, data, config, generator, progress)
            except FloatingPointError as error:
                raise UsageError(
                    f"the loss is not finite in epoch {epoch}, {error}; '{folder}' keeps the state before that epoch: "
                    "try a lower --lr"
                ) from error
            rate = N / (time.perf_counter() - started)
            entry = {"epoch": epoch, "lr": lr, **means, "test_accuracy": evaluate(distiller.student.model, data)}
            entry |= {"images_per_second": round(rate, 1), "seconds": round(time.perf_counter() - started, 3)}
            log.append(entry)
            if is_main():
                _save_epoch(folder, distiller, optimizer, generator, record, log)
            progress.line(_epoch_line(config, entry), f"epoch {epoch}, {entry['test_accuracy']:.2f} %")
    student = distiller.student.remove()
    for method in distiller.objective.methods:
        student = method.plain(student)
    return student, log


def train_epoch(
    distiller: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    config: Config,
    generator: torch.Generator,
    progress: Progress,
) -> dict[str, float]:
    """One epoch. Returns means over the steps: the loss, its named terms, the training accuracy in percent."""
    distiller.train()
    device = data.train_images.device
    history = []  # for each step its figures, on the device: the host waits for them once an epoch
    for images, labels, indices in epoch_batches(data, config, generator, world_size(), rank()):
        figures = train_step(distiller, optimizer, images, labels, indices)
        history.append(torch.stack(list(figures.values())))
        if device.type == "cpu" and world_size() == 1 and not math.isfinite(history[-1][0]):
            break  # on other devices asking would make the host wait; there the end of the epoch tells
        progress.step(len(labels) * world_size())
    steps = average_over_processes(torch.stack(history)).cpu().double()  # [steps, figures]
    bad = (~steps[:, 0].isfinite()).nonzero()
    if len(bad):
        raise FloatingPointError(f"step {bad[0].item() + 1}")
    if not torch.stack([p.isfinite().all() for p in distiller.parameters()]).all():
        raise FloatingPointError(f"after the last step, {len(steps)}: its update made weights infinite or NaN")
    return dict(zip(figures, steps.mean(dim=0).tolist()))


def train_step(
    distiller: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, indices: Tensor
) -> dict[str, Tensor]:
    """One step of SGD on images [B, 3, S, S]. Returns the loss, its terms and the accuracy in percent."""
    terms, logits = distiller(images, labels, indices)
    loss = sum(terms.values())
    optimizer.zero_grad()
    getattr(distiller, "module", distiller).backward(terms)  # DistributedDataParallel keeps it as .module
    optimizer.step()
    accuracy = 100 * (logits.argmax(dim=1) == labels).float().mean()
    return {name: value.detach() for name, value in {"loss": loss, **terms, "train_accuracy": accuracy}.items()}


@torch.no_grad()
def evaluate(model: nn.Module, data: Data) -> float:
    """Accuracy of a network on the test images, in percent; its mode is left as it was."""
    batch_size = max(50, 500 * 32**2 // data.test_images.shape[1] ** 2)  # as much memory for larger images
    mode = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=data.test_labels.device)
    for images, labels in zip(data.test_images.split(batch_size), data.test_labels.split(batch_size)):
        correct += (model(data.normalise(images)).argmax(dim=1) == labels).sum()
    model.train(mode)
    return 100 * correct.item() / len(data.test_labels)


def _save_epoch(folder, distiller, optimizer, generator, record, log) -> None:
    """The state after an epoch: checkpoint.pt first, it is what counts; log.jsonl is written again from it."""
    state = {
        "epoch": len(log),
        "distiller": distiller.trained_state(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "record": json.dumps(record),
        "log": json.dumps(log),
    }
    write_atomically(folder / "checkpoint.pt", lambda file: torch.save(state, file))
    _write_log(folder, log)


def _write_log(folder: Path, log: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    write_atomically(folder / "log.jsonl", lambda file: file.write(lines.encode()))


def _restore(folder, distiller, optimizer, generator, record) -> list[dict[str, Any]]:
    path = folder / "checkpoint.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before, log = json.loads(state["record"]), json.loads(state["log"])
        _refuse_other_configuration(folder, before, record)
        missing, unexpected = distiller.load_state_dict(state["distiller"], strict=False)
        missing = [name for name in missing if not name.startswith("teacher.")]
        if missing or unexpected:
            raise KeyError(missing + unexpected)
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(state["cuda_rng"])
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"'{path}' cannot be read ({error}): move '{folder}' away to begin again") from error
    if is_main():
        _write_log(folder, log)
    return log


def _finish(folder, config, data, student, log, record, teacher_accuracy) -> dict[str, Any]:
    """Save the plain student, load it again into the plain network, and report the accuracy of that."""
    K = len(data.classes)
    best = max(log, key=lambda entry: entry["test_accuracy"])
    if is_main():
        content = {
            "model": student.state_dict(),
            "name": config.student,
            "classes": data.classes,
            "image_size": config.image_size,
            "mean": list(data.mean),
            "std": list(data.std),
        }
        write_atomically(folder / "student.pt", lambda file: torch.save(content, file))
        deployed = load_weights(build_model(config.student, K), folder / "student.pt").to(data.test_labels.device)
        write_json(
            folder / "result.json",
            {
                "name": folder.name,
                "accuracy": evaluate(deployed, data),
                "accuracy_is": "of the last epoch's student, saved without heads and loaded into the plain network",
                "best_accuracy": best["test_accuracy"],
                "best_epoch": best["epoch"],
                "teacher_accuracy": teacher_accuracy,
                "parameters": sum(p.numel() for p in student.parameters()),
                "epochs": len(log),
                "seconds": round(sum(entry["seconds"] for entry in log), 3),
                "student_sha256": sha256_of(folder / "student.pt"),
                **record,
            },
        )
    wait_for_all()
    result = read_json(folder / "result.json")
    say(
        f"{config.student} ({config.method}): {result['accuracy']:.2f} % after the last epoch "
        f"(best: {result['best_accuracy']:.2f} % after epoch {result['best_epoch']}), in '{folder / 'student.pt'}'"
    )
    return result


def _epoch_line(config: Config, entry: dict[str, Any]) -> str:
    left = (config.epochs - entry["epoch"]) * entry["seconds"]
    return (
        f"{config.student} {config.method} epoch {entry['epoch']}/{config.epochs}  lr {entry['lr']:.3g}  "
        f"loss {entry['loss']:.4f}  train {entry['train_accuracy']:.2f} %  test {entry['test_accuracy']:.2f} %  "
        f"{entry['images_per_second']:.0f} images/s  {int(left) // 60}:{int(left) % 60:02d} left"
    )


class Progress:
    """A bar with rate and time left on a terminal, where tqdm is installed; elsewhere lines, where there are any."""

    def __init__(self, total: int, title: str, done: int = 0):
        self.bar = None
        if sys.stderr.isatty() and is_main():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=total, initial=done, desc=title, unit=" images", unit_scale=True, leave=False)

    def step(self, images: int) -> None:
        if self.bar is not None:
            self.bar.update(images)

    def line(self, text: str, short: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(short)
        else:
            say(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def say(text: str) -> None:
    if is_main():
        print(text, flush=True)


def pick_device(name: str | None) -> torch.device:
    """The device of that name; without a name CUDA, then MPS, then the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and world_size() > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=device)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"--device {name} cannot be used here ({reason})") from error
    return device


# Several processes, as torchrun starts them. Without it each of these is the trivial answer.


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


@contextlib.contextmanager
def team(device: torch.device) -> Iterator[None]:
    if world_size() == 1 or torch.distributed.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Others wait while the first one waits for another run's teacher, or downloads.
    backend, patience = "nccl" if device.type == "cuda" else "gloo", datetime.timedelta(days=7)
    torch.distributed.init_process_group(backend, timeout=patience)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def wait_for_all() -> None:
    if world_size() > 1:
        torch.distributed.barrier()


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The first process downloads and fills caches; the others then find them."""
    if not is_main():
        wait_for_all()
    yield
    if is_main():
        wait_for_all()


def average_over_processes(values: Tensor) -> Tensor:
    if world_size() > 1 and torch.distributed.is_initialized():
        values = values.clone()
        torch.distributed.all_reduce(values)
        values /= world_size()
    return values


def gather_from_processes(rows: Tensor) -> Tensor:
    """Rows [B, ...] of each process, as many on all of them, in the order of the processes."""
    if world_size() == 1 or not torch.distributed.is_initialized():
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def parallel(distiller: Distiller, device: torch.device) -> nn.Module:
    """Gradients averaged over the processes, by PyTorch's DistributedDataParallel."""
    if world_size() == 1 or distiller.objective.sets_gradients():  # which averages them itself
        return distiller
    devices = [device] if device.type == "cuda" else None
    # Unused parameters: those of heads that weigh nothing (--beta 0).
    # Buffers need no broadcast: the first process's running statistics are what is saved, and banks agree anyway.
    return nn.parallel.DistributedDataParallel(
        distiller, device_ids=devices, find_unused_parameters=True, broadcast_buffers=False
    )


# ----------------------------------------------------------------------------------------------------------------------
# 9. The paper's tables: what to run for them, and the report of what has run
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the paper: a column for each pair teacher:student, a row for each method, accuracies in percent.

    A row "mhkd:2" is MHKD with the head of unit 2 alone. Figures are "mean" or "mean(standard deviation)".
    """

    title: str
    dataset: str
    pairs: str
    rows: dict[str, str]
    teachers: str | None = None  # the teachers' own accuracies
    compression: str | None = None  # as the paper prints it
    titles: dict[str, str] = dataclasses.field(default_factory=dict)  # of rows, where they differ from ROW_TITLES

    def title_of(self, row: str) -> str:
        return self.titles.get(row) or ROW_TITLES.get(row, row)

    def columns(self) -> list[tuple[str, str]]:
        return [tuple(pair.split(":")) for pair in self.pairs.split()]


TABLES = {
    "table1": Table(
        "Table 1: test accuracy on CIFAR-100, %",
        "cifar100",
        "wrn_40_2:wrn_16_2 resnet110:resnet20 vgg13:vgg8 vgg13:mobilenetv2 resnet32x4:shufflenetv2",
        {
            "ce": "73.26 69.06 70.36 64.60 71.82",
            "kd": "74.92 70.67 72.98 67.37 74.45",
            "fitnet": "75.12 70.67 73.22 66.90 75.15",
            "cc": "75.09 70.88 73.04 68.02 74.72",
            "rkd": "74.89 70.77 72.97 67.87 74.55",
            "mhkd": "75.28(0.26) 71.00(0.24) 73.96(0.19) 69.11(0.12) 76.34(0.24)",
            "crd": "75.64(0.21) 71.56(0.16) 74.29(0.12) 69.94(0.05) 76.05(0.09)",
            "crd+mhkd": "75.89(0.10) 71.76(0.10) 74.37(0.26) 70.21(0.19) 76.47(0.21)",
        },
        teachers="75.61 74.31 74.64 74.64 79.42",
        compression="68.81 70.00 58.10 92.82 83.22",
    ),
    "table2": Table(
        "Table 2: one head against several on CIFAR-100, test accuracy, %",
        "cifar100",
        "wrn_40_2:wrn_16_2 vgg13:vgg8",
        {
            "kd": "74.92 72.98",
            "fitnet": "75.12 73.22",
            "cc": "75.09 73.04",
            "rkd": "74.89 72.97",
            "mhkd:1": "75.27(0.27) 73.63(0.29)",
            "mhkd:2": "75.16(0.15) 73.76(0.12)",
            "mhkd:3": "75.00(0.35) 73.32(0.21)",
            "mhkd": "75.28(0.26) 73.96(0.19)",
        },
        titles={"mhkd": "Head-1+2+3"},
    ),
    "table3": Table(
        "Table 3: test accuracy on SVHN, %",
        "svhn",
        "wrn_40_2:wrn_16_2 resnet56:resnet20 vgg13:vgg8 mobilenetv2:vgg13 shufflenetv2:resnet32x4",
        {
            "ce": "93.05(0.01) 93.05(0.01) 91.74(0.06) 93.96(0.21) 94.17(0.09)",
            "kd": "94.67(0.06) 93.95(0.12) 93.93(0.06) 95.31(0.04) 95.96(0.10)",
            "fitnet": "94.75(0.06) 94.10(0.05) 94.25(0.06) 95.73(0.09) 96.20(0.08)",
            "cc": "95.00(0.06) 94.43(0.09) 94.30(0.12) 95.75(0.08) 96.04(0.09)",
            "rkd": "95.28(0.12) 94.57(0.06) 94.40(0.08) 95.83(0.02) 96.25(0.02)",
            "mhkd": "95.38(0.03) 94.70(0.04) 94.45(0.07) 95.88(0.01) 96.68(0.03)",
        },
        teachers="94.29 93.69 94.20 95.47 96.08",
    ),
}
ROW_TITLES = {
    "teacher": "Teacher baseline",
    "ce": "Student baseline",
    "kd": "KD",
    "fitnet": "FitNet",
    "cc": "CC",
    "rkd": "RKD",
    "mhkd": "MHKD",
}
ROW_TITLES |= {"crd": "CRD", "crd+mhkd": "CRD+MHKD", "lsh": "LSH", "dhkd": "DHKD"}
ROW_TITLES |= {f"mhkd:{unit}": f"Head-{unit}" for unit in (1, 2, 3)}


def cell_config(row: str, teacher: str | None, student: str, base: Config) -> Config:
    """The run of a row and a pair, with the options of `base`."""
    method, _, unit = row.partition(":")
    methods = methods_of(dataclasses.replace(base, method=method))
    if unit and (unit not in ("1", "2", "3") or "mhkd" not in methods):
        raise UsageError(f"there is no row '{row}': mhkd:1, mhkd:2 and mhkd:3 are those with a single head")
    method, units = "+".join(methods), (int(unit),) if unit else base.units
    teacher = None if method == "ce" else teacher
    return dataclasses.replace(base, teacher=teacher, student=student, method=method, units=units)


def plan(
    tables: Sequence[str], base: Config, seeds: Sequence[int] = (0, 1, 2), pairs: Sequence[str] = (),
    rows: Sequence[str] = (),
) -> tuple[list[Config], list[Config]]:  # fmt: skip
    """The runs that tables need, each once: first the teachers, then the others.

    Args:
        tables: keys of TABLES.
        base: options for all of them; its data set, if it is not the default, stands for CIFAR-100.
        pairs, rows: only these, as they are named in TABLES; a method that the paper's table lacks is a further row.

    Raises:
        UsageError: a table, a pair or a method does not exist.
    """
    chosen = [TABLES[known("table", name, TABLES)] for name in tables]
    there = dict.fromkeys(pair for table in chosen for pair in table.pairs.split())
    for pair in pairs:
        known("pair", pair, there)
    for row in rows:
        cell_config(row, None, "", base)
        if ":" in row and not any(row in table.rows for table in chosen):
            raise UsageError(f"the row '{row}' is in table2 only")
    if base.teacher_weights and len({pair.split(":")[0] for pair in pairs or there}) > 1:
        raise UsageError("--teacher-weights is for one teacher: narrow the plan to its pairs")
    check_teacher_weights(base)
    teachers, others = {}, {}
    for table in chosen:
        options = base
        if base.dataset == Config.dataset:
            options = dataclasses.replace(base, dataset=table.dataset)
        elif table.dataset != Config.dataset:
            raise UsageError(f"'{table.title}' is for --dataset {table.dataset} only")
        for teacher, student in table.columns():
            if pairs and f"{teacher}:{student}" not in pairs:
                continue
            wanted = [row for row in table.rows if not rows or row in rows]
            wanted += [row for row in rows if not any(row in other.rows for other in chosen)]
            for row in wanted:
                configs = [cell_config(row, teacher, student, dataclasses.replace(options, seed=s)) for s in seeds]
                others |= {_identity(config): config for config in configs}
                if row != "ce" and not base.teacher_weights:
                    alone = cell_config("ce", None, teacher, dataclasses.replace(options, seed=base.teacher_seed))
                    teachers[_identity(alone)] = alone
    return list(teachers.values()), [config for key, config in others.items() if key not in teachers]


def _identity(config: Config) -> str:
    return json.dumps(resolve(config).recorded())


def finished_runs(folder: str | Path) -> list[dict[str, Any]]:
    """The content of every result.json directly below a folder's run folders, with its "folder"."""
    needed = ("config", "accuracy", "best_accuracy", "best_epoch", "teacher_accuracy", "epochs", "name")
    paths = sorted(Path(folder).glob("*/result.json"))
    return [read_json(path, *needed) | {"folder": path.parent} for path in paths]


def print_plan(tables: Sequence[str], base: Config, **narrowed: Sequence) -> None:
    """A line for each run: "done" or "todo", "teacher" or "student", and the arguments for the command line."""
    done: dict[str, dict[str, Any]] = {}
    for run in finished_runs(base.out):
        if (run["folder"] / "student.pt").is_file() and run["config"].get("processes", 1) == 1:
            config = {name: run["config"].get(name, value) for name, value in Config().recorded().items()}
            folder = os.path.abspath(run["environment"]["data"]) if config["dataset"] == "folder" else ""
            done[json.dumps(config) + folder] = run

    def finished(config: Config) -> dict[str, Any] | None:
        run = done.get(_identity(config) + (os.path.abspath(config.data) if config.dataset == "folder" else ""))
        if run and config.teacher:  # taught by the very teacher that is planned
            if config.teacher_weights:
                return run if run["teacher_sha256"] == sha256_of(config.teacher_weights) else None
            alone = dataclasses.replace(config, seed=config.teacher_seed, teacher_seed=0)
            taught = finished(cell_config("ce", None, config.teacher, alone))
            return run if taught and run["teacher_sha256"] == taught["student_sha256"] else None
        return run

    for phase, configs in zip(("teacher", "student"), plan(tables, base, **narrowed)):
        for config in configs:
            print(f"{'done' if finished(config) else 'todo'}\t{phase}\t{shlex.join(_arguments(config))}")


def _arguments(config: Config) -> list[str]:
    """The command line of a configuration, without what has no effect on it."""
    resolved, arguments = resolve(config), []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default or getattr(resolved, field.name) != value:
            continue
        name = f"--{field.name.replace('_', '-')}"
        if field.metadata["parse"] is bool:
            arguments.append(f"--no-{name[2:]}")
        else:
            arguments += [name, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return arguments


@dataclasses.dataclass
class Cell:
    """The runs of one row and one pair, by seed, and what the paper has there."""

    row: str
    teacher: str
    student: str
    runs: dict[int, float]
    paper: str | None

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.runs.values()) if self.runs else None

    @property
    def std(self) -> float | None:
        """The standard deviation of a sample, with n - 1."""
        return statistics.stdev(self.runs.values()) if len(self.runs) > 1 else None

    @property
    def paper_mean(self) -> float | None:
        return float(self.paper.split("(")[0]) if self.paper else None

    @property
    def paper_std(self) -> float | None:
        return float(self.paper.split("(")[1].rstrip(")")) if self.paper and "(" in self.paper else None

    @property
    def difference(self) -> float | None:
        return self.mean - self.paper_mean if self.runs and self.paper else None

    def ours(self) -> str:
        if not self.runs:
            return "missing"
        spread = "" if self.std is None else f" ({self.std:.2f})"
        return f"{self.mean:.2f}{spread}, n={len(self.runs)}"


Protocol = tuple[tuple[str, str], ...]


def protocol_of(run: dict[str, Any]) -> Protocol:
    """What sets a run apart from the recipe of the paper: () is the paper's own, in full."""
    c = run["config"]
    who = {name: c[name] for name in ("dataset", "teacher", "student", "method")}
    standard = resolve(Config(**who)).recorded()
    scaled = resolve(Config(**who, epochs=c["epochs"])).recorded()["lr_steps"]
    apart = {name: c[name] for name in standard if name in c and c[name] != standard[name]}
    for name in ("seed", "units", *(("lr_steps",) if c["lr_steps"] == scaled else ())):
        apart.pop(name, None)
    if c["dataset"] not in ("cifar100", "svhn"):
        apart["dataset"] = c["dataset"] + (f" {run['data_sha256'][:8]}" if c["dataset"] == "folder" else "")
    if c.get("processes", 1) != 1:
        apart["processes"] = c["processes"]
    return tuple(sorted((name, str(value)) for name, value in apart.items()))


def note_protocols(runs: Sequence[dict[str, Any]]) -> None:
    """Set "protocol" in each run: protocol_of it, and its teacher, where none of the runs by the same recipe is that.

    It is None for a run of a method that is not known here.
    """
    for run in runs:
        try:
            run["protocol"] = protocol_of(run)
        except UsageError:
            run["protocol"] = None
    special = special_options()
    alone = [run for run in runs if not run["config"]["teacher"] and run["protocol"] is not None]
    teachers = {(r["config"]["student"], r["config"]["seed"], r["protocol"], r["student_sha256"]) for r in alone}
    for run in runs:
        c, protocol = run["config"], run["protocol"]
        if c["teacher"] and protocol is not None:
            shared = tuple(item for item in protocol if item[0] not in special)
            if (c["teacher"], c["teacher_seed"], shared, run["teacher_sha256"]) not in teachers:
                run["protocol"] = tuple(sorted((*protocol, ("teacher checkpoint", run["teacher_sha256"][:8]))))


def cells_of(table: Table, runs: Sequence[dict[str, Any]]) -> dict[str, list[Cell]]:
    """The cells of a table for runs of one protocol, by row; "teacher" is the row of the teachers themselves."""

    def cell(row: str, teacher: str, student: str, paper: str | None) -> Cell:
        wanted = cell_config(row, teacher, student, Config())
        found = {
            run["config"]["seed"]: run["accuracy"]
            for run in runs
            if all(run["config"][name] == getattr(wanted, name) for name in ("teacher", "student", "method"))
            and tuple(run["config"]["units"]) == wanted.units
        }
        return Cell(row, teacher, student, found, paper)

    pairs = table.columns()
    rows = {row: figures.split() for row, figures in table.rows.items()}
    named = {"ce", *(row.partition(":")[0] for row in rows)}
    further = dict.fromkeys(run["config"]["method"] for run in runs if _pair(run) in pairs)
    if table.teachers:  # Tables 1 and 3 take further methods, too
        rows |= {method: [None] * len(pairs) for method in further if method not in named}
    cells = {row: [cell(row, *pair, paper) for pair, paper in zip(pairs, figures)] for row, figures in rows.items()}
    if table.teachers:
        taught = [cell("ce", t, t, paper) for (t, _), paper in zip(pairs, table.teachers.split())]
        cells = {"teacher": taught, **cells}
    return cells


def _pair(run: dict[str, Any]) -> tuple[str | None, str]:
    return run["config"]["teacher"], run["config"]["student"]


def compression(teacher: str, student: str, num_classes: int) -> float:
    """Parameters saved, in percent of the teacher's, counted from the networks."""
    with torch.device("meta"):
        t, s = (sum(p.numel() for p in build_model(n, num_classes).parameters()) for n in (teacher, student))
    return 100 * (1 - s / t)


def table_markdown(table: Table, cells: dict[str, list[Cell]], protocol: Sequence[tuple[str, str]]) -> str:
    """The table as the paper lays it out, under each of our rows the paper's and the difference."""
    heading, pairs = f"### {table.title}", table.columns()
    if protocol:
        apart = ", ".join(f"{name} {value}" for name, value in protocol)
        heading += f"\n\n**Not the paper's recipe: {apart}. Not to be compared with the paper's figures.**"
    lines = [heading, "", f"| | {' | '.join(f'{t} → {s}' for t, s in pairs)} |", "|---|" + "---:|" * len(pairs)]

    def line(title: str, values: Sequence[str]) -> None:
        lines.append(f"| {title} | {' | '.join(values)} |")

    K = 10 if table.dataset == "svhn" else 100
    line("Compression, counted, %", [f"{compression(t, s, K):.2f}" for t, s in pairs])
    if table.compression:
        line("· paper", table.compression.split())
    for row, row_cells in cells.items():
        line(f"**{table.title_of(row)}**", [cell.ours() for cell in row_cells])
        if any(cell.paper for cell in row_cells):
            line("· paper", [cell.paper.replace("(", " (") for cell in row_cells])
            if any(cell.runs for cell in row_cells):
                line("· difference", ["" if c.difference is None else f"{c.difference:+.2f}" for c in row_cells])
    return "\n".join(lines)


def lay_out(runs: Sequence[dict[str, Any]]) -> list[tuple[str, Table, dict[str, list[Cell]], Protocol]]:
    """The tables that the runs have a cell of: name, Table, cells and protocol. Notes the "protocol" in each run."""
    note_protocols(runs)
    tables = []
    for name, table in TABLES.items():
        for protocol in sorted({run["protocol"] for run in runs if run["protocol"] is not None}):
            svhn = table.dataset == "svhn"
            of_one = [
                run for run in runs if run["protocol"] == protocol and (run["config"]["dataset"] == "svhn") == svhn
            ]
            cells = cells_of(table, of_one)
            # Networks alone, as in the demo, make no table, unless they were trained by the paper's recipe.
            counted = [line for row, line in cells.items() if not protocol or row not in ("teacher", "ce")]
            if any(cell.runs for line in counted for cell in line):
                tables.append((name, table, cells, protocol))
    return tables


def report(folder: str | Path, pictures: bool = True) -> str:
    """The finished runs below a folder: the paper's tables as far as they have been run, and every run.

    Written there: report.md, which is also returned, report.csv with a line for each cell of a table, and with
    matplotlib curves.png and a picture of each table. Runs that differ from the paper's recipe in anything (epochs,
    subset, data) are in tables of their own, which say so.

    Raises:
        UsageError: no run below it has finished.
    """
    folder = Path(folder)
    runs = finished_runs(folder)
    if not runs:
        raise UsageError(f"no finished run below '{folder}'")
    tables = lay_out(runs)
    text = "\n\n".join([*(table_markdown(*rest) for _, *rest in tables), _list_of_runs(runs)])
    write_atomically(folder / "report.md", lambda file: file.write((text + "\n").encode()))
    rows = io.StringIO()
    lines = [
        _csv_line(name, protocol, row, cell)
        for name, _, cells, protocol in tables for row, row_cells in cells.items() for cell in row_cells
    ]  # fmt: skip
    csv.writer(rows, lineterminator="\n").writerows([CSV_COLUMNS, *lines])
    write_atomically(folder / "report.csv", lambda file: file.write(rows.getvalue().encode()))
    if not pictures:
        return text
    try:
        import matplotlib
    except ImportError:
        say("note: no pictures without matplotlib: pip install matplotlib")
        return text
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        _draw_curves(folder / "curves.png", runs)
        for place, (name, *rest) in enumerate(tables):
            _draw_table(folder / f"{name}{f'-{place}' if rest[-1] else ''}.png", *rest)
    return text


CSV_COLUMNS = ["table", "apart from the recipe", "row", "teacher", "student", "seeds", "n", "mean", "std"]
CSV_COLUMNS += ["paper_mean", "paper_std", "difference"]


def _csv_line(name: str, protocol: Sequence[tuple[str, str]], row: str, cell: Cell) -> list[Any]:
    apart = "; ".join(f"{key} {value}" for key, value in protocol)
    figures = (cell.mean, cell.std, cell.paper_mean, cell.paper_std, cell.difference)
    rounded = ["" if figure is None else round(figure, 4) for figure in figures]
    seeds = " ".join(map(str, sorted(cell.runs)))
    return [name, apart, row, cell.teacher, cell.student, seeds, len(cell.runs), *rounded]


def _list_of_runs(runs: Sequence[dict[str, Any]]) -> str:
    rows = ["| data set | teacher | student | method | seed | last epoch % | best epoch % (which) | epochs | run |"]
    rows += ["|---|---|---|---|---:|---:|---:|---:|---|"]
    for run in sorted(runs, key=lambda r: (r["config"]["dataset"], str(r["config"]["teacher"]), r["accuracy"])):
        c = run["config"]
        teacher = f"{c['teacher']} ({run['teacher_accuracy']:.2f})" if c["teacher"] else "-"
        best = f"{run['best_accuracy']:.2f} ({run['best_epoch']})"
        dataset = c["dataset"] + (f", {c['subset']} images" if c["subset"] else "")
        cells = [dataset, teacher, c["student"], c["method"], c["seed"], f"{run['accuracy']:.2f}", best, run["epochs"]]
        rows.append(f"| {' | '.join(map(str, cells))} | {run['name']} |")
    return "\n".join(rows)


def _draw_curves(path: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Test accuracy over epochs: a panel for each pair and protocol, a line for each method, the mean over seeds."""
    panels: dict[tuple, dict[str, list[list[float]]]] = {}
    for run in runs:
        if not (run["folder"] / "log.jsonl").is_file():
            continue
        log = [json.loads(line) for line in (run["folder"] / "log.jsonl").read_text().splitlines()]
        c, protocol = run["config"], run["protocol"] or ()
        pairs = {_pair(run)}
        if not c["teacher"]:  # a network alone is shown beside what it learns from teachers
            same = [r for r in runs if r["config"]["teacher"] and r["protocol"] == protocol]
            pairs = {_pair(r) for r in same if r["config"]["student"] == c["student"]} or pairs
        units = "" if c["units"] == [1, 2, 3] else f" unit {'+'.join(map(str, c['units']))}"
        for pair in pairs:
            lines = panels.setdefault((c["dataset"], pair, protocol), {})
            lines.setdefault(c["method"] + units, []).append([entry["test_accuracy"] for entry in log])
    columns = min(3, len(panels))
    figure, axes = _figure(max(1, math.ceil(len(panels) / max(1, columns))), max(1, columns))
    for axis, ((dataset, (teacher, student), protocol), lines) in zip(axes, sorted(panels.items(), key=str)):
        title = f"{dataset}: " + (f"{teacher} → {student}" if teacher else student)
        apart = ", ".join(["epoch", *(f"{k} {v}" for k, v in protocol)])
        axis.set(title=title, xlabel=apart, ylabel="test accuracy, %")
        for label, curves in sorted(lines.items()):
            steps = list(zip(*curves))
            color = f"C{list(ROW_TITLES).index(label) % 10}" if label in ROW_TITLES else None  # the same in all panels
            (drawn,) = axis.plot(
                range(1, len(steps) + 1), [statistics.mean(s) for s in steps], color=color, label=label
            )
            if len(curves) > 1:
                low, high = [min(s) for s in steps], [max(s) for s in steps]
                axis.fill_between(range(1, len(steps) + 1), low, high, alpha=0.15, color=drawn.get_color(), linewidth=0)
        axis.legend(frameon=False, fontsize="small")
    _save_figure(figure, path)


def _draw_table(path: Path, table: Table, cells: dict[str, list[Cell]], protocol: Sequence[tuple[str, str]]) -> None:
    """A panel for each pair: our mean with its standard deviation, and the paper's figure, for each row."""
    rows = [row for row in cells if row != "teacher"]
    figure, axes = _figure(1, len(table.columns()), height=0.8 + 0.35 * len(rows))
    apart = f"\nnot the paper's recipe: {', '.join(f'{k} {v}' for k, v in protocol)}" if protocol else ""
    figure.suptitle(table.title + apart)
    for column, (axis, (teacher, student)) in enumerate(zip(axes, table.columns())):
        for place, row in enumerate(reversed(rows)):
            cell = cells[row][column]
            if cell.paper:
                axis.plot(cell.paper_mean, place, "D", color="0.6", fillstyle="none", label="paper")
            if cell.runs:
                axis.errorbar(cell.mean, place, xerr=cell.std or 0, fmt="o", color="C0", label="here", capsize=2)
        axis.set(title=f"{teacher} → {student}", yticks=range(len(rows)), ylim=(-0.5, len(rows) - 0.5))
        axis.set_yticklabels([table.title_of(row) for row in reversed(rows)] if column == 0 else [])
        axis.grid(axis="x", alpha=0.3)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, frameon=False)
    _save_figure(figure, path)


def _figure(rows: int, columns: int, height: float = 3.2) -> tuple[Any, list]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5, 3.2 * columns), max(3, height * rows)), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _save_figure(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


# ----------------------------------------------------------------------------------------------------------------------
# 10. Command line
# ----------------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(message)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _Parser(
        prog="mhkd.py",
        description=__doc__.split("\n\nThe method")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(Config):
        name, default = field.name.replace("_", "-"), field.default
        help = field.metadata["help"]
        if field.metadata["parse"] is bool:
            parser.add_argument(f"--no-{name}", dest=field.name, action="store_false", default=default, help=help)
            continue
        if default is not None:
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
            help = f"{help} [{shown}]"
        parser.add_argument(f"--{name}", type=field.metadata["parse"], default=default, help=help, metavar="X")
    parser.add_argument("--report", metavar="DIR", help="instead of training: tables and curves of the runs below DIR")
    parser.add_argument("--plan", type=words, metavar="X", help="instead of training: the runs that table1,... need")
    parser.add_argument("--seeds", type=integers, default=(0, 1, 2), metavar="X", help="with --plan: seeds [0,1,2]")
    parser.add_argument("--pairs", type=words, default=(), metavar="X", help="with --plan: only wrn_40_2:wrn_16_2,...")
    parser.add_argument("--methods", type=words, default=(), metavar="X", help="with --plan: only kd,mhkd,mhkd:1,...")
    parser.add_argument("--version", action="store_true", help="print the versions and the backend of the loss")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        parsed = vars(parse_arguments(arguments))
        narrowed = {"seeds": parsed.pop("seeds"), "pairs": parsed.pop("pairs"), "rows": parsed.pop("methods")}
        version, folder, tables = (parsed.pop(name) for name in ("version", "report", "plan"))
        if version:
            print(f"mhkd {__version__}, PyTorch {torch.__version__}, loss: {loss_backend()}")
        elif folder:
            print(report(folder))
        elif tables:
            print_plan(tables, Config(**parsed), **narrowed)
        else:
            train(Config(**parsed))
    except UsageError as error:
        print(f"mhkd.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mhkd.py: interrupted; the same command goes on from the last finished epoch", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
