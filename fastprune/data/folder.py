"""Your own images, ROOT/{train,test}/<class>/*.jpg: decoded once with threads into one uint8 array, cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from fastprune.data.sets import ImageSet, register
from fastprune.errors import DataError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@register
def imagefolder(
    root: Path | None = None,
    *,
    image_size: int | None = None,
    cache_dir: str | Path | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> ImageSet:
    """An ImageFolder tree: ROOT/train/<class>/<image> and ROOT/test (or ROOT/val), decoded to RGB.

    Args:
        root: The tree.  Classes are the sub-folders of ``train`` in sorted order; ``test`` has the same.
        image_size: Bring every image to this many pixels square: shorter side scaled, centre cut out.  None: the images
            all have one size already.
        cache_dir: Where the decoded arrays are kept, found again as long as names, sizes and times of all files stay
            the same.  None: ROOT/.fastprune, or the user's cache folder where ROOT is not writable.
        workers: Decoding threads; None: one per CPU.
        progress: Show a bar while decoding.

    Mean and std are those of the training pixels; training images are padded by an eighth, cropped and mirrored.

    Raises:
        DataError: A folder is missing or empty, an image is damaged or of another size, or all is too big for memory.
    """
    classes, test = layout("imagefolder", root)
    cache = Path(cache_dir) if cache_dir is not None else _cache_dir(root)
    arrays: list[Tensor] = []
    for split in ("train", test):
        arrays += _split(root / split, classes, image_size, cache, workers, progress)
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise DataError(
            f"imagefolder: training images are {_size(arrays[0])}, test images {_size(arrays[2])}; give image_size"
        )
    mean, std = _mean_std(arrays[0])
    return ImageSet("imagefolder", classes, *arrays, mean, std, pad=arrays[0].shape[2] // 8, flip=True)


def layout(name: str, root: Path | None) -> tuple[tuple[str, ...], str]:
    """Classes of an ImageFolder tree, and which of its folders is the test set."""
    if root is None:
        raise DataError(f"{name}: root is missing; name a folder with train/<class>/<image> and test/...")
    tests = [split for split in ("test", "val") if (root / split).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise DataError(f"{name}: expected folders 'train' and 'test' (or 'val') in {root}")
    classes = _folders(root / "train")
    if not classes:
        raise DataError(f"{name}: {root / 'train'} has no class folders; expected train/<class>/<image>")
    if extra := set(_folders(root / tests[0])) - set(classes):
        raise DataError(f"{name}: {root / tests[0]} has classes that train has not: {', '.join(sorted(extra))}")
    return classes, tests[0]


def _folders(path: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")))


def _size(images: Tensor) -> str:
    return f"{images.shape[2]}x{images.shape[3]}"


def _cache_dir(root: Path) -> Path:
    if os.access(root, os.W_OK):
        return root / ".fastprune"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastprune"


def images_in(name: str, folder: Path, classes: tuple[str, ...]) -> tuple[list[os.DirEntry], list[int]]:
    """The images of one split in the order of their names, and their labels."""
    entries: list[os.DirEntry] = []
    labels: list[int] = []
    for label, cls in enumerate(classes):
        if (folder / cls).is_dir():  # a test set may lack a class
            found = (entry for entry in os.scandir(folder / cls) if Path(entry.name).suffix.lower() in SUFFIXES)
            entries += sorted(found, key=lambda entry: entry.name)
            labels += [label] * (len(entries) - len(labels))
    if not entries:
        raise DataError(f"{name}: no images in {folder}; known suffixes: {', '.join(sorted(SUFFIXES))}")
    return entries, labels


def decode(name: str, path: str | Path) -> Image.Image:
    """In RGB."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
        raise DataError(f"{name}: cannot decode {path} ({error}); replace or remove it") from error


def _split(
    folder: Path, classes: tuple[str, ...], image_size: int | None, cache: Path, workers: int | None, progress: bool
) -> tuple[Tensor, Tensor]:
    entries, labels = images_in("imagefolder", folder, classes)
    files = [Path(entry.path) for entry in entries]
    # what must not change for the cached array to be this folder's
    stats = [(f"{file.parent.name}/{file.name}", entry.stat()) for file, entry in zip(files, entries, strict=True)]
    listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    key = hashlib.sha256(json.dumps(["v1", image_size, listing]).encode()).hexdigest()[:20]
    path = cache / f"{folder.name}-{key}.npy"
    if path.is_file():
        images = np.load(path)
    else:
        images = _decode(files, image_size, workers, progress)
        _write(path, images)
    return torch.from_numpy(images), torch.tensor(labels)


def _decode(files: list[Path], image_size: int | None, workers: int | None, progress: bool) -> np.ndarray:
    """(N, 3, H, W), uint8."""

    def pixels(path: Path) -> np.ndarray:
        rgb = decode("imagefolder", path)
        if image_size is not None and rgb.size != (image_size, image_size):
            rgb = ImageOps.fit(rgb, (image_size, image_size), Image.Resampling.BILINEAR)
        return np.asarray(rgb).transpose(2, 0, 1)

    first = pixels(files[0])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (size_bytes := len(files) * first.size) > memory // 2:
        raise DataError(
            f"imagefolder: {len(files)} images of {first.shape[1]}x{first.shape[2]} need {size_bytes / 1e9:.0f} GB, "
            f"this machine has {memory / 1e9:.0f} GB; give a smaller image_size"
        )
    images = np.empty((len(files), *first.shape), np.uint8)

    def put(i: int) -> None:
        image = pixels(files[i])
        if image.shape != first.shape:
            raise DataError(
                f"imagefolder: {files[i]} is {image.shape[1]}x{image.shape[2]}, {files[0]} is "
                f"{first.shape[1]}x{first.shape[2]}; give image_size to bring all to one size"
            )
        images[i] = image

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:  # Pillow decodes without holding the GIL
        done = pool.map(put, range(len(files)))
        try:
            for _ in tqdm(done, "decoding", len(files), disable=not progress):
                pass
        except DataError:
            pool.shutdown(cancel_futures=True)  # a damaged file is told at once, not after the other million
            raise
    return images


def _write(path: Path, images: np.ndarray) -> None:
    """Under a temporary name, then renamed: a reader finds the whole array or none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                np.save(file, images)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise DataError(f"imagefolder: cannot write {path} ({error}); give another cache_dir") from error


def _mean_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel over all pixels, exact, by histogram: no float copy of the set."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        count = torch.zeros(256, dtype=torch.float64)
        for chunk in images[:, channel].split(4096):
            count += torch.bincount(chunk.flatten(), minlength=256)
        share = count / count.sum()
        mean = (share * levels).sum()
        means.append(mean.item())
        stds.append(max(((levels - mean).square() * share).sum().sqrt().item(), 1 / 255))  # a constant channel: not 0
    return tuple(means), tuple(stds)
