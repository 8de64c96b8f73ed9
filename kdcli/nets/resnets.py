"""The convolutional nets of the distillation literature, for images of 32 x 32 pixels and about as many.

`resnet20`, `resnet56`, …: He et al. 2015 (arXiv:1512.03385, section 4.2), depth 6n + 2, shortcuts of option A.
`resnet8x4`, `resnet32x4`, …: the same, wider, as Tian et al. (arXiv:1910.10699) use them: stem 32, stages 64, 128, 256,
shortcuts by 1 x 1 convolutions. `wrn-40-2`, `wrn-16-1`, …: Zagoruyko and Komodakis (arXiv:1605.07146), depth 6n + 4.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcli import BadInput
from kdcli.config import NET


def build(name: str, channels: int, classes: int) -> nn.Module:
    """The net of a name for images of so many channels. Raises BadInput for a depth that there is not."""
    found = NET.fullmatch(name)
    assert found
    if found["wide_depth"]:
        depth, width = int(found["wide_depth"]), int(found["width"])
        blocks, rest, form = (depth - 4) // 6, (depth - 4) % 6, "6n + 4: 10, 16, 22, 28, 40"
    else:
        depth, width = int(found["depth"]), int(found["times"] or 0)
        blocks, rest, form = (depth - 2) // 6, (depth - 2) % 6, "6n + 2: 8, 14, 20, 32, 44, 56, 110"
    if blocks < 1 or rest or depth > 2_000 or width > 100:
        raise BadInput(f"{name}: there is no net of this depth and width: depths are {form}, …")
    if found["wide_depth"]:
        return WideResNet(blocks, width, channels, classes)
    return ResNet(blocks, (8 * width or 16, *(w * (width or 1) for w in (16, 32, 64))), channels, classes, bool(width))


class _Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut: by a 1 x 1 convolution or, option A, every other pixel with channels of
    zeros on either side."""

    def __init__(self, inside: int, outside: int, stride: int, convolve: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inside, outside, stride), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = _conv(outside, outside), nn.BatchNorm2d(outside)
        self.stride, self.more = stride, outside - inside
        self.shortcut = nn.Sequential()
        if convolve and (stride > 1 or self.more):
            one = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.shortcut = nn.Sequential(one, nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, outside, H / stride, W / stride] of features [N, inside, H, W]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if len(self.shortcut):
            x = self.shortcut(x)
        elif self.stride > 1 or self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(y + x)


class ResNet(nn.Module):
    """Three stages of `blocks` blocks; `widths` of the stem and of the stages."""

    def __init__(self, blocks: int, widths: tuple[int, ...], channels: int, classes: int, convolve: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(channels, widths[0]), nn.BatchNorm2d(widths[0])
        stages = []
        for i, (inside, outside) in enumerate(pairwise(widths)):
            first = _Block(inside, outside, 1 if i == 0 else 2, convolve)
            stages.append(nn.Sequential(first, *(_Block(outside, outside, 1, convolve) for _ in range(blocks - 1))))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(widths[-1], classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, C, H, W]."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class _WideBlock(nn.Module):
    """BatchNorm and ReLU before each convolution; the shortcut of a block that widens starts behind the first."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inside), _conv(inside, outside, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outside), _conv(outside, outside)
        self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False) if inside != outside else None

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, outside, H / stride, W / stride] of features [N, inside, H, W]."""
        before = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(before))))
        features: Tensor = y + (self.shortcut(before) if self.shortcut else x)
        return features


class WideResNet(nn.Module):
    """Three stages of `blocks` blocks, 16, 32 and 64 channels times `width`."""

    def __init__(self, blocks: int, width: int, channels: int, classes: int) -> None:
        super().__init__()
        widths, layers = (16, 16 * width, 32 * width, 64 * width), [_conv(channels, 16)]
        for i, (inside, outside) in enumerate(pairwise(widths)):
            layers.append(_WideBlock(inside, outside, 1 if i == 0 else 2))
            layers += [_WideBlock(outside, outside, 1) for _ in range(blocks - 1)]
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(widths[-1]), nn.ReLU())
        self.linear = nn.Linear(widths[-1], classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, C, H, W]."""
        logits: Tensor = self.linear(self.features(x).mean((2, 3)))
        return logits


def _conv(inside: int, outside: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)


@torch.no_grad()
def _initialise(net: nn.Module) -> None:
    """He et al. 2015 (arXiv:1502.01852): normal, variance 2 / outputs, for the convolutions; torch's for the rest."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
