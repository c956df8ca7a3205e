"""Data sets: files as published, everything that can be wrong with them, and batches of them."""

import errno
import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparsebreg.core.errors import DataError
from sparsebreg.experiments.data import cifar10, tiny_imagenet
from sparsebreg.experiments.data import datasets as data
from sparsebreg.experiments.data import idx as idx_files
from sparsebreg.experiments.data.batches import Batches, augment


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


FILES = {
    "train-images-idx3-ubyte": np.random.default_rng(0).integers(0, 256, (50, 28, 28)),
    "train-labels-idx1-ubyte": np.arange(50) % 10,
    "t10k-images-idx3-ubyte": np.random.default_rng(1).integers(0, 256, (20, 28, 28)),
    "t10k-labels-idx1-ubyte": np.arange(20) % 10,
}


def write(folder, zipped=False, **changes):
    for name, array in FILES.items():
        raw = changes.get(name.split("-ubyte")[0].replace("-", "_"), idx(array))
        if raw is None:
            continue
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(raw) if zipped else raw)
    return folder


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx(tmp_path, zipped, name):
    d = data.load(name, write(tmp_path, zipped))
    assert d.shape == (1, 28, 28)
    assert (len(d.train), len(d.test), d.classes) == (50, 20, 10)
    assert d.train.images.dtype is torch.uint8
    standard = d.standardise(d.train.images)
    assert abs(standard.mean()) < 1e-5
    assert abs(standard.std() - 1) < 1e-3
    raw = torch.from_numpy(FILES["t10k-images-idx3-ubyte"][3].astype(np.float32))
    mean, std = FILES["train-images-idx3-ubyte"].mean(), FILES["train-images-idx3-ubyte"].std()
    assert torch.allclose(d.standardise(d.test.images)[3, 0], (raw - mean) / std, atol=1e-3)
    assert d.test.labels.tolist() == FILES["t10k-labels-idx1-ubyte"].tolist()


def test_digits():
    d = data.load("digits")
    assert d.shape == (1, 8, 8)
    assert len(d.train) + len(d.test) == 1797
    assert d.train.labels.unique().tolist() == list(range(10))


GOOD = idx(FILES["train-images-idx3-ubyte"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t10k_labels_idx1": None}, "data_dir: expected a file t10k-labels-idx1-ubyte or"),
        ({"train_images_idx3": GOOD[:-5]}, "expected 39200 bytes of data for shape .*, got 39195"),
        ({"train_images_idx3": GOOD + b"x"}, "expected 39200 bytes of data for shape .*, got 39201"),
        ({"train_images_idx3": GOOD[:9]}, "expected a header of 16 bytes, got 9 bytes"),
        ({"train_images_idx3": b""}, "expected an IDX file"),
        ({"train_images_idx3": b"PK\x03\x04" + GOOD}, "expected an IDX file"),
        ({"train_images_idx3": idx(FILES["train-labels-idx1-ubyte"])}, "in 3 dimensions, got type 0x08 in 1"),
        ({"train_images_idx3": b"\0\0\x0d" + GOOD[3:]}, "got type 0x0d in 3"),
        ({"train_images_idx3": gzip.compress(GOOD)[:-100]}, "expected a readable IDX file"),
        ({"train_images_idx3": idx(np.zeros((50, 32, 32)))}, "expected images of 28 x 28, got 32 x 32"),
        ({"train_labels_idx1": idx(np.arange(49) % 10)}, "expected 50 labels, one per image, got 49"),
        ({"train_labels_idx1": idx(np.arange(50) % 11)}, "expected labels from 0 to 9, got 10"),
    ],
)
def test_damaged_files(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        data.load("mnist", write(tmp_path, **changes))


@pytest.fixture
def published(monkeypatch):
    """The files of this test are the published ones of MNIST."""
    known = {name.removesuffix("-ubyte"): idx(array) for name, array in FILES.items()}
    known = {
        stem: (len(raw), {"mnist": hashlib.md5(raw).hexdigest(), "fashion-mnist": "f" * 32})
        for stem, raw in known.items()
    }
    monkeypatch.setattr(idx_files, "IDX_MD5", known)
    return known


@pytest.mark.parametrize("zipped", [False, True])
def test_checksums_of_idx_files(tmp_path, published, zipped, monkeypatch):
    plain, hashed = hashlib.md5, []
    monkeypatch.setattr(hashlib, "md5", lambda raw, **k: hashed.append(len(raw)) or plain(raw, **k))
    data.load("mnist", write(tmp_path, zipped))
    assert hashed == [published[stem][0] for stem in published]  # each once
    wanted = "train-images-idx3-ubyte.*: expected the published file of fashion-mnist .md5 f{32}., got that of mnist"
    with pytest.raises(DataError, match=wanted):
        data.load("fashion-mnist", tmp_path)


@pytest.mark.parametrize("stem", [name.removesuffix("-ubyte") for name in FILES])
def test_changed_idx_files(tmp_path, published, stem):
    raw = idx(FILES[f"{stem}-ubyte"])
    changed = raw[:-1] + bytes([raw[-1] ^ 1])  # a label stays one
    wanted = f"{stem}-ubyte: expected the published file of mnist .md5 {published[stem][1]['mnist']}., got md5 "
    with pytest.raises(DataError, match=wanted):
        data.load("mnist", write(tmp_path, **{stem.replace("-", "_"): changed}))


def test_excerpts_of_idx_files(tmp_path, published):
    changes = {
        f"{split}_{part}": idx(FILES[f"{split}-{part.replace('_', '-')}-ubyte"][:10])
        for split in ("train", "t10k")
        for part in ("images_idx3", "labels_idx1")
    }
    assert len(data.load("fashion-mnist", write(tmp_path, **changes)).train) == 10


FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_published_fashion_mnist():
    d = data.load("fashion-mnist", FASHION)
    assert (len(d.train), len(d.test)) == (60000, 10000)
    with pytest.raises(DataError, match="expected the published file of mnist .*, got that of fashion-mnist"):
        data.load("mnist", FASHION)


def test_missing_folder_and_unknown_name(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SEARCH", {"mnist": (), "fashion-mnist": ()})
    with pytest.raises(DataError, match="data_dir: expected a folder, got"):
        data.load("mnist", tmp_path / "nowhere")
    with pytest.raises(DataError, match="data_dir: expected a folder with the IDX files of mnist, got none given"):
        data.load("mnist")
    with pytest.raises(ValueError, match="data: expected one of digits, .*mnist.*, got 'imagenet21k'"):
        data.load("imagenet21k")


def cifar_batches(n=6):
    rng = np.random.default_rng(2)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {name: (rng.integers(0, 256, (n, 3072), dtype=np.uint8), rng.integers(0, 10, n)) for name in names}


CIFAR = cifar_batches()


def old_pickle(images, labels):
    """A batch as Python 2 with its numpy wrote it: protocol 2, old module names, byte strings."""
    batch = {
        b"batch_label": b"training batch 1 of 5",
        b"labels": labels.tolist(),
        b"data": images,
        b"filenames": [b"x.png"] * len(labels),
    }
    return pickle.dumps(batch, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar_files(binary):
    """The files in the folder of CIFAR-10, among them those that no one reads."""
    names = [f"class {i}" for i in range(10)]
    if binary:
        yield "batches.meta.txt", "\n".join([*names, ""]).encode()
    else:
        yield "batches.meta", pickle.dumps({b"num_cases_per_batch": 6, b"label_names": names}, protocol=2)
    for name, (images, labels) in CIFAR.items():
        if binary:
            yield f"{name}.bin", np.hstack([labels[:, None].astype(np.uint8), images]).tobytes()
        else:
            yield name, old_pickle(images, labels)
    yield "readme.html", b"<html></html>"


def write_cifar(root, how, binary, **changes):
    """Writes CIFAR-10 as an archive or a folder; returns what --data-dir is told."""
    inner = "cifar-10-batches-bin" if binary else "cifar-10-batches-py"
    files = {n: changes.get(n.removesuffix(".bin"), raw) for n, raw in cifar_files(binary)}
    files = {n: raw for n, raw in files.items() if raw is not None}
    if how.startswith("folder"):
        (root / inner).mkdir(parents=True)
        for name, raw in files.items():
            (root / inner / name).write_bytes(raw)
        return root / inner if how == "folder" else root
    path = root / f"cifar-10-{'binary' if binary else 'python'}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, raw in files.items():
            member = tarfile.TarInfo(f"{inner}/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path if how == "archive" else root


@pytest.mark.parametrize("how", ["folder", "folder_above", "archive", "archive_in_folder"])
@pytest.mark.parametrize("binary", [False, True], ids=["python", "binary"])
def test_cifar10(tmp_path, how, binary):
    d = data.load("cifar10", write_cifar(tmp_path, how, binary))
    assert (d.shape, d.classes, len(d.train), len(d.test)) == ((3, 32, 32), 10, 30, 6)
    images = np.concatenate([CIFAR[f"data_batch_{i}"][0] for i in range(1, 6)]).reshape(-1, 3, 32, 32)
    assert np.array_equal(d.train.images.numpy(), images)
    assert d.train.labels.tolist() == [y for i in range(1, 6) for y in CIFAR[f"data_batch_{i}"][1]]
    assert d.test.labels.tolist() == CIFAR["test_batch"][1].tolist()
    channels = images.astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1)
    assert np.allclose(d.mean.flatten(), channels.mean(1), rtol=1e-5)
    assert np.allclose(d.std.flatten(), channels.std(1), rtol=1e-5)


class Evil:
    def __reduce__(self):
        return print, ("code from a pickle ran",)


@pytest.mark.parametrize(
    ("binary", "changes", "message"),
    [
        (False, {"data_batch_3": None}, "six batches of CIFAR-10, among them data_batch_3, got none"),
        (True, {"test_batch": None}, "six batches of CIFAR-10, among them test_batch.bin, got none"),
        (False, {"data_batch_2": old_pickle(*CIFAR["test_batch"])[:-900]}, "data_batch_2: expected a dictionary with"),
        (False, {"data_batch_2": b""}, "data_batch_2: expected a dictionary with data .* got EOFError"),
        (False, {"data_batch_2": pickle.dumps([1, 2])}, "data_batch_2: expected a dictionary with"),
        (False, {"data_batch_2": pickle.dumps(Evil())}, "builtins.print is not data"),
        (False, {"data_batch_2": old_pickle(np.zeros((6, 3000), np.uint8), np.arange(6))}, "got uint8 of shape"),
        (False, {"data_batch_2": old_pickle(np.zeros((6, 3072), np.uint8), np.arange(5))}, "6 labels, one per image"),
        (False, {"data_batch_2": old_pickle(np.zeros((6, 3072), np.uint8), np.arange(6) + 5)}, "from 0 to 9, got 10"),
        (False, {"data_batch_2": old_pickle(np.zeros((5, 3072), np.uint8), np.arange(5))}, "expected 6 images, as the"),
        (True, {"data_batch_2": bytes(3073 * 6 - 1)}, "expected records of 3073 bytes, got 18437 bytes"),
        (True, {"data_batch_2": bytes(3073 * 5)}, "expected 6 images, as the first batch has, got 5"),
        (True, {"data_batch_2": b"\x0a" * 3073 * 6}, "labels from 0 to 9, got 10"),
    ],
)
def test_damaged_cifar10(tmp_path, binary, changes, message, capsys):
    with pytest.raises(DataError, match=message):
        data.load("cifar10", write_cifar(tmp_path, "folder", binary, **changes))
    assert "ran" not in capsys.readouterr().out


def test_damaged_cifar10_archives(tmp_path, monkeypatch):
    path = write_cifar(tmp_path, "archive", False)
    whole = path.read_bytes()
    for raw in (whole[: len(whole) // 2], b"no archive", b"", whole[:100] + bytes(20) + whole[120:]):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=r"tar.gz: expected a readable .tar.gz archive"):
            data.load("cifar10", path)
    path.write_bytes(whole)
    data.load("cifar10", path)
    monkeypatch.setattr(cifar10, "CHECKED_BYTES", {True: 0, False: 0})  # as large as the published one
    with pytest.raises(DataError, match="published file .md5 c58f30108f718f92721af3b95e74349a., got md5"):
        data.load("cifar10", path)
    with pytest.raises(DataError, match="data_batch_1: expected the published file .md5 c99cafc1"):
        data.load("cifar10", write_cifar(tmp_path / "b", "folder", False))
    with pytest.raises(DataError, match="data_dir: expected a folder or a .tar.gz archive, got"):
        data.load("cifar10", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data_dir: expected cifar-10-python.tar.gz, .* got none"):
        data.load("cifar10", tmp_path / "empty")


WNIDS = ["n02", "n01", "n03"]


def write_tiny(root, size=8, each=2):
    """Tiny ImageNet as published, of three classes with every second image grey, and four validation images."""
    root = root / "tiny-imagenet-200"
    for split in ("val", "test"):
        (root / split / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "words.txt").write_text("".join(f"{wnid}\ta word, another\n" for wnid in ["n00", *WNIDS]))
    Image.new("RGB", (size, size)).save(root / "test" / "images" / "test_0.JPEG")
    for i, wnid in enumerate(WNIDS):
        folder = root / "train" / wnid
        (folder / "images").mkdir(parents=True)
        (folder / f"{wnid}_boxes.txt").write_text("".join(f"{wnid}_{k}.JPEG\t0\t0\t7\t7\n" for k in range(each)))
        for k in range(each):
            image = Image.new("L", (size, size), 40 * i) if k % 2 else Image.new("RGB", (size, size), (40 * i, 200, 90))
            image.save(folder / "images" / f"{wnid}_{k}.JPEG", quality=95)
    rows = []
    for i, wnid in enumerate(["n03", "n01", "n01", "n02"]):
        Image.new("RGB", (size, size), (9 * i, 9, 9)).save(root / "val" / "images" / f"val_{i}.JPEG")
        rows.append(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    return root


@pytest.fixture
def tiny(tmp_path):
    return write_tiny(tmp_path)


@pytest.mark.parametrize("above", [False, True])
def test_tiny_imagenet(tiny, above, monkeypatch):
    d = data.load("tiny-imagenet", tiny.parent if above else tiny)
    assert (d.shape, d.classes, len(d.train), len(d.test)) == ((3, 8, 8), 3, 6, 4)
    assert d.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert d.test.labels.tolist() == [2, 1, 1, 0]
    assert (d.train.images[2, :, 0, 0].int() - torch.tensor([40, 200, 90])).abs().max() <= 3  # JPEG is lossy
    assert torch.equal(d.train.images[5, 0], d.train.images[5, 2])
    monkeypatch.setattr(tiny_imagenet, "_decode", None)  # from the cache this time
    again = data.load("tiny-imagenet", tiny)
    assert torch.equal(again.train.images, d.train.images)
    assert torch.equal(again.test.images, d.test.images)


def test_cache_of_tiny_imagenet_follows_the_files(tiny):
    cache = tiny / "sparsebreg-cache.npz"
    first = data.load("tiny-imagenet", tiny)
    Image.new("RGB", (8, 8), (250, 250, 250)).save(tiny / "val" / "images" / "val_2.JPEG")
    changed = data.load("tiny-imagenet", tiny)
    assert not torch.equal(first.test.images, changed.test.images)
    for raw in (cache.read_bytes()[:-300], b"PK\x03\x04", b""):
        cache.write_bytes(raw)
        assert torch.equal(data.load("tiny-imagenet", tiny).test.images, changed.test.images)
    assert cache.stat().st_size > 300


def test_cache_of_tiny_imagenet_is_written_whole_or_not_at_all(tiny, monkeypatch):
    path, before = tiny / "sparsebreg-cache.npz", sorted(tiny.iterdir())
    with ThreadPoolExecutor(4) as pool:  # as processes do that begin at once
        list(pool.map(lambda i: tiny_imagenet._save_cache(path, x=np.full(100_000, i)), range(12)))
    with np.load(path) as saved:
        assert len(set(saved["x"].tolist())) == 1
    path.unlink()
    assert sorted(tiny.iterdir()) == before

    def full(file, **arrays):
        file.write(b"a part")
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(np, "savez", full)
    assert len(data.load("tiny-imagenet", tiny).train) == 6
    assert sorted(tiny.iterdir()) == before


def test_damaged_tiny_imagenet(tiny):
    def fails(message):
        with pytest.raises(DataError, match=message):
            data.load("tiny-imagenet", tiny)

    val, image = tiny / "val" / "val_annotations.txt", tiny / "train" / "n01" / "images" / "n01_1.JPEG"
    jpeg, lines = image.read_bytes(), val.read_text()
    image.write_bytes(jpeg[: len(jpeg) // 2])
    fails("n01_1.JPEG: expected a readable JPEG image")
    image.write_bytes(b"")
    fails("n01_1.JPEG: expected a readable JPEG image")
    Image.new("RGB", (9, 8)).save(image)
    fails(r"n01_1.JPEG: expected an image of shape \(3, 8, 8\), got \(3, 8, 9\)")
    image.unlink()
    fails("n01/images: expected 2 images, as the first class has, got 1")
    image.write_bytes(jpeg)
    image.parent.rename(image.parent.with_name("pictures"))
    fails("n01/images: expected a folder of Tiny ImageNet, got .*No such file")
    image.parent.with_name("pictures").rename(image.parent)
    val.write_text(lines + "val_3.JPEG\tn77\n")
    fails("expected lines of a file name and a class of wnids.txt, got 'val_3.JPEG.*n77'")
    val.write_text(lines + "\n")  # an empty line is none
    assert len(data.load("tiny-imagenet", tiny).test) == 4
    val.write_text("")
    fails("val_annotations.txt: expected a line for every image, got none")
    val.unlink()
    fails("val_annotations.txt: expected a text file of Tiny ImageNet")
    val.write_text(lines)
    (tiny / "wnids.txt").write_text("")
    fails("wnids.txt: expected class names, one a line, got none")
    (tiny / "wnids.txt").unlink()
    fails("data_dir: expected the unpacked tiny-imagenet-200 with wnids.txt")


def test_lists_of_tiny_imagenet_name_what_is_there(tiny):
    def fails(message):
        with pytest.raises(DataError, match=message):
            data.load("tiny-imagenet", tiny)

    val, wnids = tiny / "val" / "val_annotations.txt", tiny / "wnids.txt"
    lines = val.read_text()
    names = "val_annotations.txt: expected the names in .*val/images, each once, got "
    val.write_text(lines + "val_9.JPEG\tn02\t0\n")
    fails(names + "'val_9.JPEG', which is not there")
    val.write_text(lines + "../images/val_1.JPEG\tn01\t0\n")
    fails(names + "'../images/val_1.JPEG', which is not there")
    val.write_text(lines + "val_3.JPEG\tn01\t0\n")
    fails(names + "'val_3.JPEG' more than once")
    val.write_text("".join(line for line in lines.splitlines(True) if "val_2" not in line))
    fails(names + "no line for 'val_2.JPEG'")
    (tiny / "val" / "images" / "val_2.JPEG").unlink()
    (tiny / "val" / "images" / "._val_1.JPEG").write_bytes(b"")  # hidden: no image
    assert len(data.load("tiny-imagenet", tiny).test) == 3
    names = "wnids.txt: expected the names in .*train, each once, got "
    for classes, message in (
        (["n02", "n01"], "no line for 'n03'"),
        (["n02", "n01", "n03", "n04"], "'n04', which is not there"),
        (["n02", "n01", "n03", "n02"], "'n02' more than once"),
    ):
        wnids.write_text("\n".join(classes))
        fails(names + message)
    wnids.write_text("\n".join(WNIDS))
    (tiny / "train" / "n03").rename(tiny / "train" / "n04")
    fails(names + "'n03', which is not there")


def test_search_goes_past_folders_without_the_files(tmp_path, tiny, monkeypatch):
    places = {}
    for name in ("nowhere", "empty", "mnist", "part", "cifar"):
        places[name] = tmp_path / name
        if name != "nowhere":
            places[name].mkdir()
    write(places["mnist"])
    write(places["part"], t10k_labels_idx1=None)
    write_cifar(places["cifar"], "archive", True)
    before = (places["nowhere"], places["empty"])
    search = {
        "mnist": (*before, places["mnist"]),
        "fashion-mnist": (*before, places["part"], places["mnist"]),
        "cifar10": (*before, places["cifar"]),
        "tiny-imagenet": (*before, tiny.parent),
    }
    monkeypatch.setattr(data, "SEARCH", search)
    assert {name: len(data.load(name).train) for name in ("mnist", "cifar10", "tiny-imagenet")} == {
        "mnist": 50,
        "cifar10": 30,
        "tiny-imagenet": 6,
    }
    with pytest.raises(DataError, match="expected a file t10k-labels-idx1-ubyte or .* in .*part, got none"):
        data.load("fashion-mnist")
    monkeypatch.setattr(data, "SEARCH", {name: [str(p) for p in before] for name in search})
    for name in search:
        with pytest.raises(DataError, match="data_dir: expected a folder with .* none given.*nowhere or .*empty"):
            data.load(name)


def test_synthetic_is_the_same_every_time():
    a, b = data.load("synthetic"), data.load("synthetic")
    assert (a.shape, a.classes, len(a.train), len(a.test)) == ((3, 32, 32), 10, 5120, 1280)
    assert torch.equal(a.train.images, b.train.images)
    nearest = torch.stack([a.train.images[a.train.labels == c].float().mean(0) for c in range(10)])
    distance = torch.cdist(a.test.images.flatten(1).float(), nearest.flatten(1))
    assert (distance.argmin(1) == a.test.labels).float().mean() > 0.9  # there is something to learn


def test_validation_split():
    whole, split = data.load("digits"), data.load("digits", validation=0.1)
    assert len(split.validation) == round(0.1 * len(whole.train))
    assert len(split.train) == len(whole.train) - len(split.validation)
    assert torch.equal(split.test.images, whole.test.images)
    assert whole.validation is None

    def bag(*splits):
        return sorted(bytes(i.flatten().tolist()) for s in splits for i in s.images)

    assert bag(split.train, split.validation) == bag(whole.train)
    assert torch.equal(split.validation.images, data.load("digits", validation=0.1).validation.images)
    assert torch.allclose(split.mean, split.train.images.float().mean((0, 2, 3)).view(-1, 1, 1), rtol=1e-5)
    for value, message in ((1.0, "below 1, got 1.0"), (-0.1, "at least 0, got -0.1"), (1e-6, "splits 1438 images")):
        with pytest.raises(ValueError, match=f"validation: expected .*{message}"):
            data.load("digits", validation=value)


def test_augment_is_a_crop_of_the_padded_image_or_its_mirror():
    images = torch.randint(1, 256, (40, 3, 7, 5), dtype=torch.uint8)
    before = images.clone()
    out = augment(images, torch.Generator().manual_seed(1), pad=2)
    assert torch.equal(images, before)
    assert out.shape == images.shape
    assert out.dtype is torch.uint8
    seen = set()
    for image, result in zip(images, out, strict=True):
        padded = torch.zeros(3, 11, 9, dtype=torch.uint8)
        padded[:, 2:9, 2:7] = image
        found = [
            (dy, dx, mirror)
            for dy in range(5)
            for dx in range(5)
            for mirror in (False, True)
            if torch.equal(padded[:, dy : dy + 7, dx : dx + 5].flip(-1) if mirror else
                           padded[:, dy : dy + 7, dx : dx + 5], result)
        ]  # fmt: skip
        assert len(found) == 1
        seen.add(found[0])
    assert {s[0] for s in seen} == {s[1] for s in seen} == set(range(5))
    assert {s[2] for s in seen} == {False, True}
    again = augment(images, torch.Generator().manual_seed(1), pad=2)
    assert torch.equal(again, out)
    assert not torch.equal(augment(images, torch.Generator().manual_seed(2), pad=2), out)


def ten(n=10):
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 8, 8).contiguous()
    split = data.Split(images, torch.arange(n))
    return data.Dataset("ten", split, split, n, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


def test_batches_cover_an_epoch_in_seeded_order():
    def epochs(seed, n=2):
        batches = Batches(ten(), 4, seed)
        return [[y.tolist() for _, y in batches.epoch()] for _ in range(n)]

    first, second = epochs(0)
    assert [len(b) for b in first] == [4, 4, 2]
    assert sorted(i for batch in first for i in batch) == list(range(10))
    assert first != second
    assert epochs(0) == epochs(0) != epochs(1)
    for x, y in Batches(ten(), 4, 0).epoch():
        assert x[:, 0, 3, 3].tolist() == y.tolist()
    assert len(Batches(ten(), 4, 0)) == 3


@pytest.mark.parametrize("done", range(8))
def test_batches_go_on_from_any_place(done):
    def endless(batches):
        while True:
            yield from batches.epoch()

    kept = Batches(ten(), 4, 3, augmented=True)
    stream = endless(kept)
    for _ in range(done):
        next(stream)
    state = torch.load(io.BytesIO(dumped(kept.state_dict())), weights_only=True)
    resumed = Batches(ten(), 4, 99, augmented=True)
    resumed.load_state_dict(state)
    for _, (x, y), (u, v) in zip(range(9), stream, endless(resumed), strict=False):
        assert torch.equal(y, v)
        assert torch.equal(x, u)


def dumped(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
