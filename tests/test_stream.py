"""Images read from the disk: the same batches whoever reads them, resumed at any batch, damage named in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import fastprune as fp
from fastprune import cli, data, parallel
from fastprune.data import stream
from fastprune.errors import DataError


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """20 training and 6 test images of 2 classes, of many sizes and two modes."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(256, size=(20 + i, 30 - i, 3), dtype=np.uint8) // 2 + 127 * label
                mode = "L" if i == 1 else "RGB"
                Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(folder / f"{i}.jpg")
    return root


def load(tree, **options):
    return data.load("imagenet", tree, size=16, **{"workers": 0} | options)


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, z) and torch.equal(y, w) for (x, y), (z, w) in zip(a, b, strict=True)
    )


def test_test_images_are_those_of_torchvision(tree):
    images = load(tree)
    assert images.classes == ("cat", "dog") and images.image_shape == (3, 16, 16)
    assert images.test_labels.tolist() == [0, 0, 0, 1, 1, 1] and len(images.train_labels) == 20
    batches = list(images.loaders(4).test)
    assert [len(y) for _, y in batches] == [4, 2] and torch.equal(batches[0][1], images.test_labels[:4])
    steps = [v2.Resize(18), v2.CenterCrop(16), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    exact = v2.Compose([*steps, v2.Normalize(stream.MEAN, stream.STD)])
    wanted = torch.stack([exact(Image.open(tree / "val" / "cat" / f"{i}.jpg").convert("RGB")) for i in range(3)])
    torch.testing.assert_close(batches[0][0][:3], wanted)
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)


def test_epochs_differ_and_a_seed_repeats_them_without_touching_the_global_one(tree):
    images, before = load(tree), torch.get_rng_state()
    loader = images.loaders(8, seed=1).train
    first, second = list(loader), list(loader)
    assert [len(y) for _, y in first] == [8, 8, 4] and len(loader) == 3
    assert sorted(torch.cat([y for _, y in first]).tolist()) == [0] * 10 + [1] * 10
    assert not same(first, second) and not same(first, list(images.loaders(8, seed=2).train))
    again = images.loaders(8, seed=1).train
    assert same(first, list(again)) and same(second, list(again))
    assert torch.equal(before, torch.get_rng_state())


def test_workers_change_nothing_and_name_a_damaged_image(tree, tmp_path):
    """One process serves batches of several epochs, from where it is told to begin."""
    here, there = load(tree).loaders(8).train, load(tree, workers=2).loaders(8).train
    assert there._loader.num_workers == 2
    expected = [list(here), list(here)]
    assert same(list(there), expected[0]) and same(list(there), expected[1])
    there.load_state_dict({"epoch": 1, "batch": 1})
    for x, y in there:  # what is left of an epoch that nobody finishes is thrown away
        assert torch.equal(x, expected[1][1][0]) and torch.equal(y, expected[1][1][1])
        break
    there.load_state_dict({"epoch": 0, "batch": 1})
    assert same(list(there), expected[0][1:])
    there.load_state_dict({"epoch": 0, "batch": 0})
    with pytest.raises(DataError, match="imagenet: a worker died") as caught:
        for _ in there:
            for worker in there._loader._iterator._workers:
                worker.kill()
    assert "\n" not in str(caught.value)
    bad = tmp_path / "bad"
    for split in ("train", "val"):
        (bad / split / "a").mkdir(parents=True)
        for i in range(4):
            (bad / split / "a" / f"{i}.jpg").write_bytes((tree / "train" / "cat" / f"{i}.jpg").read_bytes()[: 200 + i])
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"cannot decode .*bad.train.a.\d\.jpg .*; replace or remove it") as caught:
            list(load(bad, workers=workers).loaders(2).train)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 4])
def test_it_resumes_at_any_batch_and_reads_nothing_twice(tree, taken, monkeypatch):
    loader = load(tree).loaders(8).train
    every = [*list(loader), *list(loader)]
    part, got = load(tree).loaders(8).train, []
    while len(got) < taken:
        for batch in part:
            got.append(batch)
            if len(got) == taken:
                state = part.state_dict()  # while the batch is held
                break
    state = state if taken else part.state_dict()
    read, decode = [], stream.decode
    monkeypatch.setattr(stream, "decode", lambda *args: read.append(1) or decode(*args))
    resumed = load(tree).loaders(8).train
    resumed.load_state_dict(state)
    rest = list(resumed)
    rest += list(resumed) if taken < 3 else []
    assert same(rest, every[taken:]) and len(read) == sum(len(y) for _, y in every[taken:])


def test_an_epoch_can_be_ended_early(tree):
    loader = load(tree).loaders(8).train
    _, second = list(loader), list(loader)
    other = load(tree).loaders(8).train
    for _ in other:
        break
    other.end_epoch()
    assert other.state_dict() == {"epoch": 1, "batch": 0} and same(list(other), second)


def test_processes_share_each_batch(tree, monkeypatch):
    whole = load(tree).loaders(6)
    train, test = list(whole.train), list(whole.test)
    monkeypatch.setattr(parallel, "processes", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        loaders = load(tree).loaders(6)
        parts.append((list(loaders.train), list(loaders.test)))
    for i, (x, y) in enumerate(train[:3]):
        shares = [part[0][i] for part in parts]
        assert torch.equal(torch.cat([s[0] for s in shares]), x) and torch.equal(torch.cat([s[1] for s in shares]), y)
    assert len(train) == 4 and all(len(part[0]) == 3 for part in parts)  # two images for three processes are left out
    assert torch.equal(torch.cat([y for part in parts for _, y in part[1]]), torch.cat([y for _, y in test]))
    with pytest.raises(ValueError, match="that 3 processes share evenly, got 4"):
        load(tree).loaders(4)


def test_wrong_options_are_named(tree, tmp_path):
    with pytest.raises(ValueError, match="imagenet has no pad; leave it out"):
        load(tree, pad=4)
    with pytest.raises(ValueError, match=r"start_method must be one of .*, got 'thread'"):
        load(tree, start_method="thread")
    with pytest.raises(ValueError, match="expected size >= 1"):
        data.load("imagenet", tree, size=0)
    with pytest.raises(DataError, match="imagenet: expected folders 'train' and 'test'"):
        data.load("imagenet", tmp_path)
    with pytest.raises(DataError, match="imagenet: root is missing"):
        data.load("imagenet")
    assert load(tree, flip=False, mean=(0.0,) * 3).flip is False
    assert len(load(tree, limit=5).train_files) == 5


def test_the_oracle_wants_a_set_in_memory(tree, tmp_path, capsys):
    assert cli.main(["oracle", "--dataset", "imagenet", "--root", str(tree), "--out", str(tmp_path)]) == 1
    assert "oracle: expected a data set that fits in memory, got imagenet" in capsys.readouterr().err


def test_a_network_trains_on_it(tree, tmp_path):
    args = {"arch": "vgg-small", "batch_size": 8, "lr": 0.01, "progress": False}
    images = data.load("imagenet", tree, size=8, workers=0)
    whole, logs = fp.train(images, epochs=2, out_dir=tmp_path / "whole", ema=0.5, **args)
    assert len(logs) == 2 and logs[-1]["step"] == 6
    fp.train(images, epochs=1, out_dir=tmp_path / "part", ema=0.5, **args)
    again, _ = fp.train(images, epochs=2, out_dir=tmp_path / "part", ema=0.5, resume=True, **args)
    state = again.state_dict()
    assert all(torch.equal(t, state[key]) for key, t in whole.state_dict().items())
    _, tuned = fp.prune_finetune(
        whole, images, prune_pc=0.5, target_macs=0.5, epochs=1, out_dir=tmp_path / "b", lr=0.01
    )
    assert tuned.summary["pruned"]["macs"] <= 0.5 * tuned.summary["dense"]["macs"]
    with pytest.raises(ValueError, match="expected prune_pc or a target"):
        fp.prune_finetune(whole, images, prune_pc=0.4, target_macs=0.5)
