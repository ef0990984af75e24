"""Writes checkpoints in TensorFlow's format, and runs the authors' SimCLRv2 in NumPy.

Both are written independently of the code that reads them.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kilobatch.trainer.tf_import.crc32c import masked_crc32c

Array = NDArray[Any]
TYPES = {"float32": 1, "float64": 2, "int64": 9}


def varint(n: int) -> bytes:
    return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def write_bundle(prefix: Path, variables: dict[str, Array], shards: int = 1, hollow: bool = False) -> None:
    """Writes prefix.index and its data files, with the variables dealt out over them. hollow: without their bytes."""
    files, rows = [bytearray() for _ in range(shards)], {b"": field(1, shards) + field(3, field(1, 1))}
    for i, name in enumerate(sorted(variables)):
        value, file = variables[name], files[i % shards]
        data = b"" if hollow else value.tobytes()
        shape = b"".join(field(2, field(1, side)) for side in value.shape)
        message = field(1, TYPES[value.dtype.name]) + field(2, shape) + field(3, i % shards) + field(4, len(file))
        crc = masked_crc32c(data).to_bytes(4, "little")
        rows[name.encode()] = message + field(5, len(data)) + varint(6 << 3 | 5) + crc
        file += data
    for i, file in enumerate(files):
        prefix.with_name(f"{prefix.name}.data-{i:05}-of-{shards:05}").write_bytes(file)
    keys, table, index = sorted(rows), bytearray(), {}
    for first in range(0, len(keys), 16):
        part = keys[first : first + 16]
        index[part[-1]] = _append(table, {key: rows[key] for key in part})
    empty, handle = _append(table, {}), _append(table, index)
    footer = (empty + handle).ljust(40, b"\0") + (0xDB4775248B80FB57).to_bytes(8, "little")
    prefix.with_name(prefix.name + ".index").write_bytes(bytes(table) + footer)


def _append(table: bytearray, rows: dict[bytes, bytes]) -> bytes:
    """Appends a block, in which a key omits what it has in common with the key before; returns the block's handle."""
    block, before = bytearray(), b""
    for key, value in rows.items():
        shared = 0
        while shared < min(len(key), len(before)) and key[shared] == before[shared]:
            shared += 1
        block += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    block += bytes(4) + (1).to_bytes(4, "little")  # one restart, at 0
    at = len(table)
    table += block + b"\0"
    table += masked_crc32c(bytes(table[at:])).to_bytes(4, "little")
    return varint(at) + varint(len(block))


class Authors:
    """google-research/simclr, resnet.py and model_util.py, in eval mode.

    A call makes the variables in the authors' order, which gives them their names. variables: those of the last call,
    by TensorFlow 1's names.
    """

    def __init__(self, depths: tuple[int, ...], sk_ratio: float, layers: int, classes: int, selector: int) -> None:
        self.depths, self.sk_ratio, self.layers, self.classes, self.selector = (
            depths,
            sk_ratio,
            layers,
            classes,
            selector,
        )
        self.variables: dict[str, Array] = {}
        self.made: dict[str, int] = {}
        self.rng = np.random.default_rng(0)

    def __call__(self, images: Array) -> dict[str, Array]:
        """images (N, H, W, 3) -> features, projections, logits."""
        self.variables.clear()
        self.made.clear()
        x = self.stem(images)
        for i, depth in enumerate(self.depths):
            for j in range(depth):
                x = self.block(x, 64 * 2**i, 2 if i > 0 and j == 0 else 1, j == 0)
        x = x.mean((1, 2))
        seen, out = [x], {"features": x}
        for j in range(self.layers):
            last, scope = j == self.layers - 1, f"head_contrastive/nl_{j}"
            x = x @ self.variable(f"{scope}/dense/kernel", (x.shape[1], 24 if last else x.shape[1]), x.shape[1])
            x = self.norm_as(f"{scope}/batch_normalization", x, relu=not last, center=not last)
            seen.append(x)
        out["projections"] = x
        if self.classes:
            scope, x = "head_supervised/linear_layer/dense", seen[self.selector]
            kernel = self.variable(f"{scope}/kernel", (x.shape[1], self.classes), x.shape[1])
            out["logits"] = x @ kernel + self.variable(f"{scope}/bias", (self.classes,), 1)
        return out

    def stem(self, x: Array) -> Array:
        if self.sk_ratio:
            x = self.norm(self.conv(x, 32, 3, 2))
            x = self.norm(self.conv(x, 32, 3, 1))
            x = self.norm(self.conv(x, 64, 3, 1))
        else:
            x = self.norm(self.conv(x, 64, 7, 2))
        # SAME padding: an output for every second pixel, with equal padding on both sides and an odd pixel at the end.
        pads = [max((-(-side // 2) - 1) * 2 + 3 - side, 0) for side in x.shape[1:3]]
        padded = np.pad(x, ((0, 0), *((pad // 2, pad - pad // 2) for pad in pads), (0, 0)))
        return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::2, ::2].max((4, 5))

    def block(self, x: Array, f: int, stride: int, projects: bool) -> Array:
        shortcut = x
        if projects:
            if self.sk_ratio:
                shortcut = self.pooled(x, stride)
            shortcut = self.norm(self.conv(shortcut, 4 * f, 1, 1 if self.sk_ratio else stride), relu=False)
        x = self.norm(self.conv(x, f, 1, 1))
        if self.sk_ratio:
            x = self.norm(self.conv(x, 2 * f, 3, stride))
            streams = np.stack(np.split(x, 2, axis=3))
            seen = self.conv(streams.sum(0).mean((1, 2), keepdims=True), max(int(f * self.sk_ratio), 32), 1, 1)
            mixing = np.exp(np.stack(np.split(self.conv(self.norm(seen), 2 * f, 1, 1), 2, axis=3)))
            x = (streams * mixing / mixing.sum(0)).sum(0)
        else:
            x = self.norm(self.conv(x, f, 3, stride))
        return np.maximum(self.norm(self.conv(x, 4 * f, 1, 1), relu=False) + shortcut, 0)

    def pooled(self, x: Array, stride: int) -> Array:
        """Averages of 2x2 pixels: at stride 1 of those in the image, at stride 2 with zeros after its end."""
        n, height, width, c = x.shape
        total, count = np.zeros((n, height + 1, width + 1, c)), np.zeros((height + 1, width + 1, 1))
        total[:, :height, :width], count[:height, :width] = x, 1

        def windows(a: Array) -> Array:
            parts = [a[..., i : i + height : stride, j : j + width : stride, :] for i in (0, 1) for j in (0, 1)]
            return np.sum(parts, 0)

        return windows(total) / (windows(count) if stride == 1 else 4)

    def conv(self, x: Array, filters: int, k: int, stride: int) -> Array:
        kernel = self.variable(f"{self.numbered('conv2d')}/kernel", (k, k, x.shape[3], filters), k * k * x.shape[3])
        x = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (1, 2))[:, ::stride, ::stride]
        n, height, width = windows.shape[:3]
        flat = windows.transpose(0, 1, 2, 4, 5, 3).reshape(n * height * width, -1)
        return (flat @ kernel.reshape(-1, filters)).reshape(n, height, width, filters)

    def norm(self, x: Array, relu: bool = True) -> Array:
        return self.norm_as(self.numbered("batch_normalization"), x, relu, center=True)

    def norm_as(self, scope: str, x: Array, relu: bool, center: bool) -> Array:
        c = x.shape[-1:]
        gamma = self.variable(f"{scope}/gamma", c, 0)
        beta = self.variable(f"{scope}/beta", c, 1) if center else 0
        mean, var = self.variable(f"{scope}/moving_mean", c, 1), self.variable(f"{scope}/moving_variance", c, 0)
        x = (x - mean) / np.sqrt(var + 1e-5) * gamma + beta
        return np.maximum(x, 0) if relu else x

    def numbered(self, kind: str) -> str:
        n = self.made.get(kind, 0)
        self.made[kind] = n + 1
        return f"base_model/{kind}_{n}" if n else f"base_model/{kind}"

    def variable(self, name: str, shape: tuple[int, ...], inputs: int) -> Array:
        """Makes a variable: with inputs 0 of positive numbers, as for gammas, else of normal ones, scaled by inputs."""
        value = self.rng.random(shape, np.float32) * 0.5 + 0.5 if not inputs else None
        if value is None:
            value = self.rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(max(inputs, 25)))
        self.variables[name] = value
        return value.astype(np.float64)
