"""The report: what it says of real runs, of damaged and half-done ones, and how it looks in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fastprune as fp
from fastprune import cli, report
from fastprune.report import page, runs, svg
from fastprune.train import MetricsLog, evaluate, fit, sgd

VOID = {"meta", "link", "br", "line", "circle", "rect", "polygon", "polyline", "path", "hr", "img"}
CHROME = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


class Page(HTMLParser):
    """Checks nesting, and collects ids, links, texts and what would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.ids, self.links, self.fetched, self.texts, self.tags = [], [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append((tag, values))
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if tag == "a" else []
        self.fetched += [values[key] for key in ("src", "srcset", "data", "poster") if key in values]
        self.fetched += [values["href"]] if tag == "link" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def recipe_run(out: Path, seed: int, epochs: int = 3) -> None:
    """A real run on digits that leaves what docs/recipes.md says a run leaves."""
    out.mkdir(parents=True)
    torch.manual_seed(seed)
    train, test = (data := fp.data.load("digits", limit=200)).loaders(50, seed)
    x = next(iter(test))[0][:2]
    model = fp.nn.convert_batchnorm(fp.models.create("vgg-small", bound="sigmoid"), fuse=True)
    method = fp.create("rni", model, x, ratio=0.5, reg_weight=0.1)
    dense, histograms = fp.flops(model, x[:1]), MetricsLog(out / "importances.jsonl")

    def phase(name, method):
        class Log(MetricsLog):
            def write(self, row):
                super().write({"phase": name, **row})
                for group, scores in method.scores().items() if method else ():
                    counts, edges = torch.histogram(scores.double(), 16)
                    key = {"phase": name, "epoch": row["epoch"], "step": row["step"], "group": group}
                    histograms.write(key | {"edges": edges.tolist(), "counts": counts.tolist()})

        optimizer = sgd(model, 0.1)
        before = evaluate(model, test)["acc"]
        rows = fit(
            model,
            (train, test),
            epochs=epochs,
            optimizer=optimizer,
            method=method,
            log=Log(out / "metrics.jsonl"),
            progress=False,
        )
        accs = [row["test_acc"] for row in rows]
        known = {"acc_before": before, "acc": accs[-1], "acc_last": accs[-1], "acc_best": max(accs), "epochs": epochs}
        return known | {"seconds": sum(row["seconds"] for row in rows)}

    def cost():
        now = fp.flops(model, x[:1])
        before = {layer["name"]: layer["out_channels"] for layer in dense["layers"]}
        kept = {layer["name"]: [layer["out_channels"], before[layer["name"]]] for layer in now["layers"]}
        return {"macs": now["macs"], "params": now["params"], "kept": kept}

    published = {"where": "table 1", "acc": 0.9, "acc_std": 0.01, "which": "last", "speedup": 2.0}
    about = {"recipe": "rni/digits", "seed": seed, "tiny": False, "set": {}, "phases": ["train", "prune", "finetune"]}
    about |= {"fastprune": fp.__version__, "device": "cpu", "published": published, "data": {"name": data.name}}
    (out / "run.json").write_text(json.dumps(about))
    (out / "recipe.yaml").write_text(
        "name: rni/digits\nmodel: {name: vgg-small}\ndata: {name: digits}\n"
        f"train: {{epochs: {epochs}, batch_size: 50, method: rni}}\nprune: {{epochs: 0, method: rni, ratio: 0.5}}\n"
        f"finetune: {{epochs: {epochs}, batch_size: 50, method: null}}\n"
    )
    phases = {"train": phase("train", method) | cost()}
    fp.compact(model, method.keep_masks(), x)
    acc = evaluate(model, test)["acc"]
    phases["prune"] = {"acc_before": phases["train"]["acc"], "acc": acc, "acc_last": None, "epochs": 0} | cost()
    phases["finetune"] = phase("finetune", None) | cost()
    (out / "result.json").write_text(json.dumps({"finished": True, "phases": phases}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seeds of a recipe, and two calls of fastprune.train and prune_finetune."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        recipe_run(root / "rni" / "digits" / f"seed{seed}", seed)
    digits = fp.data.load("digits", limit=200)
    shared = {"epochs": 2, "device": "cpu", "progress": False}
    for method in ("ucs", "l1"):
        model, _ = fp.train(digits, "vgg-small", method, **shared, out_dir=root / method / "train")
        fp.prune_finetune(model, digits, method, 0.5, **shared, out_dir=root / method / "prune")
    return root


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The report of all of them."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert cli.main(["report", str(folder), "--out", str(out)]) == 0
    return out


def result(folder: Path, seed: int) -> dict:
    return json.loads((folder / "rni" / "digits" / f"seed{seed}" / "result.json").read_text())["phases"]


def test_page_is_whole_and_needs_nothing_else(folder, whole):
    text = whole.read_text()
    got = Page(text)
    assert len(text.encode()) < 200_000 and "<script" not in text and "http" not in text.replace("http-equiv", "")
    assert got.fetched == ["data:,"]  # no icon
    assert len(set(got.ids)) == len(got.ids)
    assert {link[1:] for link in got.links} <= set(got.ids)
    assert dict(got.tags)["html"]["lang"] == "en"
    pictures = [values for tag, values in got.tags if tag == "svg" and values.get("role") == "img"]
    small = [picture for picture in pictures if "aria-label" in picture]  # importances of each layer
    assert (
        len(small) == len({name.partition(".weight")[0] for name in result(folder, 0)["train"]["kept"]}) - 1
    )  # but fc
    assert all(re.match(r"features\.\d+, epoch 1: .* half below .*; epoch 3: ", p["aria-label"]) for p in small)
    pictures = [picture for picture in pictures if picture not in small]
    assert len(pictures) == 2 + 2 + 3 + 1  # scatter, curves, widths, importances
    for picture in pictures:
        assert all(ident in got.ids for ident in picture["aria-labelledby"].split())


def test_numbers_are_the_runs_numbers(folder, whole):
    text = Page(whole.read_text()).text
    ends = [result(folder, seed)["finetune"] for seed in (0, 1)]
    last = [100 * end["acc_last"] for end in ends]
    mean, std = np.mean(last), np.std(last, ddof=1)
    assert f"{mean:.2f} ± {std:.2f}" in text
    assert "90.00 ± 1.00" in text and f"{mean - 90:+.2f}" in text  # published, difference
    cut = [100 * result(folder, seed)["prune"]["acc"] for seed in (0, 1)]
    assert f"{np.mean(cut):.2f} ± {np.std(cut, ddof=1):.2f}" in text
    ratio = result(folder, 0)["train"]["macs"] / np.mean([end["macs"] for end in ends])
    assert f"÷ {ratio:.2f}" in text
    kept = ends[0]["kept"]
    assert f"features.0 {kept['features.0'][0]} {kept['features.0'][1]}" in text


def test_paths_of_points(folder):
    run = report.read(folder / "rni" / "digits" / "seed0")
    phases = result(folder, 0)
    assert [what for what, _, _ in run.points] == ["dense", "after the cut", "fine-tuned"]
    assert [(m, a) for _, m, a in run.points] == [(phases[p]["macs"], phases[p]["acc"]) for p in phases]
    call = report.read(folder / "l1" / "prune")
    assert [what for what, _, _ in call.points] == ["dense", "after the cut", "fine-tuned"]
    assert call.points[-1][2] == call.phases[-1].rows[-1]["test_acc"]
    assert call.facts["method"] == "l1" and call.seed == 0


def test_a_method_is_compared_with_a_plain_step(folder):
    entries = page.group([report.read(path) for path in report.find(folder)])
    rows = {(r["entry"].name, r["phase"]): r for r in page.costs(entries)}
    plain, l1 = rows["ucs/train", "train"], rows["l1/train", "train"]

    def shown(row):  # three digits, and thousands apart
        return float(row["ms"].replace(",", ""))

    assert plain["plain"] and plain["against"] is None
    assert l1["against"] == pytest.approx(shown(l1) / shown(plain), rel=0.01)
    assert rows["l1/prune", "finetune"]["against"] is None  # another network
    assert rows["rni/digits", "train"]["against"] is None  # another batch size


def test_each_layer_has_its_own_histograms():
    """Heights are the square roots of the counts, first moment on top, last one marked."""
    edges = [0.5 + i / page.LAYER_BINS for i in range(page.LAYER_BINS + 1)]
    first, last = [0.0] * page.LAYER_BINS, [0.0] * page.LAYER_BINS
    first[2], last[2], last[-1] = 9, 25, 100
    shown = page.layer("a<b", [runs.Histogram("prune", e, "a<b", edges, c) for e, c in ((0, first), (4, last))])
    paths = re.findall(r'class="ridge( after)?" d="M0 (\d+)([^"]*)"', shown.svg)
    assert [bool(after) for after, _, _ in paths] == [False, True]
    assert paths[0][2] == f"h20v-14h10v14h210V{paths[0][1]}z" and int(paths[1][1]) == int(paths[0][1]) + 22
    assert paths[1][2] == f"h20v-24h10v24h200v-48h10V{paths[1][1]}z"
    assert (shown.name, shown.about) == ("a<b", "0.5 to 1.5, 125")
    assert 'aria-label="a&lt;b, epoch 1: ' in shown.svg


def test_twelve_runs_have_twelve_looks():
    entries = page.group([report.Run(Path(f"/runs/{i}"), f"{i}") for i in range(12)])
    assert len({(entry.css.split()[0], entry.shape) for entry in entries}) == 12  # marks have no dashes
    assert len({entry.css for entry in entries}) == 12  # lines have no shape


def test_seeds_are_grouped_and_names_told_apart(folder):
    entries = page.group([report.read(path) for path in report.find(folder)])
    assert {entry.name: len(entry.runs) for entry in entries} == {
        "rni/digits": 2, "ucs/train": 1, "ucs/prune": 1, "l1/train": 1, "l1/prune": 1
    }  # fmt: skip
    assert len({entry.look for entry in entries}) == 5


def change(folder: Path, tmp_path: Path, **files: str | None) -> Path:
    """A copy of a run with some files replaced, or removed."""
    out = tmp_path / "rni" / "seed0"
    shutil.copytree(folder / "rni" / "digits" / "seed0", out)
    for name, text in files.items():
        path = out / name.replace("_", ".")
        path.unlink() if text is None else path.write_text(text)
    return out


def text_of(path: Path, tmp_path: Path) -> str:
    out = tmp_path / "report.html"
    assert report.run([path], out) == 0
    return Page(out.read_text()).text


def test_unfinished(folder, tmp_path):
    lines = (folder / "rni" / "digits" / "seed0" / "metrics.jsonl").read_text().splitlines()
    out = change(folder, tmp_path, result_json=None, metrics_jsonl="\n".join(lines[:2]) + "\n" + lines[2][:40])
    text = text_of(out, tmp_path)
    assert "unfinished: train, epoch 2 of 3" in text
    assert "metrics.jsonl: 1 line cut off or damaged, left out" in text
    out = change(folder, tmp_path / "2", result_json=None, metrics_jsonl="", importances_jsonl=None)
    text = text_of(out, tmp_path)
    assert "no epoch finished yet" in text and "No run here has recorded importances" in text
    out = change(folder, tmp_path / "3", result_json='{"finished": false, "phases": {}}')
    assert "unfinished: finetune, epoch 3 of 3" in text_of(out, tmp_path)


def test_tiny_and_changed_runs_are_not_held_against_papers(folder, tmp_path):
    about = json.loads((folder / "rni" / "digits" / "seed0" / "run.json").read_text())
    out = change(folder, tmp_path, run_json=json.dumps(about | {"tiny": True, "set": {"train.epochs": 1}}))
    text = text_of(out, tmp_path)
    assert "tiny form, for trials" in text and "changed: train.epochs=1" in text
    assert "90.00 ± 1.00" in text and not re.search(r"[+-]\d+\.\d\d ", text.partition("90.00 ± 1.00")[2][:60])
    many = {f"train.number{i}": [i, None] for i in range(9)}
    text = text_of(change(folder, tmp_path / "2", run_json=json.dumps(about | {"set": many})), tmp_path)
    names = [f"train.number{i}=[{i}, null]" for i in range(9)]
    assert f"changed: {', '.join(names[:3])}, " in text and f"changed: {', '.join(names)}" not in text
    assert " … " in text and f"changed {', '.join(names)} " in text  # whole among the facts at the end


def test_dense_cost_from_the_run_it_began_with(folder, tmp_path):
    base = folder / "rni" / "digits" / "seed1"
    about = json.loads((base / "run.json").read_text()) | {"phases": ["prune", "finetune"]}
    about["base"] = {"recipe": "rni/digits", "path": str(base / "dense.safetensors"), "acc": 0.5}
    phases = {name: block for name, block in result(folder, 0).items() if name != "train"}
    out = change(
        folder, tmp_path, run_json=json.dumps(about), result_json=json.dumps({"finished": True, "phases": phases})
    )
    run = report.read(out)
    assert run.points[0] == ("dense", result(folder, 1)["train"]["macs"], phases["prune"]["acc_before"])
    about["base"] = None  # torchvision's weights, say: the run itself knows
    known = json.dumps({"finished": True, "dense": {"macs": 12345, "params": 67}, "phases": phases})
    out = change(folder, tmp_path / "own", run_json=json.dumps(about), result_json=known)
    assert report.read(out).points[0] == ("dense", 12345, phases["prune"]["acc_before"])


def test_resumed_rows_replace_old_ones(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for epoch, acc in ((0, 0.1), (1, 0.2), (2, 0.3), (1, 0.4)):  # killed after epoch 2, its checkpoint was of epoch 0
        log.write({"epoch": epoch, "test_acc": acc})
    run = report.read(tmp_path)
    assert run.phases[0].curve("test_acc") == [(0, 0.1), (1, 0.4)]
    assert run.state == "2 epochs, no end recorded"


def test_first_row_of_an_own_loop(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"phase": "finetune", "dataset": "photos", "macs": 5e6, "params": 100, "kept": {"conv1": [4, 8]}})
    log.write({"epoch": 0, "test_acc": 0.75})
    run = report.read(tmp_path)
    assert run.points == [("fine-tuned", 5e6, 0.75)] and run.kept == {"conv1": (4, 8)}
    assert run.facts["dataset"] == "photos" and run.last("params") == 100


def test_what_is_no_run_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    out = str(tmp_path / "r.html")
    for bad, why in (("file", "is no folder"), ("empty", "holds no run"), ("nothing", "no such folder")):
        assert cli.main(["report", str(tmp_path / bad), "--out", out]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and why in err
        assert not (tmp_path / "r.html").exists()
    assert cli.main(["report", str(tmp_path / "empty"), str(folder / "l1"), "--out", out]) == 0
    assert "left out" in capsys.readouterr().err
    assert "empty: holds no run" in Page((tmp_path / "r.html").read_text()).text


def test_unwritable_output(folder, tmp_path, capsys):
    for out in (tmp_path, tmp_path / "no" / "r.html"):
        assert cli.main(["report", str(folder / "l1"), "--out", str(out)]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_markup_in_files_stays_text(tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"call": "train", "dataset": evil, "arch": evil, "method": evil, "epochs": 1, "seed": 0})
    log.write({"epoch": 0, "step": 1, "seconds": 1.0, "test_acc": 0.5, "train_loss": 1.0})
    (tmp_path / "run.json").write_text(json.dumps({"recipe": evil, "published": {"where": evil, "acc": 0.5}}))
    kept = {"finished": True, "phases": {evil: {"macs": 5, "acc": 0.5, "kept": {evil: [1, 2]}}}}
    (tmp_path / "result.json").write_text(json.dumps(kept))
    out = tmp_path / "r.html"
    report.run([tmp_path], out)
    text = out.read_text()
    assert "<script" not in text and Page(text).text.count(evil) > 5


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}),
    st.lists(st.one_of(st.floats(), st.integers(0, 9), st.none()), max_size=4), st.just({"a": [1, 2]}),
)  # fmt: skip
rows = st.dictionaries(
    st.sampled_from([
        "phase", "epoch", "step", "seconds", "test_acc", "train_loss", "call", "seed", "epochs", "dense", "pruned",
        "kept", "method", "dataset", "images_per_s", "group", "edges", "counts", "recipe", "published", "phases",
        "data", "tiny", "set", "finished", "base", "macs", "acc", "model", "train",
    ]),
    values,
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(rows, max_size=5), rows, rows, st.lists(rows, max_size=3), st.dictionaries(st.text(max_size=3), rows))
def test_no_file_makes_it_fail(tmp_path_factory, metrics, about, ending, importances, phases):
    folder = tmp_path_factory.mktemp("fuzz")
    for name, lines in (("metrics", metrics), ("importances", importances)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "result.json").write_text(json.dumps({"phases": phases} | ending))
    (folder / "recipe.yaml").write_text(json.dumps(about))
    Page(report.build([report.read(folder)]))


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "result.json", "recipe.yaml", "importances.jsonl"])
@pytest.mark.parametrize("junk", [b"\x00\xff\xfe", b"[" * 100_000, b"{", b"null", b"NaN", b"a: [b"])
def test_damaged_files_are_told(folder, tmp_path, name, junk):
    out = change(folder, tmp_path)
    (out / name).write_bytes(junk)
    run = report.read(out)
    assert any(name in problem for problem in run.problems) or (name == "recipe.yaml" and junk in (b"null", b"NaN"))
    Page(report.build([run]))


# Drawing --------------------------------------------------------------------------------------------------------------


def test_rebinned_keeps_every_channel():
    rng = np.random.default_rng(0)
    samples = rng.normal(size=1000)
    counts, edges = np.histogram(samples, 40)
    h = runs.Histogram("", 0, "", edges.tolist(), counts.tolist())
    for low, high in ((-4, 4), (-1, 1)):  # inside and beyond
        new = np.linspace(low, high, 11).tolist()
        got = page.rebinned([h, h], new)
        assert sum(got) == pytest.approx(2000)
        exact = [2 * np.sum((a <= samples) & (samples < b)) for a, b in pairwise(new)]
        assert got[1:-1] == pytest.approx(exact[1:-1], abs=60)  # a bin of 0.16 is shared out by its width
    assert page.rebinned([h], edges.tolist()) == pytest.approx(counts.tolist())


@pytest.mark.parametrize("low, high, log", [(0, 1, False), (0.913, 0.9131, False), (1e6, 3e9, True), (3, 7, True)])
def test_ticks_are_inside_and_some(low, high, log):
    scale = svg.Scale(low, high, log=log)
    marks = scale.marks(6)
    assert 2 <= len(marks) <= 8 and all(low <= m <= high or math.isclose(m, low) for m in marks)
    assert len(set(scale.texts(marks))) == len(marks)


def test_long_lines_are_thinned_and_keep_their_peaks():
    line = [(float(i), math.sin(i / 50) + (i == 7777) * 9) for i in range(20_000)]
    got = svg.thinned(line)
    assert len(got) <= 410 and got[0] == line[0] and got[-1] == line[-1] and (7777.0, line[7777][1]) in got


# In a real browser ----------------------------------------------------------------------------------------------------

MEASURE = """<script>
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom].map(Math.round) }
addEventListener("load", () => { parent.document.getElementById("found").textContent = JSON.stringify({
  width: innerWidth, scroll: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
  figures: [...document.querySelectorAll("figure > svg, figure > .scroll > svg")].map(box),
  clipped: [...document.querySelectorAll("svg[role=img] text")].filter(t => {
    const a = box(t), b = box(t.closest("svg"));
    return a[0] < b[0] - 1 || a[1] < b[1] - 1 || a[2] > b[2] + 1 || a[3] > b[3] + 1 }).map(t => t.textContent),
}) })
</script></body>"""


def framed(text: str, width: int, height: int) -> str:
    """The page as a window of this width shows it; Chromium's own windows are not narrower than 500 pixels."""
    frame = (
        f'<iframe width="{width}" height="{height}" style="border: 0; display: block" srcdoc="{escape(text)}"></iframe>'
    )
    return f'<meta charset="utf-8"><body style="margin: 0">{frame}<pre id="found"></pre>'


def chrome(tmp_path, *argv: str) -> subprocess.CompletedProcess:
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    done = subprocess.run(
        [CHROME, *fixed, f"--user-data-dir={tmp_path / 'chrome'}", *argv], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    return done


@pytest.mark.skipif(CHROME is None, reason="no Chromium here; apt-get install chromium")
@pytest.mark.parametrize(
    "width, dark", [(1280, False), (390, True), (694, False)], ids=["desktop", "phone-dark", "paper"]
)
def test_in_a_browser(whole, tmp_path, width, dark):
    """Nothing overflows, no text of a figure is cut off, every figure has ink, the console is silent."""
    path, shot, text = tmp_path / "framed.html", tmp_path / "shot.png", whole.read_text()
    text = text.replace("<details>", "<details open>")
    if width == 694:  # A4 between its margins
        text = text.replace("@media print", "@media all")
    mode = ["--force-dark-mode"] if dark else []
    path.write_text(framed(text.replace("</body>", MEASURE), width, 1000))
    dump = chrome(tmp_path, *mode, "--dump-dom", path.as_uri()).stdout
    found = json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', dump)[1]))
    assert found["scroll"] <= found["width"] == width
    assert found["clipped"] == []
    path.write_text(framed(text, width, found["height"]))
    size = f"--window-size={max(width, 500)},{found['height'] + 200}"
    chrome(tmp_path, *mode, size, f"--screenshot={shot}", path.as_uri())
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert (pixels[5, width - 5].mean() < 60) == dark  # the reader's theme; on paper the headline begins at the left
    assert len(found["figures"]) == 8
    for left, top, right, bottom in found["figures"]:
        part = pixels[top:bottom, max(left, 0) : right]
        assert part.size
        colourful = part.max(2) - part.min(2) > 60  # lines and bars, not grey text
        assert colourful.mean() > 0.002, f"no ink at {left}, {top}"
