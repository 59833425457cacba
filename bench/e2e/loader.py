"""Images per second that the loaders hand out, against those that a training step takes.

    python -m bench.e2e.loader --images CIFAR10_FOLDER             # writes docs/results/loader.md from all rows
    python -m bench.e2e.loader --images CIFAR10_FOLDER --device cuda --batch-size 256 --precision bf16 --channels-last
    python -m bench.e2e.loader --render

``memory``: images of 32x32 in memory, cropped and mirrored on the device in batches; against ResNet-56.  ``folder``:
JPEG files of 500x375 (made of the pictures in the folder, in a temporary one), cropped and resized to 224x224 by worker
processes; against ResNet-50.  Loader and step take turns; medians over the rounds.  The loader must be the faster one,
or the device waits: while it trains, the workers have the CPU to themselves on a GPU, but not here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import fastprune as fp
from bench import harness
from bench.harness import ROOT
from fastprune.train.step import Settings, Step

PAGE = ROOT / "docs" / "results" / "loader.md"
INTRO = """# Loaders against models

Written by `python -m bench.e2e.loader`. Images per second, medians over the rounds with the 20th and 80th percentile;
loader and training step take turns, so neither disturbs the other. `ratio`: how many times faster the loader is than
the step. Below 1 the model would wait. On a GPU: not yet measured; a GPU whose step takes n images per second needs as
many workers as together decode n.
"""


def endless(loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def jpegs(source: Path, target: Path, count: int) -> None:
    """``count`` JPEGs of 500x375, quality 90, of pictures of ``source``, as a folder of two classes and a test set."""
    found = sorted(source.rglob("*.jpg"))[:: max(1, len(list(source.rglob("*.jpg"))) // count)][:count]
    for split in ("train", "val"):
        for name in ("a", "b"):
            (target / split / name).mkdir(parents=True)
    for i, path in enumerate(found):
        picture = Image.open(path).convert("RGB").resize((500, 375), Image.Resampling.BICUBIC)
        picture.save(target / ("val" if i < 8 else "train") / "ab"[i % 2] / f"{i}.jpg", quality=90)


def rate(batches: Iterator[Any], use: Callable[[Any], None], skip: int, seconds: float, device: torch.device) -> float:
    """Images per second over at least two batches, and ``seconds``, behind ``skip`` that are not timed."""
    for _ in range(skip):
        use(next(batches))
    images, count, start = 0, 0, time.perf_counter()
    while count < 2 or time.perf_counter() - start < seconds:
        batch = next(batches)
        use(batch)
        images, count = images + len(batch[1]), count + 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images / (time.perf_counter() - start)


def case(data: Any, arch: str, batch_size: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Images per second of each round."""
    device = torch.device(args.device)
    data = data.to(device)
    loader = endless(data.loaders(batch_size).train)
    model = fp.models.create(arch, num_classes=len(data.classes)).to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    settings = Settings(args.precision, args.channels_last)
    step = Step(model, torch.optim.SGD(model.parameters(), 0.01, 0.9, foreach=True), None, None, settings)
    model.train()
    fixed = next(loader)
    ahead = 2 * getattr(data, "workers", 0)  # batches that workers made while the model had its turn
    sides: dict[str, tuple[Iterator, Callable, int]] = {
        "loader": (loader, lambda batch: None, 1 + ahead),
        "step": (itertools.repeat(fixed), lambda batch: step([batch]), 1),
    }
    found: dict[str, list[float]] = {name: [] for name in sides}
    for warm in range(args.rounds + 1):
        for name, side in sides.items():
            value = rate(*side, args.seconds, device)
            if warm:
                found[name].append(value)
    return found


def main() -> None:
    p = harness.arguments("Time loaders against training steps.", ["tests/test_data.py", "tests/test_stream.py"])
    p.add_argument("--images", type=Path, help="a folder of pictures, train/<class>/ and test/<class>/, 32x32")
    p.add_argument("--render", action="store_true", help="only write the page again")
    p.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    p.add_argument("--batch-size", type=int, default=8, help="of the folder's images")
    p.add_argument("--memory-batch-size", type=int, default=128, help="of those in memory")
    p.add_argument("--precision", default="fp32")
    p.add_argument("--channels-last", action="store_true")
    p.add_argument("--files", type=int, default=2000, help="JPEGs to make")
    p.add_argument("--seconds", type=float, default=1.0, help="of each turn")
    p.set_defaults(rounds=harness.MIN_ROUNDS)
    args = p.parse_args()
    if args.render:
        return render()
    if not args.images:
        p.error("--images is needed: a folder with train/<class>/ and test/<class>/")
    harness.start(args)
    setup = {"precision": args.precision, "channels_last": args.channels_last, "threads": args.threads}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        memory = fp.data.load("imagefolder", args.images, cache_dir=Path(folder) / "cache")
        small = {"data": "memory, 32x32", "workers": None, "model": "resnet56", "batch_size": args.memory_batch_size}
        todo = [(small, memory)]
        jpegs(args.images, Path(folder) / "jpegs", args.files)
        for workers in args.workers:
            images = fp.data.load("imagenet", Path(folder) / "jpegs", workers=workers)
            large = {"data": "folder, 224x224", "workers": workers, "model": "resnet50", "batch_size": args.batch_size}
            todo.append((large, images))
        for what, data in todo:
            found = case(data, what["model"], what["batch_size"], args)
            spread = {name: [round(v, 1) for v in harness.spread(values)] for name, values in found.items()}
            ratio = statistics.median(found["loader"]) / statistics.median(found["step"])
            rows.append({"bench": "loader", "case": what | setup, "impl": "loader", "images_per_s": spread})
            rows[-1]["ratio"] = round(ratio, 2)
            print(json.dumps(rows[-1]), flush=True)
    if not args.no_write:
        harness.finish(args, "loader", rows)
        render()


def render() -> None:
    """docs/results/loader.md from the rows of all machines."""
    text = [INTRO]
    for path in sorted(harness.RESULTS.glob("*/loader.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        facts = rows[-1]["provenance"]
        text.append(f"## {facts['device']}\n\ntorch {facts['torch']}, {facts['date'][:10]}, commit {facts['commit']}.")
        threads = {row["case"]["threads"] for row in rows}
        text[-1] += f" {facts['cpus']} CPUs, threads of the model: {', '.join(map(str, sorted(threads)))}; "
        text[-1] += f"load average of the machine {facts['load']}: numbers compare within a row.\n"
        text.append("| data | workers | batch | loader | model | step | ratio |\n|---|--:|--:|--:|---|--:|--:|")
        for row in rows:
            c, speed = row["case"], {k: _range(*v) for k, v in row["images_per_s"].items()}
            kind = f"{c['model']}, {c['precision']}{', channels_last' * c['channels_last']}"
            workers = "-" if c["workers"] is None else c["workers"]
            cells = [c["data"], workers, c["batch_size"], speed["loader"], kind, speed["step"], row["ratio"]]
            text.append("| " + " | ".join(map(str, cells)) + " |")
        text.append("")
    PAGE.write_text("\n".join(text))


def _range(median: float, low: float, high: float) -> str:
    style = ",.0f" if low >= 100 else ".1f"
    return f"{median:{style}} ({low:{style}} to {high:{style}})"


if __name__ == "__main__":
    main()
