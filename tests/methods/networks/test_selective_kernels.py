"""ResNets of SimCLRv2: sizes, selective kernels and poolings against plain NumPy."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kilobatch.data.errors import UserError
from kilobatch.methods.networks.batch_norm import BatchNorm
from kilobatch.methods.networks.resnet import ResNet, SelectiveBottleneck, _max_pool_same, resnet
from kilobatch.methods.networks.selective_kernels import AveragePool, SelectiveKernels

# SimCLRv2, table 1, counted to two places; the table itself prints 233 and 354 for 232.25 and 353.40.
SIZES = [
    (50, 1, 0, 23.51),
    (50, 1, 0.0625, 35.22),
    (50, 2, 0, 93.91),
    (50, 2, 0.0625, 140.31),
    (101, 1, 0, 42.50),
    (101, 1, 0.0625, 64.66),
    (101, 2, 0, 169.77),
    (101, 2, 0.0625, 257.13),
    (152, 1, 0, 58.14),
    (152, 1, 0.0625, 88.94),
    (152, 2, 0, 232.25),
    (152, 2, 0.0625, 353.40),
    (152, 3, 0.0625, 794.70),
]
Array = NDArray[np.float64]


@pytest.mark.parametrize(("depth", "width", "sk_ratio", "millions"), SIZES)
def test_parameters_of_table_1(depth: int, width: int, sk_ratio: float, millions: float) -> None:
    with torch.device("meta"):
        encoder = resnet(depth, width, sk_ratio)
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 2) == millions
    assert encoder.features == 2048 * width


def test_what_no_resnet_is_gets_refused() -> None:
    cases = {
        (20, 1, 0.0): "there is no ResNet-20; known: resnet18, ",
        (50, 16, 0.0): "width 16 for resnet50: of a ResNet it is a multiple of its channels, 1 to 4",
        (18, 1, 0.0625): "sk_ratio 0.0625 for resnet18: selective kernels stand in bottlenecks; use resnet50, ",
    }
    for arguments, message in cases.items():
        with pytest.raises(UserError, match=message):
            resnet(*arguments)


def conv(x: Array, kernel: Array, stride: int = 1) -> Array:
    """x (N, C, H, W), kernel (O, C, k, k), k // 2 zeros around."""
    k = kernel.shape[2]
    x = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (2, 3))[:, :, ::stride, ::stride]
    return np.einsum("nchwij,ocij->nohw", windows, kernel)


def norm(x: Array, of: BatchNorm) -> Array:
    """With the batch's own statistics, as in training."""
    assert of.bias is not None
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    gamma, beta = (p.detach().numpy()[:, None, None] for p in (of.weight, of.bias))
    return (x - mean) / np.sqrt(var + 1e-5) * gamma + beta


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


@pytest.mark.parametrize("stride", [1, 2])
def test_selective_kernels(stride: int) -> None:
    torch.manual_seed(0)
    sk = SelectiveKernels(48, stride, "local", 0.75)
    randomised(sk)
    x = torch.randn(5, 48, 7, 6, dtype=torch.float64)
    weights = {name: p.detach().numpy() for name, p in sk.named_parameters()}
    streams = np.maximum(norm(conv(x.numpy(), weights["conv.weight"], stride), sk.bn), 0)
    a, b = streams[:, :48], streams[:, 48:]
    seen = (a + b).mean((2, 3), keepdims=True)
    squeezed = np.maximum(norm(conv(seen, weights["squeeze.weight"]), sk.squeeze_bn), 0)
    assert squeezed.shape[1] == 36
    mixing = conv(squeezed, weights["mix.weight"])
    e_a, e_b = np.exp(mixing[:, :48]), np.exp(mixing[:, 48:])
    want = (a * e_a + b * e_b) / (e_a + e_b)
    np.testing.assert_allclose(sk(x).detach().numpy(), want, atol=1e-12)
    assert SelectiveKernels(48, 1, "local", 0.0625).squeeze.out_channels == 32  # 48 / 16 is 3


@pytest.mark.parametrize(("side", "stride"), [(6, 1), (5, 1), (6, 2), (5, 2)])
def test_average_pool(side: int, stride: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, side, side))
    want = np.zeros((2, 3, -(-side // stride), -(-side // stride)))
    for i, j in np.ndindex(want.shape[2:]):
        inside = x[:, :, stride * i : stride * i + 2, stride * j : stride * j + 2]
        # what reaches beyond the edge does not count at stride 1, and counts as zeros at stride 2
        want[:, :, i, j] = inside.mean((2, 3)) if stride == 1 else inside.sum((2, 3)) / 4
    np.testing.assert_allclose(AveragePool(stride)(torch.from_numpy(x)).numpy(), want, atol=1e-14)


@pytest.mark.parametrize("shape", [(6, 6), (7, 7), (6, 7)])
def test_max_pool_begins_at_the_first_pixel_of_an_even_side(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).random((2, 3, *shape))
    padded = np.pad(x, ((0, 0), (0, 0), *((side % 2, 1) for side in shape)))
    want = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2].max((4, 5))
    assert np.array_equal(_max_pool_same(torch.from_numpy(x)).numpy(), want)


def test_a_block_is_shortcut_plus_residual() -> None:
    torch.manual_seed(0)
    block = SelectiveBottleneck(16, 8, 2, "local", 0.0625)
    randomised(block)
    x = torch.randn(4, 16, 6, 6, dtype=torch.float64)

    def apart(x: Tensor) -> Array:
        y = torch.from_numpy(np.maximum(norm(conv(x.numpy(), block.conv1.weight.detach().numpy()), block.bn1), 0))
        y = norm(conv(block.sk(y).detach().numpy(), block.conv3.weight.detach().numpy()), block.bn3)
        assert block.downsample is not None
        kernel, scale = block.downsample.get_parameter("1.weight"), block.downsample.get_submodule("2")
        assert isinstance(scale, BatchNorm)
        pooled = x.numpy().reshape(4, 16, 3, 2, 3, 2).mean((3, 5))
        return np.maximum(y + norm(conv(pooled, kernel.detach().numpy()), scale), 0)

    np.testing.assert_allclose(block(x).detach().numpy(), apart(x), atol=1e-12)


@pytest.mark.parametrize(("stem", "sides"), [("imagenet", [16, 8, 4, 2]), ("cifar", [64, 32, 16, 8])])
def test_stems_with_selective_kernels(stem: str, sides: list[int]) -> None:
    encoder = ResNet("resnet50", "cifar" if stem == "cifar" else "imagenet", "local", sk_ratio=0.0625)
    seen: list[int] = []
    for i in range(1, 5):
        encoder.get_submodule(f"layer{i}").register_forward_hook(lambda m, args, out: seen.append(out.shape[2]))
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, 2048)
    assert seen == sides
    assert sum(isinstance(m, nn.Conv2d) for m in encoder.modules()) == 16 * 5 + 4 + (1 if stem == "cifar" else 3)
    assert all(
        not block.last_norm.weight.any() for block in encoder.modules() if isinstance(block, SelectiveBottleneck)
    )
