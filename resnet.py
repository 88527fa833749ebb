"""Residual networks (He et al. 2016, https://arxiv.org/abs/1512.03385) for images of 32, 64 and 224 pixels.

    depth 20 32 44 56 110      three stages of 16, 32, 64 channels, basic blocks (section 4.2 of the paper,
                               but with projections where the shape changes: option B, not A)
    depth 18 34                four stages of 64, 128, 256, 512 channels, basic blocks (section 4.1)
    depth 50 101 152           the same four stages, bottleneck blocks, stride in the 3x3

`width` multiplies the channels of basic blocks, and of the 3x3 in bottlenecks (50x2 is wide_resnet50_2); the
stem keeps its 16 or 64.
Names are torchvision's: at 224 px a state_dict loads into torchvision.models.resnet50(), and back.

    python resnet.py           prints parameters and multiply-adds of the usual depths and widths
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

# depth -> (blocks per stage, bottleneck)
STAGES = {
    20: ((3, 3, 3), False), 32: ((5, 5, 5), False), 44: ((7, 7, 7), False),
    56: ((9, 9, 9), False), 110: ((18, 18, 18), False),
    18: ((2, 2, 2, 2), False), 34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True), 101: ((3, 4, 23, 3), True), 152: ((3, 8, 36, 3), True),
}


def conv(channels_in, channels_out, kernel, stride=1):
    return nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that does not count its batches: num_batches_tracked is read only without a momentum, and on
    a GPU each layer would launch a kernel for it. It stays, since torchvision's state_dict has it."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                            self.momentum, self.eps)


class Block(nn.Module):
    """Basic: 3x3, 3x3. Bottleneck: 1x1, 3x3 of `inner` channels, 1x1. `out` channels leave both."""

    def __init__(self, channels, inner, out, stride, bottleneck):
        super().__init__()
        self.bottleneck = bottleneck
        if bottleneck:
            self.conv1, self.bn1 = conv(channels, inner, 1), BatchNorm(inner)
            self.conv2, self.bn2 = conv(inner, inner, 3, stride), BatchNorm(inner)
            self.conv3, self.bn3 = conv(inner, out, 1), BatchNorm(out)
        else:
            self.conv1, self.bn1 = conv(channels, out, 3, stride), BatchNorm(out)
            self.conv2, self.bn2 = conv(out, out, 3), BatchNorm(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(conv(channels, out, 1, stride), BatchNorm(out))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.bn2(self.conv2(x))
        if self.bottleneck:
            x = self.bn3(self.conv3(F.relu(x, inplace=True)))
        x += shortcut
        return F.relu(x, inplace=True)


class ResNet(nn.Module):
    """A residual network that takes uint8 images and returns logits.

    Args:
        depth: 18 20 32 34 44 50 56 101 110 or 152.
        width: channel multiplier, 1 or more.
        image_size: side in pixels. 32 and 64 get a 3x3 stem; 224 gets 7x7 stride 2 and 3x3 max-pool stride 2.
        num_classes: number of logits.
        mean, std: per channel (red, green, blue), of pixels on the 0..1 scale.
    Raises:
        ValueError: for a depth, width or image size other than these.

    Initial values: convolutions normal, variance 2 / fan_in (He et al. 2015, https://arxiv.org/abs/1502.01852);
    the last batch norm's scale of each block zero, so that blocks begin as the identity (Goyal et al. 2017,
    https://arxiv.org/abs/1706.02677, section 5.1); the classifier zero.
    """

    def __init__(self, depth, width, image_size, num_classes, mean, std):
        super().__init__()
        if depth not in STAGES:
            raise ValueError(f'no ResNet of depth {depth}: choose from {" ".join(map(str, sorted(STAGES)))}')
        if width < 1:
            raise ValueError(f'width {width} is not possible: it multiplies the channels, so 1 or more')
        if image_size not in (32, 64, 224):
            raise ValueError(f'no ResNet for images of {image_size} px: choose from 32 64 224')
        blocks, bottleneck = STAGES[depth]
        stem = 16 if len(blocks) == 3 else 64
        # normalisation as one multiply-add per pixel; not saved: a checkpoint's config carries mean and std
        std = torch.tensor(std).view(1, 3, 1, 1)
        self.register_buffer('scale', 1 / (255 * std), persistent=False)
        self.register_buffer('shift', -torch.tensor(mean).view(1, 3, 1, 1) / std, persistent=False)
        if image_size == 224:
            self.conv1, self.maxpool = conv(3, stem, 7, 2), nn.MaxPool2d(3, 2, padding=1)
        else:
            self.conv1, self.maxpool = conv(3, stem, 3), nn.Identity()
        self.bn1 = BatchNorm(stem)
        channels, self.stages = stem, []
        for i, n in enumerate(blocks):
            inner = stem * 2 ** i * width
            out = stem * 2 ** i * 4 if bottleneck else inner
            stage = nn.Sequential()
            for j in range(n):
                stage.append(Block(channels, inner, out, 2 if i > 0 and j == 0 else 1, bottleneck))
                channels = out
            self.stages.append(f'layer{i + 1}')  # torchvision's names
            self.add_module(self.stages[-1], stage)
        self.fc = nn.Linear(channels, num_classes)

        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_in', nonlinearity='relu')
            elif isinstance(m, Block):
                nn.init.zeros_((m.bn3 if bottleneck else m.bn2).weight)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def features(self, images):
        """uint8 images, N x 3 x H x W -> float32 pooled features, N x channels."""
        x = torch.addcmul(self.shift, images.float(), self.scale)
        if x.device.type == 'mps':  # its batch norm is wrong for channels_last, in which batches come
            x = x.contiguous()
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return x.mean((2, 3), dtype=torch.float32)

    def forward(self, images):
        """uint8 images, N x 3 x H x W -> float32 logits, N x num_classes, whatever the autocast type."""
        x = self.features(images)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 logits would flip 1 % of the argmaxes
            return self.fc(x)


def parameters(net):
    """Number of trained values; batch norm's running statistics are not among them."""
    return sum(p.numel() for p in net.parameters())


def multiply_adds(net, image_size):
    """Multiply-adds of convolutions and classifier for one image; free for a net on device 'meta'."""
    total, training = net.fc.weight.numel(), net.training

    def count(layer, inputs, output):
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, nn.Conv2d)]
    image = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=net.fc.weight.device)
    net.eval().features(image)
    net.train(training)
    for hook in hooks:
        hook.remove()
    return total


def main():
    print('                 parameters                 multiply-adds, millions\n'
          'depth width  10 classes   1000 classes       32 px    64 px    224 px\n'
          '              at 32 px      at 224 px')
    for depth in STAGES:
        for width in (1, 2, 4) if depth == 20 else (1, 2) if depth in (18, 50) else (1,):
            with torch.device('meta'):
                small = ResNet(depth, width, 32, 10, (0.5,) * 3, (0.5,) * 3)  # 64 px has the same stem
                large = ResNet(depth, width, 224, 1000, (0.5,) * 3, (0.5,) * 3)
            macs = [multiply_adds(net, size) / 1e6 for net, size in ((small, 32), (small, 64), (large, 224))]
            print(f'{depth:5} {width:5} {parameters(small):13,} {parameters(large):15,}'
                  f' {macs[0]:8.1f} {macs[1]:8.1f} {macs[2]:9.1f}', flush=True)


if __name__ == '__main__':
    main()
