"""Data sets: what they hold, what augmentation may do, what a cache must notice, what damage must say."""

import hashlib
import itertools
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from fastprune import data
from fastprune.errors import DataError

UNIT = {"mean": (0.0,), "std": (1.0,)}


def loader(n=10, size=6, **kw):
    images = torch.randint(1, 256, (n, 1, size, size), dtype=torch.uint8)
    return data.Loader(images, torch.arange(n), **{"batch_size": 4, **UNIT, **kw})


def test_digits_are_the_same_every_time_and_split_once():
    a, b = data.load("digits"), data.load("digits")
    assert a.train_images.shape == (1437, 1, 8, 8) and a.test_images.shape == (360, 1, 8, 8)
    assert torch.equal(a.train_images, b.train_images) and torch.equal(a.test_labels, b.test_labels)
    x = a.train_images.double() / 255
    assert abs(x.mean() - a.mean[0]) < 1e-4 and abs(x.std() - a.std[0]) < 1e-4
    assert a.train_labels.bincount(minlength=10).min() > 100 and a.test_labels.bincount(minlength=10).min() > 25


def test_synthetic_has_the_asked_size_and_depends_on_the_seed():
    a = data.load("synthetic", classes=4, size=12, channels=1, n_train=20, n_test=8)
    assert a.train_images.shape == (20, 1, 12, 12) and a.image_shape == (1, 12, 12) and len(a.classes) == 4
    b = data.load("synthetic", classes=4, size=12, channels=1, n_train=20, n_test=8, seed=1)
    assert not torch.equal(a.train_images, b.train_images)


def test_limit_keeps_few_images_and_their_labels():
    full = data.load("digits")
    few = data.load("digits", limit=50)
    assert len(few.train_labels) == len(few.test_labels) == 50 and few.train_labels.unique().numel() > 5
    for image, label in zip(few.train_images[:5], few.train_labels[:5], strict=True):
        hits = (full.train_images == image).flatten(1).all(1)
        assert label in full.train_labels[hits]


def test_plain_batches_are_the_images_normalised():
    images = torch.randint(256, (7, 3, 5, 5), dtype=torch.uint8)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    batches = list(data.Loader(images, torch.arange(7), batch_size=4, mean=mean, std=std))
    assert [len(y) for _, y in batches] == [4, 3]
    expected = v2.functional.normalize(images.float() / 255, mean, std)
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), expected, rtol=1e-5, atol=1e-6)
    assert torch.cat([y for _, y in batches]).tolist() == list(range(7))


def test_every_augmented_image_is_a_legal_crop_and_all_crops_occur_equally_often():
    pad, size, n = 2, 4, 200
    image = torch.randint(1, 256, (1, 1, size, size), dtype=torch.uint8)  # no zeros, so that the padding shows
    batches = data.Loader(image.expand(n, -1, -1, -1), torch.zeros(n).long(), batch_size=64, pad=pad, flip=True, **UNIT)
    padded = torch.nn.functional.pad(image[0, 0], (pad,) * 4)
    legal = {}
    for row, column, flip in itertools.product(range(2 * pad + 1), range(2 * pad + 1), (False, True)):
        crop = v2.functional.crop(padded[None], row, column, size, size)[0]
        legal[tuple((crop.flip(1) if flip else crop).flatten().tolist())] = (row, column, flip)
    assert len(legal) == 50
    seen = torch.zeros(2 * pad + 1, 2 * pad + 1, 2)
    for _ in range(100):
        for x, _ in batches:
            for row in x.mul(255).round().long().flatten(1).tolist():
                seen[legal[tuple(row)]] += 1  # KeyError: not a legal crop
    expected = 100 * n / 50
    assert ((seen - expected).square() / expected).sum() < 85.4  # chi-square, 49 degrees of freedom, p = 0.001


def test_all_channels_of_an_image_are_cropped_alike():
    images = torch.randint(1, 256, (9, 1, 6, 6), dtype=torch.uint8).expand(-1, 3, -1, -1)
    kw = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    for x, _ in data.Loader(images, torch.arange(9), batch_size=9, pad=2, flip=True, **kw):
        assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])


def test_shuffling_shows_every_image_once_in_a_new_order_each_epoch():
    train = loader(shuffle=True)
    first, second, same, other = (
        torch.cat([y for _, y in epoch]).tolist()
        for epoch in (train, train, loader(shuffle=True), loader(shuffle=True, seed=1))
    )
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert same == first and other != first


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 5])  # 3 batches an epoch: before, inside, between epochs
def test_a_resumed_loader_continues_with_the_next_batch(stop):
    def stream(source):
        while True:
            yield from source

    images = loader().images
    make = lambda: data.Loader(  # noqa: E731
        images, torch.arange(10), batch_size=4, pad=1, flip=True, shuffle=True, seed=5, **UNIT
    )
    whole = list(itertools.islice(stream(make()), 9))
    first = make()
    list(itertools.islice(stream(first), stop))
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = make()
    second.load_state_dict(state)
    for (x, y), (xe, ye) in zip(stream(second), whole[stop:], strict=False):
        assert torch.equal(x, xe) and torch.equal(y, ye)


def test_leaving_an_epoch_early_starts_the_next_one_at_its_beginning():
    train = loader(shuffle=True)
    next(iter(train))
    assert sum(len(y) for _, y in train) == 10


def test_the_global_random_state_is_left_alone():
    train = loader(shuffle=True, pad=1, flip=True)
    before = torch.get_rng_state()
    list(train)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "kw, word",
    [({"mean": (0.0, 0.0)}, "1 means"), ({"std": (0.0,)}, "positive"), ({"batch_size": 0}, "batch_size >= 1")],
)
def test_bad_loader_arguments_are_named(kw, word):
    with pytest.raises(ValueError, match=word):
        loader(**kw)


def test_unknown_names_and_options_get_a_hint():
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        data.load("cifar-10")
    with pytest.raises(ValueError, match="did you mean 'classes'"):
        data.load("synthetic", clases=3)


# --- CIFAR ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A CIFAR-10 folder with 3 images per file, and torchvision's md5 table made to fit."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    draw = np.random.default_rng(0)

    def put(name, content):
        blob = pickle.dumps(content)
        (folder / name).write_bytes(blob)
        return hashlib.md5(blob).hexdigest()

    def batch(name):
        pixels = draw.integers(256, size=(3, 3072), dtype=np.uint8)
        return [name, put(name, {"data": pixels, "labels": draw.integers(10, size=3).tolist()})]

    monkeypatch.setattr(CIFAR10, "train_list", [batch(name) for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [batch(name) for name, _ in CIFAR10.test_list])
    names = put("batches.meta", {"label_names": [f"class{i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": names})
    return tmp_path


def test_cifar_equals_torchvisions(cifar):
    ours = data.load("cifar10", cifar)
    for split, images, labels in (
        (True, ours.train_images, ours.train_labels),
        (False, ours.test_images, ours.test_labels),
    ):
        theirs = CIFAR10(cifar, train=split)
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), theirs.data) and labels.tolist() == theirs.targets
    assert ours.classes == tuple(theirs.classes) and (ours.pad, ours.flip) == (4, True)


def test_cifar_missing_or_damaged_names_the_path_and_the_way_to_get_it(cifar, tmp_path):
    with pytest.raises(DataError, match=r"root is missing; name the folder that holds cifar-100-python"):
        data.load("cifar100")
    with pytest.raises(DataError, match=r"cifar-100-python.meta is missing; get it with: python -c .*download=True"):
        data.load("cifar100", tmp_path)
    file = cifar / CIFAR10.base_folder / "data_batch_3"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"data_batch_3 is damaged \(md5 .*download=True"):
        data.load("cifar10", cifar)


def test_cifar_never_unpickles_a_file_of_another_md5(cifar, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    (cifar / CIFAR10.base_folder / "test_batch").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="damaged"):
        data.load("cifar10", cifar)
    assert not (tmp_path / "pwned").exists()


# --- ImageFolder ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    draw = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "images"


def test_imagefolder_decodes_what_is_there(tree):
    got = data.load("imagefolder", tree)
    assert got.classes == ("cat", "dog") and got.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert got.train_images.shape == (6, 3, 16, 16) and got.test_images.shape == (4, 3, 16, 16)
    exact = np.asarray(Image.open(tree / "train" / "dog" / "1.png")).transpose(2, 0, 1)
    assert np.array_equal(got.train_images[4].numpy(), exact)
    x = got.train_images.double() / 255
    torch.testing.assert_close(torch.tensor(got.mean).double(), x.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(got.std).double(), x.std((0, 2, 3), correction=0))
    assert (got.pad, got.flip) == (2, True)


def test_imagefolder_reads_its_cache_until_a_file_changes(tree, monkeypatch):
    first = data.load("imagefolder", tree)
    assert [p.suffix for p in (tree / ".fastprune").iterdir()] == [".npy", ".npy"]  # no temporary file left
    with monkeypatch.context() as m:
        m.setattr(data.folder, "_decode", lambda *args: pytest.fail("decoded again"))
        assert torch.equal(data.load("imagefolder", tree).train_images, first.train_images)
    path = tree / "train" / "cat" / "0.png"
    Image.new("RGB", (16, 16), (9, 9, 9)).save(path)
    assert data.load("imagefolder", tree).train_images[0].unique().tolist() == [9]
    path.unlink()
    assert len(data.load("imagefolder", tree).train_labels) == 5


def test_imagefolder_resizes_on_request_and_caches_each_size(tree):
    Image.new("L", (40, 20), 200).save(tree / "train" / "cat" / "0.png")  # grey, wide
    with pytest.raises(DataError, match=r"is \d+x\d+, .*; give image_size"):
        data.load("imagefolder", tree)
    got = data.load("imagefolder", tree, image_size=8)
    assert got.image_shape == (3, 8, 8) and got.train_images[0].unique().tolist() == [200]
    assert data.load("imagefolder", tree, image_size=12).image_shape == (3, 12, 12)


def test_imagefolder_names_a_damaged_image_and_leaves_no_cache(tree, tmp_path):
    bad = tree / "train" / "dog" / "2.png"
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(DataError, match=r"cannot decode .*train.dog.2\.png .*replace or remove it"):
        data.load("imagefolder", tree, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_imagefolder_says_what_is_missing(tree, tmp_path):
    with pytest.raises(DataError, match="expected folders 'train' and 'test'"):
        data.load("imagefolder", tmp_path)
    (tree / "test" / "bird").mkdir()
    with pytest.raises(DataError, match="has classes that train has not: bird"):
        data.load("imagefolder", tree)
    (tree / "test" / "bird").rmdir()
    for path in (tree / "train").rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="no images in"):
        data.load("imagefolder", tree)


def test_imagefolder_cache_that_cannot_be_written_says_so(tree, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="give another cache_dir"):
        data.load("imagefolder", tree, cache_dir=tmp_path / "file")
