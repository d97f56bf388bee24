#!/usr/bin/env python3
"""Multi-head knowledge distillation in one script: a large frozen teacher trains a small student.

    python mhkd.py --teacher resnet32x4 --student shufflenetv2       # the main job, CIFAR-100
    python mhkd.py --teacher wrn_40_2 --student wrn_16_2 --seed 1    # another pair, another seed
    python mhkd.py --teacher vgg13 --student vgg8 --method kd        # plain distillation
    python mhkd.py --student vgg8 --method ce                        # a network alone
    python mhkd.py --teacher vgg13 --student vgg8 --method crd+mhkd  # two methods joined
    python mhkd.py --teacher resnet20 --student resnet8 --dataset digits    # no download, minutes
    python mhkd.py --teacher torchvision:resnet50 --teacher-init pretrained \\
        --student timm:mobilenetv3_small_100 --dataset folder --data photos --image-size 224
    torchrun --nproc_per_node 2 mhkd.py --teacher resnet32x4 --student shufflenetv2
    python mhkd_tables.py report runs                                # what has run, in tables

The method (Wang, Lohit, Jones, Fu: "Multi-head knowledge distillation for model compression",
2020) puts small auxiliary classifiers at the ends of the first three units of both networks and
matches each pair as the final outputs are matched in ordinary distillation: by the KL divergence
between softened probabilities, and the cross-entropy. The heads are dropped after the training.

This file works alone, for the methods ce, kd and mhkd: copy it. It needs torch only to import; to
train, numpy and what the data set is read with. Sections: 1 networks, 2 heads, 3 loss (to there:
the paper), 4 methods, 5 training (to there: the experiment), 6 networks from elsewhere, 7 data,
8 configuration, 9 files and processes, 10 command line.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import mmap
import os
import pickle
import platform
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

__version__ = "0.2.0"


class UsageError(ValueError):
    """A mistake that the user can mend. The message is one sentence, which main() prints alone."""


# --------------------------------------------------------------------------------------------------
# 1. The networks of the benchmark. They know nothing of distillation: forward(x) gives logits.
#    Submodules and their order are those of its published checkpoints (HobbitLong/RepDistiller).
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

    # channels, blocks, stride of the first block; the first group, of 8 channels, expands none
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
# The submodules at whose ends the auxiliary heads sit: the first three units (section 3.2).
UNITS: dict[type[nn.Module], tuple[str, str, str]] = {
    ResNet: ("layer1", "layer2", "layer3"),
    WideResNet: ("block1", "block2", "block3"),
    VGG: ("block0", "block1", "block2"),
    MobileNetV2: ("blocks.1", "blocks.2", "blocks.4"),
    ShuffleNetV2: ("layer1", "layer2", "layer3"),
}


# --------------------------------------------------------------------------------------------------
# 2. Auxiliary heads (section 3.1, figure 1), put on any network from outside
# --------------------------------------------------------------------------------------------------


class AuxHead(nn.Sequential):
    """Auxiliary classifier: two 3x3 convolutions with batch norm and ReLU, two linear layers.

    It maps a feature [B, C, H, W] to logits [B, K] (section 3.1). Stride 1, bias, pooling over the
    whole map and PyTorch's initialisation are those of the authors' code (docs/choices.md).

    Args:
        in_channels: C.
        num_classes: K.
        width: kernels of the convolutions, and units between the linear layers.
        stride: of both convolutions; 2 makes a head several times cheaper.
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
    """What a network gives for a batch."""

    logits: Tensor  # [B, K]
    features: dict[int, Tensor]  # by unit, counted from 1: [B, C, H, W] each
    penultimate: Tensor | None  # [B, C], the input of the last linear layer

    def float(self) -> Outputs:
        """The same in float32."""
        features = {unit: feature.float() for unit, feature in self.features.items()}
        penultimate = None if self.penultimate is None else self.penultimate.float()
        return Outputs(self.logits.float(), features, penultimate)


class AuxHeads(nn.ModuleDict):
    """The heads of a network, by unit. Figure 1: Outputs to logits [final, head 1, ..., head D]."""

    def __init__(self, network: FeatureExtractor, units: Iterable[int], width: int, stride: int):
        channels = {unit: network.shapes[unit][0] for unit in units}
        K = network.num_classes
        super().__init__({str(u): AuxHead(C, K, width, stride) for u, C in channels.items()})

    def forward(self, outputs: Outputs) -> list[Tensor]:
        heads = (head(outputs.features[int(unit)]) for unit, head in self.items())
        return [outputs.logits, *heads]


_registering = threading.Lock()


def watch(model: nn.Module, modules: Mapping[str, nn.Module], x: Any) -> tuple[Any, list[tuple]]:
    """Run model(x); also return (name, inputs, output) of each run of these submodules, in order.

    Hooks are on the network only while it runs, so that copies and pickles of it are plain, and
    note only what runs in this thread. An output is copied: the next layer may work in place.
    """
    seen: list[tuple] = []
    thread = None if torch.compiler.is_compiling() else threading.get_ident()

    def note(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if torch.compiler.is_compiling() or threading.get_ident() == thread:
                seen.append((name, args, output.clone() if isinstance(output, Tensor) else output))

        return hook

    if thread is None:  # torch.compile follows assignments, but no registration of hooks
        before = {name: module._forward_hooks for name, module in modules.items()}
        for name, module in modules.items():
            module._forward_hooks = {**before[name], -1: note(name)}
        result = model(x)
        for name, module in modules.items():
            module._forward_hooks = before[name]
        return result, seen
    with _registering:
        handles = [m.register_forward_hook(note(name)) for name, m in modules.items()]
    try:
        return model(x), seen
    finally:
        thread = 0  # hooks in a copy that somebody has made meanwhile note nothing more
        with _registering:
            for handle in handles:
                handle.remove()


def is_feature(output: Any) -> bool:
    return isinstance(output, Tensor) and output.dim() in (3, 4)


def shape_of(output: Any) -> Any:
    """For messages."""
    return tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__


class FeatureExtractor(nn.Module):
    """A network whose features are taken from outside, by the names of submodules.

    forward(x) gives Outputs. The network itself, `model`, stays usable alone and plain. It is run
    once, on zeros, to find out the shape (C, H, W) of each feature, `shapes[unit]`, and the name
    of the last linear layer, `classifier`, with `width` inputs. Args: see MultiHead.
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
        layout: str | None = None,
        output: Callable[[Any], Tensor] | None = None,
    ):
        super().__init__()
        if isinstance(units, str):
            raise UsageError(f"units must be a list of names: ['{units}']")
        self.model, self.num_classes, self.frozen = model, num_classes, frozen
        self.units = dict(units if isinstance(units, Mapping) else enumerate(units, 1))
        self.output, self.removed = output, False
        modules = {name: module for name, module in model.named_modules() if name}
        for name in (*self.units.values(), *([classifier] if classifier else [])):
            check_name("submodule", name, modules)
        if example_input is None:
            first = next((m for m in modules.values() if isinstance(m, nn.Conv2d)), None)
            example_input = torch.zeros(1, first.in_channels if first else 3, 32, 32)
        result, seen = run_once(model, modules, example_input)
        self._logits(result)  # refuses what is none
        self.layouts, self.shapes = {}, {}
        layout = layout or (common_layout(seen, example_input) if self.units else None)
        for unit, name in self.units.items():
            feature = self._feature(name, seen)
            self.layouts[unit] = layout_of(feature, example_input, name, layout)
            self.shapes[unit] = tuple(as_map(feature, self.layouts[unit]).shape[1:])
        linear = [name for name, _, _ in seen if isinstance(modules[name], nn.Linear)]
        self.classifier = classifier or (linear or [None])[-1]
        self.width = getattr(modules.get(self.classifier), "in_features", None)
        if frozen:
            model.requires_grad_(False).eval()

    def _logits(self, result: Any) -> Tensor:
        result, K = self.output(result) if self.output else result, self.num_classes
        if not isinstance(result, Tensor) or result.dim() != 2 or result.shape[1] != K:
            got = shape_of(result)
            raise UsageError(f"the network returns {got}, not logits [B, {K}]: give output=...")
        return result

    def _feature(self, name: str, seen: list[tuple]) -> Tensor:
        runs = [out for other, _, out in seen if other == name]
        if len(runs) != 1:
            times = "did not run" if not runs else f"ran {len(runs)} times"
            raise UsageError(f"the submodule '{name}' {times} in this forward pass, not once")
        if not is_feature(runs[0]):
            got = shape_of(runs[0])
            raise UsageError(f"the submodule '{name}' returns {got}, not a feature [B, C, H, W]")
        return runs[0]

    def remove(self) -> nn.Module:
        """Return the network, which is as plain as it came, and end the use of this object."""
        self.removed = True
        return self.model

    def train(self, mode: bool = True) -> FeatureExtractor:
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def forward(self, x: Any) -> Outputs:
        if self.removed:
            raise UsageError("remove() has ended the use of this object: call the network itself")
        if self.frozen and any(module.training for module in self.model.modules()):
            self.model.eval()  # somebody called train() on the network itself, or on a part of it
        names = [*self.units.values(), *([self.classifier] if self.classifier else [])]
        modules = {name: self.model.get_submodule(name) for name in names}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            result, seen = watch(self.model, modules, x)
        logits, features = self._logits(result), {}
        for unit, name in self.units.items():
            feature, layout = self._feature(name, seen), self.layouts[unit]
            dims = 3 if layout.startswith("tokens") else 4
            if feature.dim() != dims or len(feature) != len(logits):
                got = shape_of(feature)
                raise UsageError(f"the submodule '{name}' returns {got}, not a feature ({layout})")
            features[unit] = as_map(feature, layout)
        inputs = [args for other, args, _ in seen if other == self.classifier]
        return Outputs(logits, features, inputs[-1][0] if inputs else None)


class MultiHead(FeatureExtractor):
    """A network with auxiliary heads at the ends of some submodules (section 3.1, figure 1).

        student = MultiHead(torchvision.models.resnet18(num_classes=10), ["layer1", "layer2"], 10)
        logits, logits_1, logits_2 = student(images)
        torch.save(student.model.state_dict(), "student.pt")  # the plain network, without heads

    Args:
        model: any module that maps a batch to logits [B, K].
        units: names of submodules, as in `model.named_modules()`, that return a feature: a map
            [B, C, H, W] or [B, H, W, C], or tokens [B, N, C]. May be empty.
        num_classes: K.
        frozen: keep the network in eval mode and without gradients. The heads train.
        width, stride: of the heads, see AuxHead.
        example_input: what to run the network on once; by default zeros [1, C, 32, 32].
        classifier: name of the last linear layer, whose input is the penultimate feature; found
            out by default.
        layout: "channels_first" or "channels_last", where the shape of a feature does not tell.
        output: makes logits [B, K] of what the network returns, where that is something else.

    Raises:
        UsageError: a unit does not exist, is not run exactly once, or returns no feature; or the
            network does not give K logits. Also when that happens in a later call.
    """

    def __init__(
        self, model, units, num_classes, frozen=False, *, width: int = 256, stride: int = 1, **rest
    ):
        super().__init__(model, units, num_classes, frozen, **rest)
        parameter = next(model.parameters(), torch.empty(0))
        self.heads = AuxHeads(self, self.units, width, stride)
        self.heads.to(parameter.device, parameter.dtype)

    def freeze_heads(self) -> MultiHead:
        """Keep the heads as they are: in eval mode, without gradients."""
        self.heads.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> MultiHead:
        super().train(mode)
        if not any(p.requires_grad for p in self.heads.parameters()):
            self.heads.eval()
        return self

    def forward(self, x: Any, penultimate: bool = False) -> Any:
        """Logits [final, head 1, ..., head D], each [B, K].

        With `penultimate` a pair of them and the classifier's input [B, C].
        """
        outputs = super().forward(x)
        if penultimate and outputs.penultimate is None:
            raise UsageError("the network has no linear layer at its end: name its classifier")
        logits = self.heads(outputs)
        return (logits, outputs.penultimate) if penultimate else logits


def run_once(model: nn.Module, modules: Mapping[str, nn.Module], x: Any) -> tuple[Any, list]:
    """watch() in eval mode and without gradients; the modes are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters(), torch.empty(0))
    if isinstance(x, Tensor):
        x = x.to(parameter.device, parameter.dtype if x.is_floating_point() else x.dtype)
    what = f"the network cannot run on an input of shape {shape_of(x)}"
    try:
        with torch.no_grad(), explain(what, "pass an example_input that it accepts"):
            return watch(model.eval(), modules, x)
    finally:
        for module, mode in modes.items():
            module.training = mode


# --------------------------------------------------------------------------------------------------
# 3. The loss: equations 1 and 2
# --------------------------------------------------------------------------------------------------


def mhkd_loss(
    student_logits: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    labels: Tensor,
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

    Over the heads h = 0 (the final outputs), 1, ..., D with weights w_h, plus the cross-entropy
    from which the teacher's own heads learn (section 3.1):

        sum_h w_h (alpha tau^2 KL(p_T || p_S) + (1 - alpha) CE(y, z_S)) + sum_{h marked} CE(y, z_T)

    p_T and p_S are the softmax of the logits divided by tau. All terms are means over the rows
    whose label is not `ignore_index`, NaN if there is none. A class of teacher probability 0
    contributes 0 to the divergence, also where the student's is 0 (masked classes, whose logits are
    -inf). A term whose coefficient is 0 is left out, with its gradients, were it infinite or NaN.

    Args:
        student_logits: a list with a tensor [..., K] for each head, the final output first: [B, K]
            for images, [B, T, K] for a language model. Copied only if view(-1, K) is impossible.
        teacher_logits: as many tensors of the same shape. The divergence sends them no gradient.
        labels: class indices [...], int64.
        tau: temperature, > 0. This, alpha and the weights are numbers, which get no gradient.
        alpha: weight of the divergence against the student's cross-entropy, 0 to 1.
        beta: weight of every auxiliary head, used where `head_weights` is None.
        head_weights: a weight for each head; None means [1, beta, beta, ...].
        kl_weights: coefficient of tau^2 KL for each head; None means w_h alpha.
        ce_weights: coefficient of the student's cross-entropy for each head; None means
            w_h (1 - alpha).
        teacher_ce: for each head, whether the teacher's own cross-entropy is added, with weight 1;
            None marks the teacher logits that require a gradient.
        ignore_index: rows with this label count nowhere.
        return_terms: return the terms too.
        backend: "reference" is plain PyTorch; "auto" takes the fused kernel where it is installed,
            on CUDA once it has agreed with plain PyTorch in this process; "fused" insists.

    Returns:
        The loss, a scalar: float64 if any logits are, otherwise float32 (the arithmetic, too, of
        half types). With `return_terms` also a detached tensor [H, 3]: KL * tau^2, the student's
        cross-entropy and the teacher's, which is 0 where it is not marked.

    Raises:
        ValueError: lists or shapes that do not agree; tau, alpha or a weight out of range; an
            unknown backend.
        TypeError: logits that are no list or not floating point, labels that are not int64, a
            number that asks for a gradient.
        IndexError: a label that is no class (on CUDA a device assertion).
        RuntimeError: tensors on different devices; backend "fused", and there is no kernel.
        KernelCrash: the kernel failed on CUDA when it was first tried.
    """
    H = len(student_logits)
    head_weights = [1.0] + [beta] * (H - 1) if head_weights is None else head_weights
    teacher_ce = [z.requires_grad for z in teacher_logits] if teacher_ce is None else teacher_ce
    weights = {"head_weights": head_weights, "kl_weights": kl_weights, "ce_weights": ce_weights}
    _check_settings(student_logits, teacher_logits, tau, alpha, weights, teacher_ce)
    kl_weights = [w * alpha for w in head_weights] if kl_weights is None else list(kl_weights)
    ce_weights = [w * (1 - alpha) for w in head_weights] if ce_weights is None else list(ce_weights)
    fused = _use_fused(backend, labels.device, H)
    # The operator refuses what does not fit, faster; then the check here says it as it always does.
    if not fused or labels.dim() != 1 or torch.compiler.is_compiling():
        _check_tensors(student_logits, teacher_logits, labels)
    if labels.dim() != 1:
        labels = labels.reshape(-1)  # [B]
        student_logits = [z.reshape(-1, z.shape[-1]) for z in student_logits]  # [B, K] each
        teacher_logits = [z.reshape(-1, z.shape[-1]) for z in teacher_logits]
    settings = labels, tau, kl_weights, ce_weights, list(teacher_ce), ignore_index
    try:
        out = (_fused_loss if fused else _reference_loss)(student_logits, teacher_logits, *settings)
    except Exception:
        _check_tensors(student_logits, teacher_logits, labels)
        raise
    return out[:2] if return_terms else out[0]


def _reference_loss(
    student, teacher, labels, tau, kl_weights, ce_weights, teacher_ce, ignore_index
):
    """The equations in plain PyTorch: what the fused kernel has to compute. Logits are [B, K]."""
    dtypes = [z.dtype for z in (*student, *teacher)]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    counted = labels != ignore_index  # [B]
    loss = torch.zeros((), dtype=dtype, device=labels.device)
    terms = []
    coefficients = zip(kl_weights, ce_weights, map(float, teacher_ce))
    for z_s, z_t, of_head in zip(student, teacher, coefficients):
        # A NaN in a row that does not count must reach neither the loss nor the gradients.
        z_s = torch.where(counted[:, None], z_s.to(dtype), 0)  # [B, K]
        z_t = torch.where(counted[:, None], z_t.to(dtype), 0)  # [B, K]
        log_p_s = F.log_softmax(z_s / tau, dim=1)
        log_p_t = F.log_softmax(z_t.detach() / tau, dim=1)
        p_t = log_p_t.exp()
        kl = torch.where(p_t == 0, 0, p_t * (log_p_t - log_p_s)).sum()  # F.kl_div has inf - inf
        kl = kl / counted.sum() * tau**2
        ce = F.cross_entropy(z_s, labels, ignore_index=ignore_index)
        ce_t = torch.zeros_like(kl)
        if of_head[2]:
            ce_t = F.cross_entropy(z_t, labels, ignore_index=ignore_index)
        # Equation 1 for each head, equation 2 over them.
        for coefficient, term in zip(of_head, (kl, ce, ce_t)):
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
) -> Tensor:
    """tau^2 * KL(teacher || student) of logits [..., K], the mean (Hinton et al. 2015, section 2).

    Rows whose label is `ignore_index` do not count; without `labels` all do. No gradient goes to
    the teacher. For the arithmetic and the errors raised see mhkd_loss, whose first term it is.
    """
    if labels is None:  # any class: the cross-entropy weighs nothing
        labels = student_logits.new_zeros(student_logits.shape[:-1], dtype=torch.int64)
        ignore_index = -100
    settings = {"tau": tau, "alpha": 1.0, "teacher_ce": [False], "ignore_index": ignore_index}
    return mhkd_loss([student_logits], [teacher_logits], labels, backend=backend, **settings)


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


# The fused kernel of csrc/, if it is installed, and whether to believe it.

BACKENDS = ("auto", "reference", "fused")
MAX_FUSED_HEADS = 16  # kMaxHeads in csrc/mhkd_loss.h
INTERFACE = 3  # kInterface in csrc/mhkd_loss.cpp
TO_BE_CHECKED = ("cuda",)  # devices on which "auto" compares before it trusts

_fused_is_there: bool | None = None  # not looked for yet
_fused_loss: Any = None  # the operator: a look into torch.ops takes longer than a short batch
_found_wrong: dict[torch.device, str] = {}  # what check_kernel has found, "" if nothing


class KernelCrash(RuntimeError):
    """The fused kernel failed on CUDA; after that this process cannot use the GPU any more."""


def _load_fused() -> bool:
    """Whether the kernel is installed. The first call loads it, which registers torch.ops.mhkd."""
    global _fused_is_there, _fused_loss
    if _fused_is_there is not None:
        return _fused_is_there
    problem, operators = "", torch.ops.mhkd
    spec = importlib.util.find_spec("mhkd_fused")  # a library, no Python module: never imported
    if not hasattr(operators, "loss") and spec is not None and spec.origin is not None:
        try:
            torch.ops.load_library(spec.origin)
        except OSError as error:  # built for another PyTorch
            problem = f"cannot be loaded ({error})"
    if hasattr(operators, "loss"):  # by now, or another copy of this file has loaded it
        there = operators.interface() if hasattr(operators, "interface") else 1
        if there == INTERFACE:
            _fused_loss = operators.loss.default
        else:
            problem = f"has interface {there}, mhkd.py needs {INTERFACE} (install both anew)"
    if problem:
        warnings.warn(f"the fused kernel {problem}: plain PyTorch is used", stacklevel=2)
    _fused_is_there = _fused_loss is not None
    return _fused_is_there


def loss_backend() -> str:
    """What mhkd_loss(backend="auto") takes, for example "fused (CPU avx2, CUDA sm_90)"."""
    if not _load_fused():
        return "reference (fused kernel not installed)"
    parts = [torch.ops.mhkd.cpu_capability()]
    if hasattr(torch.ops.mhkd, "cuda_architectures"):
        parts.append(torch.ops.mhkd.cuda_architectures())
    parts += [f"not on {device}: {wrong}" for device, wrong in _found_wrong.items() if wrong]
    return f"fused ({', '.join(parts)})"


def check_kernel(device: torch.device | str) -> str:
    """What a comparison of the fused kernel with plain PyTorch finds wrong, "" if nothing.

    It takes some milliseconds: small random logits of each dtype, loss, terms and gradients.
    Raises KernelCrash after a CUDA error.
    """
    device = torch.device(device)
    if missing := _missing_kernel(device.type):
        return missing

    def outputs(loss_of, z, *settings):
        leaves = [leaf.detach().requires_grad_() for leaf in z]
        loss, terms, *_ = loss_of(leaves[:2], leaves[2:], *settings)
        gradients = torch.autograd.grad(loss, leaves[:2] + leaves[3:])
        return [x.detach().double().cpu() for x in (loss, terms, *gradients)]

    generator = torch.Generator().manual_seed(0)
    cases = [(torch.float32, 40, 4.0), (torch.bfloat16, 40, 4.0), (torch.float16, 2050, 4.0)]
    cases += [(torch.float32, 2051, 2.5), (torch.bfloat16, 9000, 1.0), (torch.float64, 1100, 4.0)]
    autocast, inference = torch.autocast(device.type, enabled=False), torch.inference_mode(False)
    with autocast, inference, torch.enable_grad():
        for dtype, K, tau in cases:
            # An odd stride; a row ignored and NaN; a class masked on both sides; one head marked.
            z = 3 * torch.randn(4, 6, K + 1, generator=generator)
            z[:, 0], z[:, 1, 1] = math.nan, -math.inf
            z = z.to(device, dtype)[..., :K]
            labels = torch.tensor([-100, 0, K - 1, 2, 3, K // 2], device=device)
            settings = labels, tau, [0.9, 0.45], [0.1, 0.05], [False, True], -100
            try:
                found = outputs(_fused_loss, z, *settings)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                if "CUDA error" not in reason or "no kernel image" in reason:  # it can go on
                    return reason
                raise KernelCrash(
                    f"the fused kernel failed on {device} ({reason}), which ends the use of the "
                    "GPU in this process: try again with --backend reference"
                ) from error
            allowed = 2 * torch.finfo(dtype).eps + 1e-5  # of the largest number
            for x, y in zip(found, outputs(_reference_loss, z.double(), *settings)):
                if not (x - y).abs().max() <= allowed * y.abs().max():
                    return f"the fused kernel differs from plain PyTorch on {dtype} [6, {K}]"
    return ""


def _missing_kernel(device_type: str) -> str:
    if not _load_fused():
        return "the fused kernel is not installed"
    if device_type not in ("cpu", "cuda", "meta"):
        return f"there is no fused kernel for {device_type} tensors"
    if device_type == "cuda" and not hasattr(torch.ops.mhkd, "cuda_architectures"):
        return "the fused kernel was built without CUDA"
    return ""


def _trusted(device: torch.device) -> bool:
    """Whether the kernel has agreed with plain PyTorch on this device; the first call compares."""
    if device not in _found_wrong:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False  # a graph cannot record a comparison: this time plain PyTorch, unchecked
        _found_wrong[device] = check_kernel(device)
        if wrong := _found_wrong[device]:
            warnings.warn(f"mhkd_loss: {wrong}: plain PyTorch is used", stacklevel=4)
    return not _found_wrong[device]


# torch.compile calls these and takes their answers for constants. This is what
# torch.compiler.assume_constant_result sets, which would import the whole compiler here.
for _function in (_load_fused, _missing_kernel, _trusted):
    _function._dynamo_marked_constant = True


def _use_fused(backend: str, device: torch.device, heads: int) -> bool:
    """Whether the kernel computes this call; for "fused" an error that says why it does not."""
    if backend not in BACKENDS:
        backends = ", ".join(BACKENDS)
        raise ValueError(f"mhkd_loss: backend must be one of {backends}, not {backend!r}")
    if backend == "reference" or (backend == "auto" and heads > MAX_FUSED_HEADS):
        return False
    missing = _missing_kernel(device.type)
    if backend == "auto":
        return not missing and (device.type not in TO_BE_CHECKED or _trusted(device))
    if missing:
        raise RuntimeError(f'mhkd_loss: {missing}: use backend="auto" or backend="reference"')
    return True


# --------------------------------------------------------------------------------------------------
# 4. Methods: what each adds to both networks, and its named loss terms
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Option:
    """A setting: its default (None: the recipe's), help, parser and rule, (a test, its words)."""

    default: Any
    help: str
    parse: Callable[[str], Any] = float
    rule: tuple[Callable[[Any], bool], str] | None = None


# Numbers that float32 can hold, too.
POSITIVE = (lambda v: 0 < v < 3e38, "a number above 0")
NOT_NEGATIVE = (lambda v: 0 <= v < 3e38, "a number not below 0")
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
    """What a method sees of a training step."""

    student: Outputs
    teacher: Outputs | None
    labels: Tensor  # [B]
    indices: Tensor  # [B], places in the training set
    figures: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # scalars for the log


class Method(nn.Module):
    """A way to train the student. Register a subclass in METHODS and Config(method=...) knows it.

    The loss is a sum of named terms: those on the final outputs, which methods joined by `+` take
    from one of them, and each method's own. Few need more than `units` and `own_terms`; the values
    of the options that a class declares are in `self.options`. See docs/methods.md.
    """

    options: dict[str, Option] = {}  # of its own terms
    final_options: dict[str, Option] = {}  # of its terms on the final outputs
    rank = 0  # of joined methods the one of the highest rank gives the terms on the final outputs
    needs_teacher = True
    on_teacher = False  # it trains something on the frozen teacher; there is no student

    def __init__(self, config: Config, student: FeatureExtractor, teacher: Any, data: Data):
        """student, teacher: FeatureExtractors (the teacher None without one), for their shapes."""
        super().__init__()
        self.config, self.options = config, types.SimpleNamespace(**config.options)

    @classmethod
    def units(cls, config: Config, network: str) -> Sequence[int]:
        """Units, counted from 1, whose features it needs, of the "student" or the "teacher"."""
        return ()

    @classmethod
    def adapt(cls, student: nn.Module, teacher: Any, num_classes: int, example: Tensor) -> None:
        """Change the plain student for its training; `plain` takes that back."""

    @classmethod
    def plain(cls, student: nn.Module) -> nn.Module:
        """The plain network that computes what the adapted student does."""
        return student

    def prepare(self, teacher: FeatureExtractor | None, batches: Callable[[], Iterator]) -> None:
        """Called once, before the first step; batches() gives images, labels, indices."""

    def final_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Loss terms on the final outputs: the cross-entropy, unless a method has others."""
        return {"ce": F.cross_entropy(batch.student.logits, batch.labels)}

    def own_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Loss terms that the method adds."""
        return {}

    def saved(self) -> dict[str, Any]:
        """What student.pt holds beside the plain network."""
        return {}

    def backward(self, terms: dict, student: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Set the gradients of the student's parameters and of all others that train."""
        sum(terms.values()).backward()


class CrossEntropy(Method):
    """The network alone: the baseline, and the way teachers are trained."""

    needs_teacher = False


class Distillation(Method):
    """Knowledge distillation (Hinton et al. 2015): equation 1 on the final outputs."""

    rank = 1
    final_options = {
        "tau": Option(4.0, "temperature", rule=POSITIVE),
        "alpha": Option(0.9, "weight of the divergence against the cross-entropy", rule=FRACTION),
        "gamma": Option(
            None, "weight of the final cross-entropy: 1 - alpha", rule=NOT_NEGATIVE
        ),
        "kd_weight": Option(
            None, "weight of the final divergence, tau^2 KL: alpha", rule=NOT_NEGATIVE
        ),
    }  # fmt: skip

    def final_weights(self) -> tuple[float, float]:
        """Weights of the final outputs' tau^2 KL and cross-entropy."""
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
        None, "units that carry a head, 1,2,3: all", integers,
        (lambda v: v and len({*v}) == len(v) and min(v) > 0, "different units: 1,2,3"),
    ),
    "head_width": Option(None, "kernels of the heads: 256; digits 64", int, COUNT),
    "head_stride": Option(None, "stride of the heads: 1; digits 2", int, COUNT),
}  # fmt: skip
TEACHER_HEADS = (
    "what the student's heads learn from: scratch, the teacher's heads, which learn at the same "
    "time; pretrained, the teacher's heads, trained before and frozen; logits, the teacher's "
    "final logits"
)


class MultiHeadDistillation(Distillation):
    """Equation 2 over the final outputs and the auxiliary heads (Wang et al. 2020)."""

    rank = 2
    final_options = {
        **Distillation.final_options,
        "beta": Option(None, "weight of the auxiliary heads: 0.5; svhn 5", rule=NOT_NEGATIVE),
        "head_ce": Option(
            None, "weight of the cross-entropy of the student's heads, times beta: 1 - alpha",
            rule=NOT_NEGATIVE,
        ),
        **HEAD_OPTIONS,
        "teacher_heads": Option(
            "scratch", TEACHER_HEADS, str, one_of("scratch", "pretrained", "logits")
        ),
        "teacher_heads_epochs": Option(
            None, "epochs for the pretrained heads: a third of --epochs", int, COUNT
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

    def train(self, mode: bool = True) -> MultiHeadDistillation:
        super().train(mode)
        if self.options.teacher_heads == "pretrained":
            self.teacher_heads.eval()
        return self

    def final_terms(self, batch: Batch) -> dict[str, Tensor]:
        o, D = self.options, len(self.student_heads)
        with autocast(self.config, batch.labels.device):
            student = self.student_heads(batch.student)
            if o.teacher_heads == "logits":
                teacher = [batch.teacher.logits] * (1 + D)
            else:
                teacher = self.teacher_heads(batch.teacher)
        kl, ce = self.final_weights()
        head_ce = 1 - o.alpha if o.head_ce is None else o.head_ce
        # The teacher's heads learn from their cross-entropy alone (section 3.1).
        loss, terms = mhkd_loss(
            student, teacher, batch.labels, tau=o.tau,
            kl_weights=[kl] + [o.beta * o.alpha] * D, ce_weights=[ce] + [o.beta * head_ce] * D,
            teacher_ce=[False] + [o.teacher_heads == "scratch"] * D,
            return_terms=True, backend=self.config.backend,
        )  # fmt: skip
        for unit, (kl, ce, ce_teacher) in zip((0, *o.units), terms):
            batch.figures |= {f"kl_{unit}": kl, f"ce_{unit}": ce}
            if unit and o.teacher_heads == "scratch":
                batch.figures[f"ce_teacher_{unit}"] = ce_teacher
        return {"mhkd": loss}


class TeacherHeads(Method):
    """Auxiliary heads on the frozen teacher, by cross-entropy: `--teacher-heads pretrained`.

    A run of this method leaves the heads in its student.pt, beside the unchanged teacher.
    """

    rank = -1  # joined with nothing
    on_teacher = True
    final_options = HEAD_OPTIONS

    def __init__(self, config: Config, student: FeatureExtractor, teacher: Any, data: Data):
        super().__init__(config, student, teacher, data)
        o = self.options
        self.heads = AuxHeads(student, o.units, o.head_width, o.head_stride)

    @classmethod
    def units(cls, config: Config, network: str) -> Sequence[int]:
        return config.options["units"]

    def final_terms(self, batch: Batch) -> dict[str, Tensor]:
        with autocast(self.config, batch.labels.device):
            _, *logits = self.heads(batch.student)
        terms = {}
        for unit, z in zip(self.options.units, logits):
            terms[f"ce_{unit}"] = F.cross_entropy(z.float(), batch.labels)
            hits = z.detach().argmax(dim=1) == batch.labels
            batch.figures[f"train_accuracy_{unit}"] = 100 * hits.float().mean()
        return terms

    def saved(self) -> dict[str, Any]:
        return {"heads": self.heads.state_dict()}


METHODS: dict[str, type[Method]] = {
    "ce": CrossEntropy,
    "kd": Distillation,
    "mhkd": MultiHeadDistillation,
    "heads": TeacherHeads,
}
BASELINES = ("fitnet", "cc", "rkd", "crd", "lsh", "dhkd")  # in mhkd_baselines.py


def find_methods(method: str) -> dict[str, type[Method]]:
    """The methods that `method` joins by `+`, by ascending rank, of one rank by name."""
    names = method.split("+")
    for name in names:
        if name in BASELINES and name not in METHODS:
            what = f"--method {name} is in mhkd_baselines.py"
            with explain(what, "copy it beside mhkd.py", ModuleNotFoundError):
                importlib.import_module("mhkd_baselines")  # which registers them
        check_name("method", name, dict.fromkeys((*METHODS, *BASELINES)))
    if len({*names}) < len(names):
        raise UsageError(f"--method {method} names a method twice")
    *first, last = names = sorted(names, key=lambda name: (METHODS[name].rank, name))
    for name in first:
        if METHODS[name].own_terms is Method.own_terms:
            raise UsageError(f"--method {method}: {name} adds nothing to {last}, so leave it out")
    special = [name for name in names if METHODS[name].backward is not Method.backward]
    if len(special) > 1:
        raise UsageError(f"--method {method}: only one of {' and '.join(special)} can be there")
    return {name: METHODS[name] for name in names}


def method_options(methods: Mapping[str, type[Method]]) -> dict[str, Option]:
    """The options of joined methods: those of their own terms, and of the last's final terms."""
    *_, last = methods.values()
    own = {name: option for m in methods.values() for name, option in m.options.items()}
    return {**last.final_options, **own}


# --------------------------------------------------------------------------------------------------
# 5. Training
# --------------------------------------------------------------------------------------------------


class Distiller(nn.Module):
    """Student, frozen teacher and methods as one module: what a training step runs."""

    def __init__(
        self, config: Config, data: Data, teacher: nn.Module | None, heads: dict | None = None
    ):
        """teacher: its network; heads: the state dict of its pretrained heads."""
        super().__init__()
        K, methods = len(data.classes), find_methods(config.method)
        x = torch.zeros(1, 3, config.image_size, config.image_size)
        self.config = config
        # The student comes first: its initial weights depend on the seed alone, not on the method.
        torch.manual_seed(config.seed)
        on_teacher = any(method.on_teacher for method in methods.values())
        if on_teacher:
            student, teacher = teacher, None
        else:
            student = build_model(config.student, K, config.student_init, config.image_size)
        self.initial_sha256 = sha256_of_state(student)
        networks = {"student": student} | ({"teacher": teacher} if teacher else {})
        for network in networks.values():
            network.to(memory_format=memory_format(data.device))
        for method in methods.values():
            method.adapt(student, teacher, K, x)
        self.units, extractors = {}, {}
        for name, network in networks.items():
            needed = sorted({u for method in methods.values() for u in method.units(config, name)})
            names = dict(enumerate(find_units(config, name, network, x), 1)) if needed else {}
            if needed and needed[-1] not in names:
                raise UsageError(f"the {name} has no unit {needed[-1]}: it has {len(names)}")
            self.units[name] = {unit: names[unit] for unit in needed}
            frozen = name == "teacher" or on_teacher
            extractors[name] = FeatureExtractor(
                network, self.units[name], K, frozen, example_input=x
            )
        self.student = extractors["student"]
        self.__dict__["teacher"] = extractors.get("teacher")  # not in the state dict: it is frozen
        arguments = config, self.student, self.teacher, data
        self.methods = nn.ModuleList(method(*arguments) for method in methods.values())
        if heads:
            self.methods[-1].teacher_heads.load_state_dict(heads)
        self.to(data.device, memory_format=memory_format(data.device))

    def forward(self, images: Tensor, labels: Tensor, indices: Tensor) -> tuple[dict, dict]:
        """Images [B, 3, S, S], labels [B], places in the training set [B].

        Returns the loss's named terms, and figures for the log.
        """
        student = self.observe(self.student, images)
        teacher = self.observe(self.teacher, images) if self.teacher else None
        batch = Batch(student, teacher, labels, indices)
        terms = self.methods[-1].final_terms(batch)
        for method in self.methods:
            terms |= method.own_terms(batch)
        hits = student.logits.argmax(dim=1) == labels
        figures = {"loss": sum(terms.values()), **terms, **batch.figures}
        figures["train_accuracy"] = 100 * hits.float().mean()
        return terms, {name: figure.detach() for name, figure in figures.items()}

    def observe(self, network: FeatureExtractor, images: Tensor) -> Outputs:
        """A network's outputs, computed in the precision of the run, for losses in float32."""
        with autocast(self.config, images.device):
            outputs = network(images)
        return outputs.float() if self.config.precision == "bfloat16" else outputs

    def backward(self, terms: dict[str, Tensor]) -> None:
        student = [p for p in self.student.parameters() if p.requires_grad]
        others = [p for p in self.methods.parameters() if p.requires_grad]
        special = [m for m in self.methods if type(m).backward is not Method.backward]
        (special or self.methods)[0].backward(terms, student, others)

    def plain_student(self) -> nn.Module:
        student = copy.deepcopy(self.student.model).to("cpu")
        for method in self.methods:
            student = method.plain(student)
        return student


def train(config: Config, data: Data | None = None) -> dict[str, Any]:
    """Train the student that the configuration describes, and its teacher first where it must be.

    A finished run is not repeated; an interrupted one goes on from its last finished epoch. Under
    `torchrun` every process takes its share of each batch, and the first one writes.

    Returns:
        The content of result.json. "accuracy", in percent of the test images, is that of the last
        epoch's student, saved without heads and loaded into the plain network.

    Raises:
        UsageError: something is wrong that the user can mend; nothing has been overwritten.
    """
    with surroundings(config) as device:
        data = data or load_data(config, device)
        teacher, path, facts = find_teacher(config, data)  # calls this function to train one
        heads, facts["teacher_heads_sha256"] = find_heads(config, data, path)  # likewise
        record = record_of(config, data, facts)
        folder = Path(config.out) / record["name"]
        with locked(folder, f"another run is at work on '{folder}'"):
            wait_for_all()
            if finished := find_result(folder, record):
                return finished
            distiller = Distiller(config, data, teacher, heads)
            record["units"], record["init_sha256"] = distiller.units, distiller.initial_sha256
            if config.compile:
                for network in (distiller.student, distiller.teacher):
                    network and network.compile(dynamic=False)
            parameters = [p for p in distiller.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(
                parameters, config.lr, config.momentum, weight_decay=config.weight_decay
            )
            log = restore(folder, record, distiller, optimizer)
            if not log:
                for method in distiller.methods:
                    torch.manual_seed(seed_of(config.seed, 0, rank()))
                    method.prepare(distiller.teacher, lambda: epoch_batches(data, config, 1))
            board = tensorboard(folder, log) if config.tensorboard and is_main() else None
            N = len(data.train)
            bar = progress_bar(config.epochs * N, config.student, len(log) * N)
            for epoch in range(len(log) + 1, config.epochs + 1):
                started = time.perf_counter()
                torch.manual_seed(seed_of(config.seed, epoch, rank()))  # of dropout, CRD's draws
                # Epochs 1 to s of a milestone s keep the rate; s + 1 is the first with the lower.
                lr = config.lr * config.lr_decay ** sum(epoch > step for step in config.lr_steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                distiller.train()
                steps = []  # for each its figures, on the device: the host waits once an epoch
                for images, labels, indices in epoch_batches(data, config, epoch):
                    terms, figures = distiller(images, labels, indices)
                    optimizer.zero_grad()
                    distiller.backward(terms)
                    average_gradients(parameters)
                    optimizer.step()
                    steps.append(torch.stack(list(figures.values())))
                    if device.type == "cpu" and world_size() == 1 and not steps[-1][0].isfinite():
                        break
                    bar.update(len(labels) * world_size())
                means = means_of(steps, figures, parameters, epoch)
                entry = {"epoch": epoch, "lr": lr, **means}
                for name in ("test", "val") if len(data.val) else ("test",):
                    accuracy = evaluate(distiller.student.model, data, getattr(data, name))
                    entry[f"{name}_accuracy"] = accuracy["accuracy"]
                seconds = time.perf_counter() - started
                entry["images_per_second"] = round(len(data.train) / seconds, 1)
                entry["seconds"] = round(seconds, 3)
                log.append(entry)
                save(folder, record, distiller, optimizer, log)
                board and board(entry)
                say(line_of(config, entry))
            return finish(folder, record, config, data, distiller, log)


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """PyTorch's autocast to bfloat16 where --precision asks for it, for networks and heads."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def memory_format(device: torch.device) -> torch.memory_format:
    """Channels-last on the CPU, where a step of most pairs is 5 to 10 % faster with it."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def seed_of(*parts: Any) -> int:
    """A seed for each seed, epoch and process: no generator's state has to be kept."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 2


def means_of(
    steps: list[Tensor], names: Iterable[str], parameters: list[Tensor], epoch: int
) -> dict[str, float]:
    """Means over an epoch's steps and the processes, which must be finite, as the weights."""
    figures = average_over_processes(torch.stack(steps)).cpu().double()  # [steps, figures]
    bad = (~figures[:, 0].isfinite()).nonzero()
    if len(bad) or not all(p.isfinite().all() for p in parameters):
        where = f"step {bad[0].item() + 1}" if len(bad) else "after its last step"
        raise UsageError(f"the loss is not finite in epoch {epoch}, {where}: try a lower --lr")
    return dict(zip(names, figures.mean(dim=0).tolist()))


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, part: Tensor | None = None) -> dict[str, Any]:
    """Accuracies in percent on the test images, or a part of data: top-1, top-5, of each class.

    A class without images there has none. The model's mode is left as it was.
    """
    part = data.test if part is None else part
    mode, K = model.training, len(data.classes)
    model.eval()
    batches = part.split(max(10, 500 * 32**2 // data.size**2))
    best = [model(data.middle(batch)).topk(min(5, K), dim=1).indices for batch in batches]
    model.train(mode)
    labels = data.labels[part]
    hit = torch.cat(best) == labels[:, None]  # [N, 5]
    right, counts = (torch.bincount(y, minlength=K) for y in (labels[hit[:, 0]], labels))
    pairs = zip(data.classes, right.tolist(), counts.tolist())
    of_class = {name: 100 * r / n for name, r, n in pairs if n}
    return {
        "accuracy": 100 * hit[:, 0].sum().item() / len(part),
        "top5_accuracy": 100 * hit.sum().item() / len(part) if K > 5 else None,
        "mean_class_accuracy": sum(of_class.values()) / len(of_class),
        "class_accuracy": of_class,
    }


def find_teacher(config: Config, data: Data) -> tuple[nn.Module | None, Any, dict[str, Any]]:
    """The teacher, the file that it is loaded from, and its part of the record.

    Without `teacher_weights` a run of its own trains it first.
    """
    if not config.teacher:
        return None, None, {"teacher_sha256": None, "teacher_accuracy": None}
    model = build_model(config.teacher, len(data.classes), "random", config.image_size)
    if not (path := config.teacher_weights):
        Distiller(config, data, model)  # refuses at once what would fail after the teacher's run
        say(f"teacher {config.teacher}: without --teacher-weights its own run comes first")
        path = student_of(config.of_teacher(), data)
    load_weights(model, path).to(data.device)
    accuracy = evaluate(model, data)["accuracy"]
    say(f"teacher {config.teacher}: {accuracy:.2f} % on the test images")
    return model, path, {"teacher_sha256": sha256_of(path), "teacher_accuracy": accuracy}


def student_of(config: Config, data: Data) -> Path:
    """The student.pt of a run, which is trained where it has not been."""
    return Path(config.out) / train(config, data)["name"] / "student.pt"


def find_heads(config: Config, data: Data, teacher: Any) -> tuple[dict | None, str | None]:
    """The teacher's pretrained heads, from a run of their own, and the SHA-256 of its file.

    teacher: the file with its weights.
    """
    if config.options.get("teacher_heads") != "pretrained":
        return None, None
    path = student_of(config.of_heads(teacher), data)
    return load_file(path)["heads"], sha256_of(path)


def record_of(config: Config, data: Data, of_teacher: dict[str, Any]) -> dict[str, Any]:
    """What a run is: its configuration, in what that differs from the recipe, data, teacher."""
    differs = config.differs()
    if world_size() > 1:  # batch norm sees each process's share alone
        differs["processes"] = world_size()
    if config.teacher_weights:
        differs["teacher_weights"] = of_teacher["teacher_sha256"][:8]
    return {
        "name": name_of(config, differs, data.sha256),
        "config": {**config.recorded(), "processes": world_size()},
        "differs": differs,
        **of_teacher,
        "data_sha256": data.sha256,
        "normalisation": {"mean": data.mean, "std": data.std},
    }


def name_of(config: Config, differs: Mapping[str, Any], data_sha256: str = "") -> str:
    """The name of the folder of a run."""
    # Two folders of images are two data sets.
    dataset = config.dataset + (f"_{data_sha256[:8]}" if config.dataset == "folder" else "")
    who = [dataset, config.teacher, config.student, config.method]
    parts = [in_file_name(part) for part in who if part] + [f"seed{config.seed}"]
    parts += [f"{key}={in_file_name(value)}" for key, value in differs.items()]
    name = "-".join(parts)
    if len(name) > 200:  # file systems end at 255
        name = f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name


def in_file_name(value: Any) -> str:
    """A value as a part of a file name."""
    text = "+".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    return "".join(c if c.isalnum() or c in "._+" else "_" for c in text)


def find_result(folder: Path, record: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a run that has finished; refuses a folder that holds another run."""
    for name in ("config.json", "result.json"):
        if before := read_json(folder / name, "config", "teacher_sha256", "data_sha256"):
            refuse_another(folder, before, record)
    student = folder / "student.pt"
    if not before or not student.is_file() or sha256_of(student) != before.get("student_sha256"):
        return None
    log = folder / "log.jsonl"
    if not log.is_file() or sha256_of(log) != before.get("log_sha256", sha256_of(log)):
        raise UsageError(f"'{log}' is not that of the result beside it: move its folder away")
    say(f"finished before: '{folder}'")
    return before


def refuse_another(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a folder whose record says that it is of another configuration."""

    def facts(record: dict[str, Any]) -> dict[str, Any]:
        config = {**record["config"], **record["config"].get("options", {}), "options": None}
        hashes = ("teacher_sha256", "teacher_heads_sha256", "data_sha256")
        return config | {key: record.get(key) for key in hashes}

    old, new = facts(before), facts(now)
    pairs = {k: (old.get(k, "missing"), new.get(k, "missing")) for k in {**old, **new}}
    differ = [f"{k} {a} there, {b} now" for k, (a, b) in pairs.items() if a != b]
    if differ:
        what = f"'{folder}' was written with another configuration ({'; '.join(differ)})"
        raise UsageError(f"{what}: move it away, or give another --out")


CHECKPOINTS = ("checkpoint.pt", "checkpoint-before.pt")  # a damaged one costs an epoch, not a run


def save(folder: Path, record: dict, distiller: Distiller, optimizer, log: list[dict]) -> None:
    """The state after an epoch. checkpoint.pt is what counts; log.jsonl is written from it."""
    if not is_main():
        return
    state = {"epoch": len(log), "distiller": distiller.state_dict()}
    state |= {"optimizer": optimizer.state_dict()}
    state |= {"record": json.dumps(record), "log": json.dumps(log)}
    last, before = (folder / name for name in CHECKPOINTS)
    write_atomically(last, lambda file: torch.save(state, file), keep=before)
    write_log(folder, log)


def write_log(folder: Path, log: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    write_atomically(folder / "log.jsonl", lambda file: file.write(lines.encode()))


def restore(folder: Path, record: dict, distiller: Distiller, optimizer) -> list[dict[str, Any]]:
    """Load the last checkpoint, if there is one. Returns the log: an entry for each epoch.

    Writes config.json, with every surroundings that the run has been in.
    """
    paths = [folder / name for name in CHECKPOINTS if (folder / name).is_file()]
    log: list[dict[str, Any]] = []
    if paths:
        hint = "remove it" + (", and the one before is taken" if paths[1:] else "")
        with explain(f"'{paths[0]}' cannot be used", hint):
            state = load_file(paths[0])
            before, log = json.loads(state["record"]), json.loads(state["log"])
        refuse_another(folder, before, record)
        with explain(f"'{paths[0]}' cannot be used", hint):
            distiller.load_state_dict(state["distiller"])
            optimizer.load_state_dict(state["optimizer"])
    config, device = distiller.config, next(distiller.student.parameters()).device
    here = environment(config, device)
    past = (read_json(folder / "config.json") or {}).get("environments") or [here]
    changes = [f"{k} {past[-1].get(k)} -> {v}" for k, v in here.items() if past[-1].get(k) != v]
    if changes:
        say(f"note: this run goes on in other surroundings: {', '.join(changes)}")
    record["environments"] = [*past, here] if changes else past
    if is_main():
        write_json(folder / "config.json", record)
        if log:
            write_log(folder, log)
    state = f"goes on after epoch {len(log)} of" if log else "begins:"
    say(f"'{folder}' {state} {config.epochs} epochs on {device}")
    return log


def line_of(config: Config, entry: dict[str, Any]) -> str:
    left = datetime.timedelta(seconds=int((config.epochs - entry["epoch"]) * entry["seconds"]))
    return (
        f"{config.student} {config.method} epoch {entry['epoch']}/{config.epochs}  "
        f"lr {entry['lr']:.3g}  loss {entry['loss']:.4f}  "
        f"train {entry['train_accuracy']:.2f} %  test {entry['test_accuracy']:.2f} %  "
        f"{entry['images_per_second']:.0f} images/s  {left} left"
    )


def tensorboard(folder: Path, log: list[dict[str, Any]]) -> Callable[[dict], None]:
    """A function that shows an entry of the log there; what is in the log is shown anew."""
    tool = import_optional("torch.utils.tensorboard", "tensorboard", "--tensorboard")
    writer = tool.SummaryWriter(folder, purge_step=1)

    def show(*entries: dict[str, Any]) -> None:
        for entry in entries:
            for name, value in entry.items():
                writer.add_scalar(name, value, entry["epoch"])
        writer.flush()

    show(*log)
    return show


def finish(folder, record, config, data, distiller, log) -> dict[str, Any]:
    """Save the plain student, load it again, and record the accuracy of that."""
    chosen = "val_accuracy" if len(data.val) else "test_accuracy"
    best = max(log, key=lambda entry: entry[chosen])
    if is_main():
        student = distiller.plain_student()
        state = {name: tensor.contiguous() for name, tensor in student.state_dict().items()}
        content = {"model": state, "name": config.student, "classes": data.classes}
        content |= {"image_size": config.image_size, "mean": [*data.mean], "std": [*data.std]}
        for method in distiller.methods:
            content |= method.saved()
        write_atomically(folder / "student.pt", lambda file: torch.save(content, file))
        deployed = load_student(folder / "student.pt").model.to(data.device)
        result = {
            **record,
            **evaluate(deployed, data),
            "accuracy_is": "of the last epoch's student, saved and loaded into the plain network",
            "best_accuracy": best["test_accuracy"],
            "best_epoch": best["epoch"],
            "best_is_by": chosen,
            "parameters": sum(p.numel() for p in student.parameters()),
            "epochs": len(log),
            "seconds": round(sum(entry["seconds"] for entry in log), 3),
            "student_sha256": sha256_of(folder / "student.pt"),
            "log_sha256": sha256_of(folder / "log.jsonl"),
        }
        write_json(folder / "result.json", result)
        if not config.keep_checkpoint:
            for name in CHECKPOINTS:
                (folder / name).unlink(missing_ok=True)
    wait_for_all()
    result = read_json(folder / "result.json")
    best = f"best: {result['best_accuracy']:.2f} % after epoch {result['best_epoch']}"
    say(f"'{folder / 'student.pt'}': {result['accuracy']:.2f} % after the last epoch ({best})")
    return result


# --------------------------------------------------------------------------------------------------
# 6. Networks by name, from elsewhere too, and the saved student
# --------------------------------------------------------------------------------------------------


def import_optional(module: str, package: str, purpose: str) -> Any:
    """Import an optional dependency, or say in one sentence how to get it."""
    # Also of what a torchvision that was built for another PyTorch raises.
    with explain(f"{purpose} needs {package}", f"pip install {package}"):
        return importlib.import_module(module)


def build_model(
    name: str, num_classes: int, init: str = "random", image_size: int | None = None
) -> nn.Module:
    """A network that maps images [B, 3, S, S] to logits [B, num_classes].

    Args:
        name: of MODELS, for S >= 16; torchvision:NAME; timm:NAME; or path/to/file.py:FUNCTION,
            which is called with num_classes.
        init: "random"; "pretrained", the library's weights; or file:PATH, a state dict. The
            classifier is a new one where the number of classes differs.
        image_size: S, for networks that must know it, such as vision transformers.

    Raises:
        UsageError: no such network (with the near names); the library or the weights are missing.
    """
    library = name.partition(":")[0] in ("torchvision", "timm")
    if name in MODELS:
        kind, variant = MODELS[name]
        model = kind(num_classes, **variant)
    elif library:
        model = from_library(name, image_size, num_classes=num_classes)
    elif ".py:" in name:
        model = from_file(name, num_classes)
    else:
        check_name("network", name, MODELS)
    if init == "random":
        return model
    if init.startswith("file:"):
        state = read_state(init[5:], model.state_dict())
    elif library:
        *_, where = library_weights(name) or [None]
        hint = f"put {where}, or give file:PATH instead of pretrained"
        with explain(f"the pretrained weights of {name} cannot be had", hint):
            state = from_library(name, image_size, pretrained=True).state_dict()
    else:
        raise UsageError(f"there are no pretrained weights for {name}: give random or file:PATH")
    load_state(model, state, f"the weights '{init}' do not fit {name}", num_classes)
    return model


def from_library(name: str, image_size: int | None, **keywords: Any) -> nn.Module:
    """A network of torchvision or timm; keywords: num_classes, or pretrained."""
    library, _, rest = name.partition(":")
    if library == "timm":
        timm = import_optional("timm", "timm", f"the network {name}")
        check_name("network timm:", rest.split(".")[0], timm.list_models())
        try:  # only those that must know it take an image size
            return timm.create_model(rest, img_size=image_size, **keywords)
        except TypeError:
            return timm.create_model(rest, **keywords)
    models = import_optional("torchvision.models", "torchvision", f"the network {name}")
    check_name("network torchvision:", rest, models.list_models(module=models))
    if keywords.pop("pretrained", False):
        return models.get_model(rest, weights="DEFAULT")
    if rest.startswith("vit") and image_size:
        keywords["image_size"] = image_size
    if rest not in ("googlenet", "inception_v3"):
        return models.get_model(rest, weights=None, **keywords)
    model = models.get_model(rest, weights=None, init_weights=True, **keywords)
    # No classifiers of their own at the sides.
    model.aux_logits, model.AuxLogits, model.aux1, model.aux2 = False, None, None, None
    return model


def from_file(name: str, num_classes: int) -> nn.Module:
    """The module that FUNCTION of path/to/file.py:FUNCTION returns for num_classes."""
    path, _, function = name.rpartition(":")
    with explain(f"'{name}' does not work", "it must build a network for num_classes"):
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = getattr(module, function)(num_classes)
    if not isinstance(model, nn.Module):
        raise UsageError(f"'{name}' returns {type(model).__name__}, not a module")
    return model


def library_weights(name: str) -> tuple[tuple[float, ...], tuple[float, ...], str] | None:
    """Of a library's pretrained weights: mean and std of the channels, where to put their file."""
    library, _, rest = name.partition(":")
    if library == "torchvision":
        models = import_optional("torchvision.models", "torchvision", f"the network {name}")
        weights = models.get_model_weights(rest).DEFAULT
        place = Path(torch.hub.get_dir()) / "checkpoints"
        facts, where = weights.transforms(), f"{Path(weights.url).name} into '{place}'"
    elif library == "timm":
        timm = import_optional("timm", "timm", f"the network {name}")
        facts = timm.get_pretrained_cfg(rest)
        where = facts and f"the file of {facts.hf_hub_id or facts.url} anywhere, and name it"
    else:
        return None
    return facts and (tuple(facts.mean), tuple(facts.std), where)


def find_units(config: Config, role: str, model: nn.Module, image: Tensor) -> tuple[str, ...]:
    """The names of the first units of a network: its own UNITS, timm's, or found by one run.

    Found: the last submodule that runs at each size of the map, but not inside of one that changes
    the size; of five sizes or more without the first, the stem's; the first three (section 3.2).
    Where no map shrinks, as in a transformer, blocks at quarters of the depth.
    """
    if named := getattr(config, f"{role}_units"):
        return named
    if type(model) in UNITS:
        return UNITS[type(model)]
    modules = {name: module for name, module in model.named_modules() if name}
    _, seen = run_once(model, modules, image.repeat(2, 1, 1, 1))
    runs, layout = Counter(name for name, _, _ in seen), common_layout(seen, image)
    maps: dict[str, int] = {}  # submodules that run once and give maps: how often that is halved
    for name, _, out in seen:
        with contextlib.suppress(UsageError):
            if runs[name] == 1 and is_feature(out) and len(out) == 2:
                side, other = as_map(out, layout_of(out, image, name, layout)).shape[2:]
                if side == other > 1:
                    maps[name] = round(math.log2(image.shape[-1] / side))
    info = getattr(model, "feature_info", None) or []
    found = [f["module"] for f in info if isinstance(f, dict) and f.get("module") in maps]
    if len({maps[name] for name in found}) > 2:
        found = found[-4:-1] if len(found) > 3 else found
    else:
        sizes_in = {n: {maps[m] for m in maps if m.startswith(f"{n}.")} for n in maps}
        units = [n for n, sizes in sizes_in.items() if len(sizes) < 3]
        last: dict[int, str] = {}  # by size, in the order of the network
        for name, size in maps.items():
            inside = any(name.startswith(f"{unit}.") for unit in units)
            if not inside and size >= max(last, default=0):
                last[size] = name
        found = list(last.values())[1 if len(last) > 4 else 0 :][:3]
    if len(found) < 3:
        blocks: dict[tuple, list[str]] = {}  # those of one parent, kind and size
        for name, size in maps.items():
            key = (name.rpartition(".")[0], type(modules[name]), size)
            blocks.setdefault(key, []).append(name)
        most = max(blocks.values(), key=len, default=[])
        found = [most[len(most) * i // 4 - 1] for i in (1, 2, 3)] if len(most) > 3 else found
    if len(found) < 3:
        seen = ", ".join(found) or "none"
        hint = f"name them with --{role}-units"
        raise UsageError(f"the units of the {role} could not be found (seen: {seen}): {hint}")
    say(f"{role} {getattr(config, role)}: heads go after {', '.join(found)}")
    return tuple(found)


def layout_of(feature: Tensor, image: Any, name: str, layout: str | None) -> str:
    """How a feature is laid out: "channels_first", "channels_last", or "tokens+n".

    n is the number of class tokens before the h * w tokens of a square map. The image's aspect
    tells which dimensions of [B, C, H, W] or [B, H, W, C] are those of the map.
    """
    shape = tuple(feature.shape)
    if len(shape) == 3:
        square = image.dim() == 4 and image.shape[-1] == image.shape[-2]
        for n in (0, 1, 2, 5) if square else ():
            if shape[1] > n and math.isqrt(shape[1] - n) ** 2 == shape[1] - n:
                return f"tokens+{n}"
        where = f"the submodule '{name}' returns {shape}"
        raise UsageError(f"{where}: {shape[1]} tokens are no square map")
    if layout:
        return check_name("layout", layout, ("channels_first", "channels_last"))
    height, width = image.shape[-2:] if image.dim() == 4 else (1, 1)
    near = max(height, width)  # a map may be rounded by a pixel
    last, first = (abs(h * width - w * height) < near for h, w in (shape[1:3], shape[2:4]))
    if first and last and shape[1] > 1:
        raise UsageError(
            f"the submodule '{name}' returns {shape}, which could have its channels first or last: "
            'give layout="channels_first" or layout="channels_last"'
        )
    return "channels_last" if last and not first else "channels_first"


def common_layout(seen: list[tuple], image: Tensor) -> str | None:
    """ "channels_first" for a network in which no map has its channels last beyond doubt."""
    for name, _, out in seen:
        with contextlib.suppress(UsageError):
            if is_feature(out) and layout_of(out, image, name, None) == "channels_last":
                return None
    return "channels_first"


def as_map(feature: Tensor, layout: str) -> Tensor:
    """A feature as a map [B, C, H, W]."""
    if layout == "channels_first":
        return feature
    if layout == "channels_last":
        return feature.permute(0, 3, 1, 2)
    tokens = feature[:, int(layout[7:]) :]  # [B, h * w, C]
    return tokens.transpose(1, 2).unflatten(2, (math.isqrt(tokens.shape[1]), -1))


class Deployed(nn.Module):
    """A saved student that normalises by itself. Args: see load_student."""

    def __init__(self, model: nn.Module, content: dict[str, Any]):
        super().__init__()
        self.model = model
        self.classes, self.image_size = content["classes"], content["image_size"]
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(content[name]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S], floats in 0 to 1 or uint8, to logits [B, K]."""
        S = self.image_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, S, S):
            raise UsageError(f"the student takes images [B, 3, {S}, {S}], not {list(images.shape)}")
        if not images.is_floating_point():
            images = images.float() / 255
        return self.model((images - self.mean) / self.std)


def load_student(path: str | Path) -> Deployed:
    """A student.pt as a network in eval mode for raw images [B, 3, S, S], which it normalises.

    It has `.classes` and `.image_size` S, and refuses images of another size. Networks of
    torchvision, timm or a file need that library or file.

    Raises:
        UsageError: the file is missing, damaged, or no student.pt.
    """
    content = load_file(Path(path))
    if not isinstance(content, dict) or not content.keys() >= {"model", "name", "classes", "mean"}:
        raise UsageError(f"'{path}' is no student.pt, which a finished run leaves")
    size = content["image_size"]
    model = build_model(content["name"], len(content["classes"]), "random", size)
    return Deployed(load_weights(model, path), content).eval()


# --------------------------------------------------------------------------------------------------
# 7. Data: all images as one uint8 tensor, in memory or mapped from a file; batched augmentation
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Data:
    """A data set: images uint8 [N, M, M, 3], labels int64 [N], and the places of its parts.

    M >= size, the side that the networks see. mean and std of each channel are on the 0-1 scale.
    Images may lie elsewhere than the rest, which is on `device`.
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
    sha256: str  # of all images and labels
    mapped: bool = False

    def __post_init__(self) -> None:
        self.device, self.train_labels = self.labels.device, self.labels[self.train]
        # On the 0-255 scale; sent to the device once: with each batch the host would wait.
        statistics = (torch.tensor(values, device=self.device) for values in (self.mean, self.std))
        self.mean_255, self.std_255 = (255 * values for values in statistics)

    def to(self, device: torch.device, share: float = 0.5) -> Data:
        """On a device; images stay where they are if they take more of its free memory."""
        names = ["labels", "train", "val", "test"]
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
        if fits := self.images.nbytes <= share * free:
            names.append("images")
        moved = {name: getattr(self, name).to(device) for name in names}
        mapped = self.mapped and not (fits and device.type != "cpu")
        return dataclasses.replace(self, **moved, mapped=mapped)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] to float32 [B, 3, S, S]."""
        images = ((images - self.mean_255) / self.std_255).permute(0, 3, 1, 2)
        return images.contiguous(memory_format=memory_format(images.device))

    def pick(self, indices: Tensor) -> Tensor:
        """The images at these places, uint8 [B, M, M, 3], on the device."""
        indices = indices.to(self.images.device)
        for i in indices.tolist() if self.mapped else ():
            advise(self.images[i], "WILLNEED")
        return self.images[indices].to(self.device)

    def middle(self, indices: Tensor) -> Tensor:
        """The middle of images, normalised, [B, 3, S, S]: what a network is tested with."""
        at = (self.images.shape[1] - self.size) // 2
        span = slice(at, at + self.size)
        return self.normalise(self.pick(indices)[:, span, span])


def augment(images: Tensor, corners: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """Random crop and horizontal flip of uint8 images [B, S, S, 3], for given draws.

    Args:
        images: the batch, which is padded with `padding` black pixels on each side.
        corners: row and column [B, 2] where each crop begins in the padded image.
        mirrored: bool [B], which images are flipped.
    """
    B, S = images.shape[:2]
    span = torch.arange(S, device=images.device)
    rows = corners[:, 0, None] + span  # [B, S]
    columns = corners[:, 1, None] + torch.where(mirrored[:, None], span.flip(0), span)  # [B, S]
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))  # [B, S + 2p, S + 2p, 3]
    batch = torch.arange(B, device=images.device)
    return padded[batch[:, None, None], rows[:, :, None], columns[:, None, :]]


def resized_crop(images: Tensor, boxes: Tensor, mirrored: Tensor, size: int) -> Tensor:
    """Crops of normalised images [B, 3, M, M], resized to [B, 3, size, size] and flipped.

    boxes: [B, 4], centre x and y, width and height, as shares of the image.
    """
    x, y, width, height = boxes.unbind(1)
    zero = torch.zeros_like(x)
    flipped = torch.where(mirrored, -width, width)
    theta = torch.stack((flipped, zero, 2 * x - 1, zero, height, 2 * y - 1), dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, (len(images), 3, size, size), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


RESIZED_CROP_FROM = 64  # pixels: smaller images are cropped from a black border, as the paper does


def draw_epoch(config: Config, size: int, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
    """All that is random about an epoch's images: order [N], crops [N, 2 or 4], flips [N].

    Drawn on the CPU, in one go, from seed and epoch: a seed means the same on every device.
    """
    generator = torch.Generator().manual_seed(seed_of(config.seed, epoch))
    order = torch.randperm(size, generator=generator)
    if config.image_size < RESIZED_CROP_FROM:
        crops = torch.randint(2 * config.crop_padding + 1, (size, 2), generator=generator)
    else:  # area and ratio of the sides as in Szegedy et al. 2015, "Going deeper with convolutions"
        area, ratio, *at = torch.rand(4, size, generator=generator)
        area = config.crop_scale + (1 - config.crop_scale) * area
        ratio = ((2 * ratio - 1) * math.log(4 / 3)).exp()
        sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1).clamp(max=1)
        crops = torch.cat([sides / 2 + (1 - sides) * torch.stack(at, dim=1), sides], dim=1)
    mirrored = torch.rand(size, generator=generator) < 0.5
    return order, crops, mirrored & config.flip


def epoch_batches(data: Data, config: Config, epoch: int) -> Iterator[tuple[Tensor, ...]]:
    """An epoch of images [B, 3, S, S], labels [B] and indices [B], places in the training set.

    Of several processes each gets an equal share of every batch.
    """
    draws = draw_epoch(config, len(data.train), epoch)
    order, crops, mirrored = (draw.to(data.device) for draw in draws)
    starts = list(range(0, len(order), config.batch_size))
    if len(order) - starts[-1] < 2 * world_size():
        starts.pop()  # batch norm cannot train on one image alone

    def pieces() -> Iterator[tuple[slice, Tensor]]:
        for start in starts:
            stop = min(start + config.batch_size, len(order))
            stop -= (stop - start) % world_size()
            mine = slice(start + rank(), stop, world_size())
            yield mine, data.pick(data.train[order[mine]])

    for mine, images in one_ahead(pieces()) if data.mapped else pieces():
        if config.image_size < RESIZED_CROP_FROM:
            images = augment(images, crops[mine], mirrored[mine], config.crop_padding)
            images = data.normalise(images)
        else:
            images = data.normalise(images)
            images = resized_crop(images, crops[mine], mirrored[mine], config.image_size)
            images = images.contiguous(memory_format=memory_format(images.device))
        yield images, data.labels[data.train[order[mine]]], order[mine]


def one_ahead(items: Iterator) -> Iterator:
    """The same items, each made in a thread while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item


# What each data set brings: a function that gives the images at some places, uint8 [N, M, M, 3];
# labels [N]; how many, the first ones, are for training; class names.
Source = tuple[Callable[[list[int]], Tensor], Tensor, int, list[str]]

STATISTICS = {  # of the channels: the benchmark's; svhn: the authors'; measured for the others
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "svhn": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
TORCHVISION = {  # class, and what to put into --data
    "cifar10": ("CIFAR10", "cifar-10-python.tar.gz, or the folder cifar-10-batches-py from it,"),
    "cifar100": ("CIFAR100", "cifar-100-python.tar.gz, or the folder cifar-100-python from it,"),
    "svhn": ("SVHN", "train_32x32.mat and test_32x32.mat"),
}


def from_torchvision(config: Config) -> Source:
    """CIFAR or SVHN in torchvision's files, downloaded where they are not there.

    --data may also hold its images in folders train/ and test/. The order of the images is that
    of their labels and pixels, so that both give the same runs.
    """
    root = Path(config.data)
    if (root / "train").is_dir():
        decoded, labels, count, classes = from_folder(config, side=32)
        images = decoded(list(range(len(labels))))
    else:
        images, labels, count, classes = read_torchvision(config.dataset, root)
    order: list[int] = []
    for start, stop in ((0, count), (count, len(labels))):
        for label in range(len(classes)):  # all pixels as keys at once would take gigabytes
            places = start + (labels[start:stop] == label).nonzero()[:, 0]
            order += sorted(places.tolist(), key=lambda i: images[i].numpy().tobytes())
    places = torch.tensor(order)
    return lambda chosen: images[places[chosen]], labels[places], count, classes


def read_torchvision(dataset: str, root: Path) -> tuple[Tensor, Tensor, int, list[str]]:
    (name, files), svhn = TORCHVISION[dataset], dataset == "svhn"
    datasets = import_optional("torchvision.datasets", "torchvision", f"--dataset {dataset}")
    splits = [{"train": True}, {"train": False}]
    if svhn:
        import_optional("scipy.io", "scipy", f"--dataset {dataset}")
        splits = [{"split": "train"}, {"split": "test"}]
    what = f"{name} is not in '{root}' and could not be downloaded"
    with explain(what, f"put {files} there, or try --dataset digits, which needs no data"):
        with locked(root, "another run is reading or downloading the data"):
            # What is there and whole is not downloaded.
            sets = [getattr(datasets, name)(root, **split, download=True) for split in splits]
    images = torch.cat([torch.from_numpy(part.data) for part in sets])
    labels = torch.cat([torch.as_tensor(s.labels if svhn else s.targets) for s in sets]).long()
    if svhn:  # [N, 3, 32, 32]
        return images.permute(0, 2, 3, 1).contiguous(), labels, len(sets[0]), DIGIT_NAMES
    return images, labels, len(sets[0]), list(sets[0].classes)


DIGIT_NAMES = [str(digit) for digit in range(10)]


def from_digits(config: Config) -> Source:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: 1,437 to train on, 360 to test."""
    datasets = import_optional("sklearn.datasets", "scikit-learn", "--dataset digits")
    digits = datasets.load_digits()
    grey = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    images = grey[..., None].repeat(1, 1, 1, 3)  # [1797, 8, 8, 3]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).roll(-360)
    labels = torch.from_numpy(digits.target).long()[order]
    return lambda chosen: images[order[chosen]], labels, 1437, DIGIT_NAMES


IMAGE_FILES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}


def from_folder(config: Config, side: int | None = None) -> Source:
    """The user's images in train/<class>/ and test/<class>/ (or val/), at any depth.

    They are decoded once, into a file below --out that is then mapped.
    """
    root = Path(config.data)
    other = next((root / n for n in ("test", "val") if (root / n).is_dir()), root / "test")
    parts, names = [root / "train", other], []
    for part in parts:
        if not part.is_dir():
            raise UsageError(f"there is no folder '{part}': --data must hold train/ and test/")
        names.append(sorted(d.name for d in part.iterdir() if d.is_dir() and d.name[0] != "."))
    classes = names[0]
    if names[1] != classes:
        differ = ", ".join(sorted({*classes} ^ {*names[1]})[:10])
        raise UsageError(f"'{parts[0]}' and '{parts[1]}' differ in their classes: {differ}")
    if len(classes) < 2:
        raise UsageError(f"'{parts[0]}' holds {len(classes)} class folders: a classifier needs two")
    files: list[Path] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    for part in parts:
        count = len(files)  # in the end that of the first part
        for label, name in enumerate(classes):
            found = list(files_below(part / name))
            images = sorted(file for file in found if file.suffix.lower() in IMAGE_FILES)
            if not images:
                raise UsageError(f"the class folder '{part / name}' holds no images")
            files += images
            labels += [label] * len(images)
            rest = (file for file in {*found} - {*images} if file.name[0] != ".")
            others.update(file.suffix.lower() or file.name for file in rest)
    if others:
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(others.items()))
        say(f"note: files in '{root}' that are no images of a known kind are left out: {kinds}")
    S, cache = config.image_size, Path(config.out) / "cache"
    side = side or (S if S < RESIZED_CROP_FROM else round(1.15 * S))

    def load(chosen: list[int]) -> Tensor:
        return decode([files[i] for i in chosen], side, cache)

    return load, torch.tensor(labels), count, classes


def files_below(folder: Path) -> Iterator[Path]:
    """All files at any depth; of a link, itself. What cannot be read raises an OSError."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            yield from files_below(entry)
        else:
            yield entry


def advise(images: Tensor, advice: str) -> None:
    """Tell the system how mapped images will be read, else it reads megabytes around each one."""
    start = images.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = images.data_ptr() + images.nbytes - start
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not on Windows
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), getattr(mmap, f"MADV_{advice}"))


CHUNK = 512  # images that are decoded, checked and written at a time


def decode(files: list[Path], side: int, cache: Path) -> Tensor:
    """Image files as a mapped uint8 tensor [N, side, side, 3], decoded where that is not done yet.

    The file is good for these very files, as their names, sizes, places and times tell, and for
    this version of Pillow. A chunk whose checksum is not that of the index is decoded (again).
    """
    pil = import_optional("PIL.Image", "pillow", "a folder of images")
    key = hashlib.sha256(repr((side, pil.__version__)).encode())
    for file in files:
        if not file.is_file():
            raise UsageError(f"the image '{file}' is no file, or a link to none: remove it")
        s = file.stat()
        facts = (str(file), s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns)
        key.update(repr(facts).encode())
    folder = cache / key.hexdigest()[:16]
    images, index, size = folder / "images.u8", folder / "index.json", side * side * 3
    chunks = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
    with locked(folder, "another run is decoding images"), writing(images):
        images.touch()
        sums: list[str | None] = []
        with contextlib.suppress(UsageError):  # a damaged index is none
            sums = (read_json(index, "chunks") or {"chunks": []})["chunks"]
        sums += [None] * (len(chunks) - len(sums))
        with open(images, "r+b") as store, ThreadPoolExecutor() as pool:
            there = [hashlib.sha256(store.read(CHUNK * size)).hexdigest() for _ in chunks]
            todo = [i for i in range(len(chunks)) if there[i] != sums[i]]
            number = sum(len(chunks[i]) for i in todo)
            if todo:
                say(f"decodes {number} images into '{folder}'; old ones beside it may go")
            bar = progress_bar(len(files), "decoding", len(files) - number)
            for i in todo:
                content = b"".join(pool.map(lambda file: decode_one(pil, file, side), chunks[i]))
                store.seek(i * CHUNK * size)
                store.write(content)
                store.flush()
                os.fsync(store.fileno())
                sums[i] = hashlib.sha256(content).hexdigest()
                write_json(index, {"chunks": sums})
                bar.update(len(chunks[i]))
    mapped = torch.from_file(str(images), shared=False, size=len(files) * size, dtype=torch.uint8)
    return mapped.view(len(files), side, side, 3)


def decode_one(pil: Any, path: Path, side: int) -> bytes:
    """The pixels of one image file, uint8 [side, side, 3].

    The shorter side is resized and the middle square cut out. Transparent pixels become black,
    16-bit grey levels 8-bit.
    """
    from PIL import ImageOps

    with explain(f"the image '{path}' cannot be read", "remove it"), pil.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # convert() would clip 16 bits to white
            image = image.convert("I").point(lambda grey: grey / 256).convert("L")
        if image.mode in ("I", "F"):
            raise ValueError(f"pixels of mode {image.mode} have no known range")
        if "A" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            image = pil.alpha_composite(pil.new("RGBA", image.size, "black"), image)
        image = image.convert("RGB")
        if image.size != (side, side):
            image = ImageOps.fit(image, (side, side), method=pil.Resampling.BILINEAR)
        return image.tobytes()


SOURCES: dict[str, Callable[[Config], Source]] = {
    **dict.fromkeys(TORCHVISION, from_torchvision),
    "folder": from_folder,
    "digits": from_digits,
}


def load_data(config: Config, device: torch.device | str = "cpu") -> Data:
    """The data set of a configuration, resized, divided, with its normalisation, on a device.

    Raises:
        UsageError: it is not there and cannot be downloaded, or is not as it should be.
    """
    if not is_main():
        wait_for_all()  # the first process downloads and decodes; the others find that
    load, labels, count, classes = SOURCES[config.dataset](config)
    parts = []  # what the subsets leave: the same for every run, in the order of the data set
    for size, most in ((count, config.subset), (len(labels) - count, config.test_subset)):
        places = torch.randperm(size, generator=torch.Generator().manual_seed(0))
        parts.append(places[:most].sort().values)
    chosen, count = [*parts[0].tolist(), *(count + parts[1]).tolist()], len(parts[0])
    images, labels = load(chosen), labels[chosen]
    if is_main():
        wait_for_all()
    S, mapped = config.image_size, config.dataset == "folder"
    if images.shape[1] != S and not mapped:
        small, images = images, torch.empty(len(images), S, S, 3, dtype=torch.uint8)
        for old, new in zip(small.split(1000), images.split(1000)):
            old = old.permute(0, 3, 1, 2).float()
            resized = F.interpolate(old, (S, S), mode="bilinear", antialias=True)
            new.copy_(resized.round().clamp(0, 255).permute(0, 2, 3, 1))
    held = []  # out: of each class its share, the same images for every run
    fixed = torch.Generator().manual_seed(0)
    for label in range(len(classes)):
        of_class = (labels[:count] == label).nonzero()[:, 0]
        number = round(config.val_fraction * len(of_class))
        held.append(of_class[torch.randperm(len(of_class), generator=fixed)[:number]])
    train, test = torch.arange(count), torch.arange(count, len(labels))
    val = torch.cat(held).sort().values
    train = train[~torch.isin(train, val)]
    digest = hashlib.sha256(repr((images.shape, classes, count)).encode())
    for part in (labels, *images.split(1000)):
        digest.update(part.numpy())
    if len(train) < 2 or config.val_fraction and not len(val):
        raise UsageError(f"there are {len(train)} images to train on and {len(val)} held out")
    if (B := config.batch_size) > len(train):
        raise UsageError(f"--batch-size {B} is larger than the {len(train)} training images")
    mean, std = normalisation(config) or measure(images, train)
    if mapped:
        advise(images, "RANDOM")
    data = Data(images, labels, train, val, test, classes, S, mean, std, digest.hexdigest(), mapped)
    return data.to(torch.device(device))


def normalisation(config: Config) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std that are not measured: the teacher's, for both networks; or the data set's."""
    if path := config.teacher_weights:
        content = load_file(Path(path))
        if isinstance(content, dict) and content.keys() >= {"mean", "std", "classes"}:
            with explain(f"'{path}' has a damaged mean or std", "take another one"):
                torch.tensor([content["mean"], content["std"]]).view(2, 3)
            return tuple(content["mean"]), tuple(content["std"])
    first = "teacher" if config.teacher else "student"
    if getattr(config, f"{first}_init") == "pretrained":
        if known := library_weights(getattr(config, first)):
            return known[:2]
    return STATISTICS.get(config.dataset)


def measure(images: Tensor, places: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images, on the 0-1 scale, exactly."""
    count = torch.zeros(3, 256, dtype=torch.float64)
    for part in places.split(100):
        for channel, pixels in enumerate(images[part].unbind(dim=3)):
            count[channel] += torch.bincount(pixels.flatten(), minlength=256)
    value = torch.arange(256, dtype=torch.float64) / 255
    share = count / count.sum(dim=1, keepdim=True)
    mean = share @ value
    std = (share * (value - mean[:, None]) ** 2).sum(dim=1).sqrt().clamp(min=1 / 255)
    return tuple(tuple(round(v, 6) for v in values.tolist()) for values in (mean, std))


# --------------------------------------------------------------------------------------------------
# 8. Configuration: one dataclass is the command line, what is recorded, the argument of train()
# --------------------------------------------------------------------------------------------------

# Sections 4.1 (CIFAR-100) and 4.2 (SVHN). Milestones are those of the full schedule.
CIFAR = {"epochs": 240, "lr_steps": (150, 180, 210), "batch_size": 64, "lr": 0.05, "beta": 0.5}
CIFAR |= {"crop_padding": 4, "flip": True, "image_size": 32, "head_width": 256, "head_stride": 1}
SVHN = {"epochs": 150, "lr_steps": (80, 110, 135), "batch_size": 200, "lr": 0.001, "beta": 5.0}
DIGITS = {"epochs": 30, "lr_steps": (19, 23, 26), "crop_padding": 2, "flip": False}
DIGITS |= {"image_size": 16, "head_width": 64, "head_stride": 2}
RECIPES: dict[str, dict[str, Any]] = {
    "cifar100": CIFAR, "cifar10": CIFAR, "folder": CIFAR,
    "svhn": CIFAR | SVHN, "digits": CIFAR | DIGITS,
}  # fmt: skip
# The benchmark that Table 1 compares with, and the authors' code, train these with 0.01.
LOW_LR, LOW_LR_MODELS = 0.01, ("mobilenetv2", "shufflenetv2")

SEED = (lambda v: 0 <= v < 2**62, "between 0 and 2^62")
NAMES = (lambda v: len(v) > 0, "at least one name")
SIZE = (lambda v: 16 <= v <= 4096, "between 16 and 4096")
PADDING = (lambda v: 0 <= v <= 4096, "between 0 and 4096")
TWO = (lambda v: 2 <= v < 2**31, "at least 2 and below 2^31")
BELOW_1 = (lambda v: 0 <= v < 1, "at least 0 and below 1")
FACTOR = (lambda v: 0 < v <= 1, "above 0 and at most 1")
ASCENDING = (lambda v: all(s >= 0 for s in v) and list(v) == sorted(v), "ascending epochs")
INITS = "random, pretrained or file:PATH"
INIT = (lambda v: v in ("random", "pretrained") or v.startswith("file:"), INITS)
PRECISION = "float32, tf32 or bfloat16 (autocast; time a large x @ x in it first); " \
    "auto: float32, with tf32 in CUDA's convolutions"  # fmt: skip


def field(group: str, default: Any, help: str, parse: Any = str, rule: Any = None) -> Any:
    """A field of Config. Those of the group "machine" may differ where a run goes on."""
    facts = {"group": group, "option": Option(default, help, parse, rule)}
    return dataclasses.field(default=default, metadata=facts)


groups = ("networks", "data", "training", "machine")
net, images, fit, machine = (functools.partial(field, group) for group in groups)


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run does, complete when it exists: None becomes the recipe's value, see RECIPES.

    `options` are those of the method. `given` keeps what was not left to the recipe.

    Raises:
        UsageError: a name that does not exist, a value that makes no sense.
    """

    teacher: str = net(None, "one of ours, torchvision:NAME, timm:NAME or FILE.py:FUNCTION")
    student: str = net(None, "the network that learns, likewise")
    teacher_init: str = net("random", f"weights that the teacher begins with: {INITS}", str, INIT)
    student_init: str = net("random", f"weights that the student begins with: {INITS}", str, INIT)
    teacher_units: Sequence[str] = net(None, "heads go after layer1,...: found", words, NAMES)
    student_units: Sequence[str] = net(None, "heads go after layer1,...: found", words, NAMES)
    method: str = field("method", "mhkd", "ce, kd, mhkd, fitnet, cc, rkd, crd, lsh, dhkd, crd+mhkd")
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dataset: str = images("cifar100", "cifar100, cifar10, svhn, folder, digits (no download)")
    image_size: int = images(None, "side of the images in pixels: 32; digits 16", int, SIZE)
    subset: int = images(None, "number of training images: all", int, TWO)
    test_subset: int = images(None, "number of test images: all", int, COUNT)
    val_fraction: float = images(0.0, "share held out, which tells the best epoch", float, BELOW_1)
    crop_padding: int = images(None, "padding for the crop: 4; digits 2", int, PADDING)
    crop_scale: float = images(0.08, "least area of the crop from 64 pixels up", float, FACTOR)
    flip: bool = images(None, "flip images at random: yes; digits no", bool)
    epochs: int = fit(None, "epochs: 240; svhn 150; digits 30", int, COUNT)
    batch_size: int = fit(None, "images a step (batch norm needs two): 64; svhn 200", int, TWO)
    lr: float = fit(None, "0.05; mobilenetv2, shufflenetv2 0.01; svhn 0.001", float, POSITIVE)
    lr_steps: Sequence[int] = fit(None, "150,180,210 of 240; svhn 80,110,135", integers, ASCENDING)
    lr_decay: float = fit(0.1, "factor by which lr falls after lr_steps", float, FACTOR)
    momentum: float = fit(0.9, "of SGD", float, BELOW_1)
    weight_decay: float = fit(5e-4, "of SGD", float, NOT_NEGATIVE)
    seed: int = fit(0, "of initial weights, batch order and augmentation", int, SEED)
    teacher_seed: int = fit(0, "of the teacher, where it is trained here", int, SEED)
    precision: str = fit("auto", PRECISION, str, one_of("auto", "float32", "tf32", "bfloat16"))
    teacher_weights: str = machine(None, "its checkpoint: trained first", str, (len, "a file"))
    data: str = machine("data", "folder of the data; downloads go there")
    out: str = machine("runs", "where run folders go")
    device: str = machine(None, "cpu, cuda, cuda:1, mps: the best there is")
    backend: str = machine("auto", "of the loss: auto, reference, fused", str, one_of(*BACKENDS))
    compile: bool = machine(False, "torch.compile the networks: slow to begin", bool)
    keep_checkpoint: bool = machine(False, "keep checkpoint.pt of a finished run", bool)
    tensorboard: bool = machine(False, "write the log's figures for TensorBoard, too", bool)

    def __post_init__(self) -> None:
        fields = {f.name: f.metadata["option"] for f in dataclasses.fields(self) if f.metadata}
        values = {name: getattr(self, name) for name in fields}
        given = {name: v for name, v in values.items() if v != fields[name].default}
        self.__dict__["given"] = {**given, "options": dict(self.options)}
        check_name("data set", self.dataset, SOURCES)
        methods = find_methods(self.method)
        values["method"] = "+".join(methods)
        if not self.student:
            raise UsageError("--student is missing: python mhkd.py --teacher vgg13 --student vgg8")
        if not any(method.needs_teacher for method in methods.values()):
            values |= {n: o.default for n, o in fields.items() if n.startswith("teacher")}
        elif not self.teacher:
            raise UsageError(f"--teacher is missing: --method {self.method} needs one; ce does not")
        elif self.teacher_weights is not None:
            values |= {"teacher_seed": 0, "teacher_init": "random"}  # nothing is trained with them
        if any(m.on_teacher for m in methods.values()) and self.student != self.teacher:
            raise UsageError("--method heads has no student: give the teacher as --student, too")
        for name in (self.student, values["teacher"]):
            if name and ":" not in name:
                check_name("network", name, MODELS)
        recipe = dict(RECIPES[self.dataset])
        if self.student in LOW_LR_MODELS and self.dataset != "svhn":
            recipe["lr"] = LOW_LR
        scale = (self.epochs or recipe["epochs"]) / recipe["epochs"]
        recipe["lr_steps"] = tuple(round(step * scale) for step in recipe["lr_steps"])
        units = self.student_units or self.teacher_units or (1, 2, 3)
        recipe["units"] = tuple(range(1, len(units) + 1))
        if self.options.get("teacher_heads") == "pretrained":
            recipe["teacher_heads_epochs"] = third_of(self.epochs or recipe["epochs"])
        elif self.options.get("teacher_heads_epochs"):
            raise UsageError("--teacher-heads-epochs is for --teacher-heads pretrained")
        declared = method_options(methods)
        for name in self.options:
            if name not in declared:
                raise UsageError(foreign_option(name, self.method))
        values |= {n: self.options.get(n, o.default) for n, o in declared.items()}
        values = {n: recipe.get(n) if v is None else v for n, v in values.items()}
        for name, option in {**fields, **declared}.items():
            value = values[name]
            if option.rule and value is not None and not option.rule[0](value):
                shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
                raise UsageError(f"{flag_of(name)} must be {option.rule[1]}, not {shown}")
        options = {name: values.pop(name) for name in declared}
        self.__dict__.update(values, options=options)
        if len(self.teacher_units or units) != len(self.student_units or units):
            raise UsageError("--teacher-units and --student-units must be as many as each other")

    def replace(self, **changes: Any) -> Config:
        """The same with changes; what was not given is filled anew."""
        return Config(**{**self.given, **changes})

    def of_teacher(self) -> Config:
        """The run that trains the teacher: the same recipe, without the teacher's own teacher."""
        own = {"student_units": None, "options": {}, "method": "ce"}
        own |= {"student": self.teacher, "student_init": self.teacher_init, "teacher": None}
        return self.replace(**own, seed=self.teacher_seed, teacher_seed=0, teacher_units=None)

    def of_heads(self, teacher_weights: str | Path) -> Config:
        """The run that trains the teacher's heads: the same recipe, with a schedule in proportion.

        The rate is the recipe's for the teacher, so that all students share one run.
        """
        epochs, o = self.options["teacher_heads_epochs"], self.options
        own = {"student": self.teacher, "student_init": "random", "method": "heads"}
        own |= {"student_units": self.teacher_units, "teacher_weights": str(teacher_weights)}
        own |= {"seed": self.teacher_seed, "epochs": epochs, "lr": None}
        if "lr_steps" in self.given:
            own["lr_steps"] = tuple(round(step * epochs / self.epochs) for step in self.lr_steps)
        return self.replace(**own, options={name: o[name] for name in HEAD_OPTIONS})

    def recorded(self) -> dict[str, Any]:
        """The values that make two runs different, as JSON would give them back."""
        fields = [f for f in dataclasses.fields(self) if f.metadata.get("group") != "machine"]
        return json.loads(json.dumps({f.name: getattr(self, f.name) for f in fields}))

    def differs(self) -> dict[str, Any]:
        """What sets the run apart from the recipe, beside data set, networks, method and seed."""
        who = {n: getattr(self, n) for n in ("dataset", "teacher", "student", "method", "epochs")}
        standard = Config(**who)
        mine, usual = ({**vars(c), **c.options} for c in (self, standard))
        usual["epochs"] = RECIPES[self.dataset]["epochs"]
        if mine.get("teacher_heads") == "pretrained":
            usual["teacher_heads_epochs"] = third_of(self.epochs)
        names = {**self.recorded(), **self.options}.keys() - {"options", "seed"}
        return {name: mine[name] for name in mine if name in names and mine[name] != usual[name]}


def third_of(epochs: int) -> int:
    """How long the teacher's heads are trained before."""
    return max(1, round(epochs / 3))


def foreign_option(name: str, method: str) -> str:
    """Why an option cannot be given with a method: whose it is, or what there is."""
    with contextlib.suppress(UsageError):
        find_methods(BASELINES[0])  # loads mhkd_baselines.py, where it is there
    flag = flag_of(name)
    owners = [m for m, kind in METHODS.items() if name in {**kind.options, **kind.final_options}]
    if owners:
        return f"{flag} is an option of --method {' or '.join(owners)}, not of {method}"
    names = {*Config.__dataclass_fields__, *method_options(find_methods(method))}
    near = difflib.get_close_matches(flag, map(flag_of, names), n=3)
    return f"there is no option {flag}" + (f": did you mean {' or '.join(near)}?" if near else "")


# --------------------------------------------------------------------------------------------------
# 9. Files and processes: nothing that was computed is lost, whenever a run is killed
# --------------------------------------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def explain(what: str, hint: str, kinds: Any = Exception) -> Iterator[None]:
    """Turn errors inside into a UsageError: what failed, why, and how to mend it."""
    try:
        yield
    except kinds as error:
        raise UsageError(f"{what} ({first_line(error)}): {hint}") from error


def check_name(what: str, name: str, names: Iterable[str]) -> str:
    """The name, if it is one of the names; else a UsageError that lists the near ones, or all."""
    names = list(names)
    if name in names:
        return name
    near = difflib.get_close_matches(str(name).lower().replace("-", "_"), names, n=4, cutoff=0.5)
    some = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "")
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {some}."
    raise UsageError(f"there is no {what} '{name}': {hint}")


def writing(path: Path) -> contextlib.AbstractContextManager:
    kinds = OSError, RuntimeError  # torch.save reports a full disk as a RuntimeError
    return explain(
        f"'{path}' could not be written", "make room, or mend that, and run the same again", kinds
    )


def write_atomically(path: Path, write: Callable[[Any], Any], keep: Path | None = None) -> None:
    """Write beside the file, flush to the disk, then rename: at all times old or new is there.

    keep: where to move the old one.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with writing(path):
            with open(part, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if keep and path.exists():
                os.replace(path, keep)
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def seal(content: dict[str, Any]) -> str:
    """A checksum of a record, without the one that stands in it."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    content = json.loads(json.dumps(content))
    text = json.dumps({**content, "sha256": seal(content)}, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path, *keys: str) -> dict[str, Any] | None:
    """A record that write_json has written; None where there is none. It must have these keys."""
    if not path.is_file():
        return None
    kinds = ValueError, RecursionError
    with explain(f"'{path}' is damaged", "move its folder away", kinds):
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or not content.keys() >= {*keys}:
            raise ValueError(f"it must have {', '.join(keys)}")
        if content.get("sha256") != seal(content):
            raise ValueError("its checksum is not that of its content")
    return content


def sha256_of(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def sha256_of_state(model: nn.Module) -> str:
    """Of all parameters and buffers of a network."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder: Path, waiting: str) -> Iterator[None]:
    """Hold a folder, made where it is missing, for this process (under torchrun the first) alone.

    The system lets it go however the process ends, and nothing stays behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not is_main() or os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{waiting}: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def load_file(path: Path) -> Any:
    """What torch.save wrote into a file, which may hold tensors alone, its checksums compared."""
    if not path.is_file():
        raise UsageError(f"there is no checkpoint '{path}'")
    try:
        if zipfile.is_zipfile(path):  # PyTorch itself looks at no checksum
            with zipfile.ZipFile(path) as file:
                if bad := file.testzip():
                    raise ValueError(f"the checksum of its part {bad} is wrong")
        safe = [argparse.Namespace]  # the benchmark's options
        with warnings.catch_warnings(), torch.serialization.safe_globals(safe):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError):
            reason = "more than tensors could run code: save network.state_dict() alone"
        raise UsageError(f"'{path}' is damaged or no checkpoint ({reason})") from error


def read_state(path: str | Path, names: Iterable[str]) -> dict[str, Tensor]:
    """A state dict from a file, alone or as "model" or "state_dict", for entries of these names."""
    content = load_file(Path(path))
    if isinstance(content, dict):
        if "distiller" in content:
            raise UsageError(f"'{path}' is the state of a run: take the student.pt beside it")
        content = content.get("model", content.get("state_dict", content))
    if not isinstance(content, dict) or not all(
        isinstance(name, str)
        and isinstance(t, Tensor)
        and t.layout == torch.strided
        and not (t.is_complex() or t.is_meta)
        for name, t in content.items()
    ):
        raise UsageError(f"'{path}' holds no state dict: save {{'model': network.state_dict()}}")
    if {*content}.isdisjoint(names):  # of a network in DataParallel or torch.compile
        for prefix in ("module.", "_orig_mod."):
            content = {name.removeprefix(prefix): tensor for name, tensor in content.items()}
    return content


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a checkpoint, {"model": state_dict} or a state dict alone, strictly into a network.

    Raises:
        UsageError: the file is missing or broken, holds another network or number of classes.
    """
    state = read_state(path, model.state_dict())
    load_state(model, state, f"'{path}' holds another network or number of classes")
    return model


def load_state(model: nn.Module, state: dict[str, Tensor], what: str, new: int = 0) -> None:
    """Load a state dict strictly; `what` says what is wrong where an entry does not fit.

    new: the number of classes, where a classifier of another number may be left out.
    """
    there, here = (
        {key: tuple(t.shape) for key, t in s.items()} for s in (state, model.state_dict())
    )
    for key in {**here, **there}:
        a, b = there.get(key, "missing"), here.get(key, "missing")
        left_out = new and (b == "missing" or (a != "missing" and (new, *a[1:]) == b))
        if a != b and not left_out:
            raise UsageError(f"{what}: '{key}' is {a} there, {b} here")
    fitting = {key: tensor for key, tensor in state.items() if there[key] == here.get(key)}
    model.load_state_dict(fitting, strict=False)


def environment(config: Config, device: torch.device) -> dict[str, Any]:
    """What a figure depends on beside the configuration."""
    from importlib import metadata

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchvision", "timm", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    hardware = platform.processor() or platform.machine()
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    elif (processors := Path("/proc/cpuinfo")).is_file():
        _, _, name = processors.read_text().partition("model name\t: ")
        hardware = name.partition("\n")[0].strip() or hardware
    return {
        "device": str(device),
        "hardware": hardware,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        **versions,
        "mhkd": __version__,
        "commit": commit_of(Path(__file__).resolve()),
        "loss": loss_backend() if config.backend != "reference" else "reference",
        **{name: getattr(config, name) for name in ("data", "out", "teacher_weights", "compile")},
    }


def commit_of(file: Path) -> str | None:
    """The commit of this file, marked where it has changed since; None for a copy elsewhere."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        options = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        return subprocess.run(command, **options).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        changes = git("status", "--porcelain", "--", "mhkd.py", "mhkd_baselines.py", "csrc")
        return git("rev-parse", "HEAD") + (" with changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None


def progress_bar(total: int, title: str, done: int) -> Any:
    """tqdm's bar of images, on a terminal and where tqdm is installed; else what looks like it."""
    try:
        from tqdm import tqdm
    except ImportError:
        return types.SimpleNamespace(update=lambda images: None)
    options = {"unit": " images", "unit_scale": True, "disable": None if is_main() else True}
    return tqdm(None, title, total, initial=done, **options)


def say(text: str) -> None:
    if is_main():
        tqdm = sys.modules.get("tqdm")
        (tqdm.tqdm.write if tqdm else print)(text)  # above the bar
        sys.stdout.flush()


# Several processes, as torchrun or torch.multiprocessing start them.


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def wait_for_all() -> None:
    if world_size() > 1:
        dist.barrier()


def average_over_processes(values: Tensor) -> Tensor:
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world_size()
    return values


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """The mean over the processes, in one message; a parameter without a gradient has none."""
    if world_size() > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        mean = average_over_processes(torch.cat([g.flatten() for g in gradients]))
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))


def gather_from_processes(rows: Tensor) -> Tensor:
    """Rows [B, ...] of each process, as many on all of them, in the order of the processes."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


@contextlib.contextmanager
def surroundings(config: Config) -> Iterator[torch.device]:
    """The device, the process group under torchrun, PyTorch's switches; put back at the end."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ
    device = pick_device(config.device, int(os.environ.get("LOCAL_RANK", 0)) if several else None)
    if config.precision == "tf32" and device.type != "cuda":
        raise UsageError(f"--precision tf32 is for CUDA, and this is {device}: use auto or float32")
    if config.backend == "fused" and not loss_backend().startswith("fused"):
        raise UsageError("--backend fused: the fused kernel is not installed: use auto")
    start = several and not dist.is_initialized()
    if start:  # others wait while the first one waits for another run's teacher, or downloads
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=7))
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.precision in ("auto", "tf32")
    try:
        B, count = config.batch_size, world_size()
        if B % count or B < 2 * count:
            raise UsageError(
                f"--batch-size {B} must be {2 * count}, {3 * count}, ...: {count} processes"
            )
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield device
        wait_for_all()  # a process that ends while another one still talks to it aborts it
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        if start:
            dist.destroy_process_group()


def pick_device(name: str | None, local_rank: int | None = None) -> torch.device:
    """The device of that name; without a name CUDA, then MPS, then the CPU."""
    if name is None:
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    with explain(f"--device {name} cannot be used", "take cpu, cuda or mps, if they are there"):
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise ValueError("of another kind")
        if device.type == "cuda" and local_rank is not None:
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    return device


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors: else page faults cost some 7 % of a step."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_MAX, 0)


# --------------------------------------------------------------------------------------------------
# 10. Command line
# --------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(message)


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_option(group: Any, name: str, option: Option) -> None:
    flag, default, help = flag_of(name), option.default, option.help
    if option.parse is bool:
        action = argparse.BooleanOptionalAction
        group.add_argument(flag, dest=name, action=action, default=None, help=help)
        return
    if default is not None:
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        help = f"{help} [{shown}]"
    metavar = option.parse.__name__.upper().replace("STR", "X")
    group.add_argument(flag, type=option.parse, default=None, help=help, metavar=metavar)


def parse_config(
    arguments: Sequence[str], extra: Callable[[Parser], None] = lambda parser: None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command line: all that was given, with what `extra` adds; and the arguments of Config."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", default=Config.method)
    methods = find_methods(first.parse_known_args(arguments)[0].method)
    parser = Parser(
        prog="mhkd.py", description=__doc__.split("\n\nThe method")[0], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--help --method NAME shows the options of that method.",
    )  # fmt: skip
    fields = [f for f in dataclasses.fields(Config) if f.metadata]
    names = dict.fromkeys(f.metadata["group"] for f in fields)
    groups = {name: parser.add_argument_group(name) for name in names}
    for f in fields:
        add_option(groups[f.metadata["group"]], f.name, f.metadata["option"])
    declared = method_options(methods)
    for name, option in declared.items():
        add_option(groups["method"], name, option)
    parser.add_argument("--version", action="store_true", help="versions, and what the loss uses")
    extra(parser)
    parsed, left = parser.parse_known_args(arguments)
    for word in left:
        if not word.startswith("--"):
            raise UsageError(f"the argument '{word}' belongs to no option")
        name = word.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        raise UsageError(foreign_option(name, "+".join(methods)))
    values = {name: value for name, value in vars(parsed).items() if value is not None}
    config = {f.name: values[f.name] for f in fields if f.name in values}
    return parsed, {**config, "options": {n: values[n] for n in declared if n in values}}


def main(arguments: Sequence[str] | None = None) -> int:
    def run() -> None:
        parsed, values = parse_config(sys.argv[1:] if arguments is None else arguments)
        if parsed.version:
            print(f"mhkd {__version__}, PyTorch {torch.__version__}, loss: {loss_backend()}")
            for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
                print(f"fused loss on {device}: {check_kernel(device) or 'agrees with PyTorch'}")
            return
        config = Config(**values)
        if parsed.teacher and not config.teacher:
            say(f"note: --teacher has no effect with --method {config.method}")
        keep_freed_memory()
        train(config)

    return command_line("mhkd.py", run)


def command_line(program: str, run: Callable[[], Any]) -> int:
    """Run it; what goes wrong ends as one sentence and an exit status."""

    def terminate(*_: Any) -> None:
        raise KeyboardInterrupt("terminated")

    before = None
    with contextlib.suppress(ValueError):  # not in the main thread
        before = signal.signal(signal.SIGTERM, terminate)
    again = "the same command goes on from the last finished epoch"
    status = 1
    try:
        run()
        sys.stdout.flush()
        return 0
    except (UsageError, KernelCrash) as error:
        sentence = str(error)
    except KeyboardInterrupt as error:
        status, sentence = (143 if error.args else 130), f"{str(error) or 'interrupted'}; {again}"
    except BrokenPipeError:  # nobody reads what is printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status, sentence = 141, f"the output was closed; {again}"
    except OSError as error:
        sentence = f"{error}; with that mended, {again}"
    except (MemoryError, RuntimeError) as error:
        text = first_line(error)
        known = ("allocate", "out of memory", "too large", "overflow", "Invalid size")
        if "CUDA error" in text:
            sentence = f"{text}; if it is the fused loss, --backend reference goes without it"
        elif isinstance(error, MemoryError) or any(word in text for word in known):
            sentence = f"there is not enough memory ({text}): try a smaller batch, image or head"
        else:
            raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    with contextlib.suppress(OSError):
        print(f"{program}: {sentence}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.modules["mhkd"] = sys.modules["__main__"]  # what mhkd_baselines.py imports: one copy
    sys.exit(main())
