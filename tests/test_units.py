"""Units are ends of blocks or stages: the table in docs/units.md, and structures that were wrong.

MHKD_ALL_UNITS=1 compares every row of the table, which takes some minutes.
"""

import os
import re

import pytest
import torch
from conftest import ROOT
from torch import nn

import mhkd
import mhkd_custom

ROW = re.compile(r"^\| \w+ \| `(\S+)` \| (\d+) \| (`.+`) \|$", re.MULTILINE)
TABLE = [
    (name, int(size), re.findall(r"`(.+?)`", units))
    for name, size, units in ROW.findall((ROOT / "docs" / "units.md").read_text())
]
FAST = """torchvision:alexnet torchvision:googlenet torchvision:mobilenet_v3_small
    torchvision:resnet18 torchvision:shufflenet_v2_x0_5 torchvision:squeezenet1_0
    torchvision:swin_t torchvision:vgg11 torchvision:vit_b_32 timm:convmixer_768_32 timm:dla34
    timm:gcvit_xxtiny timm:hrnet_w18_small timm:inception_v3 timm:legacy_xception
    timm:mobilenetv4_conv_small timm:regnetx_002 timm:repvgg_a0 timm:vitamin_small_224
    timm:volo_d1_224 timm:xcit_nano_12_p8_224""".split()


def find(model, size, device="cpu"):
    images = torch.zeros(2, 3, size, size, device=device)
    return list(mhkd_custom.find_units(model, images, "student", "some network")[0])


def test_the_table_has_60_families_and_more():
    assert len(TABLE) > 100 and {*FAST} <= {name for name, _, _ in TABLE}


COMPARED = TABLE if os.environ.get("MHKD_ALL_UNITS") else [row for row in TABLE if row[0] in FAST]


@pytest.mark.parametrize("name, size, units", COMPARED, ids=[name for name, _, _ in COMPARED])
def test_the_units_of_a_network_are_those_of_the_table(name, size, units):
    pytest.importorskip(name.partition(":")[0])
    device = "cpu" if "regnet_" in name else "meta"  # shapes alone; some cannot be built so
    with torch.device(device):
        model = mhkd.build_model(name, 10, "random", size)
    assert find(model, size, device) == units


class Block(nn.Module):
    """Expansion at the size of the input, then a convolution that may halve it."""

    def __init__(self, before, channels, stride):
        super().__init__()
        self._expand_conv, self._bn0 = nn.Conv2d(before, 8, 1), nn.BatchNorm2d(8)
        self._depthwise_conv = nn.Conv2d(8, channels, 3, stride, padding=1)

    def forward(self, x):
        return self._depthwise_conv(self._bn0(self._expand_conv(x)))


class Lite(nn.Module):
    """The structure of EfficientNet-Lite: a stem, blocks in a list, a convolution at the end."""

    def __init__(self, strides=(1, 2, 1, 2, 1, 2, 1, 2, 1)):
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 4, 3, 2, padding=1)
        self._blocks = nn.ModuleList(Block(4, 4, stride) for stride in strides)
        self._conv_head, self._fc = nn.Conv2d(4, 8, 1), nn.Linear(8, 10)

    def forward(self, x):
        x = self._conv_stem(x)
        for block in self._blocks:
            x = block(x)
        return self._fc(self._conv_head(x).mean(dim=(2, 3)))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_a_unit_is_not_inside_a_block_that_changes_the_size(size):
    assert find(Lite(), size) == ["_blocks.2", "_blocks.4", "_blocks.6"]


class Tokens(nn.Module):
    """A stem of four convolutions, then blocks of one size: the structure of XCiT."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.mlp(self.mix(x))

    def __init__(self, returns_tuple=False):
        super().__init__()
        convs = [nn.Conv2d(c, 8, 3, 2, padding=1) for c in (3, 8, 8)]
        self.patch_embed = nn.Sequential(*convs)
        self.blocks = nn.ModuleList(Tokens.Block() for _ in range(8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 10)
        if returns_tuple:
            for block in self.blocks:
                block.forward = lambda x, block=block: (x + block.mlp(block.mix(x)), None)
        self.returns_tuple = returns_tuple

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # [B, N, C]
        for block in self.blocks:
            x = block(x)[0] if self.returns_tuple else block(x)
        return self.head(self.norm(x).mean(dim=1))


def test_a_stem_of_several_layers_and_a_final_norm_are_no_units():
    assert find(Tokens(), 64) == ["blocks.1", "blocks.3", "blocks.5"]


def test_blocks_that_return_several_tensors_are_an_error_and_not_taken_by_their_parts():
    with pytest.raises(mhkd.UsageError, match="not detected.*--student-units.*--method kd"):
        find(Tokens(returns_tuple=True), 64)


class Branches(nn.Module):
    """Two modules with branches of several sizes and fusion layers: the structure of HRNet."""

    class Fusing(nn.Module):
        def __init__(self, number):
            super().__init__()
            chains = [nn.Sequential(Block(4, 4, 1), Block(4, 4, 1)) for _ in range(number)]
            self.branches = nn.ModuleList(chains)
            self.fuse_layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(number))

        def forward(self, maps):
            maps = [branch(x) for branch, x in zip(self.branches, maps)]
            return [fuse(x) for fuse, x in zip(self.fuse_layers, maps)]

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(4, 4, 3, 2, padding=1) for _ in range(3))
        self.stages = nn.ModuleList(Branches.Fusing(number) for number in (2, 3, 4))
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        maps = [self.stem(x)]
        for down, stage in zip(self.down, self.stages):
            maps = stage([*maps, down(maps[-1])])
        return self.fc(maps[-1].mean(dim=(2, 3)))


def test_units_are_branches_of_blocks_and_not_fusion_layers():
    units = ["stages.0.branches.0", "stages.1.branches.1", "stages.2.branches.2"]
    assert find(Branches(), 64) == units
