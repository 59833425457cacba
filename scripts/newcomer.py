"""Follow docs/your-own-network.md literally in a fresh clone and a new environment, and time it.

    python scripts/newcomer.py                      # on the digits that the page makes itself
    python scripts/newcomer.py --images FOLDER      # on your own: train/<class>/ and test/<class>/

Writes docs/results/newcomer.md.  The clone is of the last commit, in a temporary folder; torch is downloaded, unless
pip has it in its cache.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results" / "newcomer.md"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=Path, help="becomes the folder photos of the page")
    args = p.parse_args()
    start, rows = time.perf_counter(), []

    def done(what: str) -> None:
        rows.append((what, time.perf_counter() - start))
        print(f"[{rows[-1][1]:.0f} s] {what}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "fastprune"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        done("cloned")
        text = (clone / "docs" / "your-own-network.md").read_text(encoding="utf-8")
        install, *shell = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        digits, *python = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if args.images:
            shutil.copytree(args.images, clone / "photos")
            digits = ""
        env = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}

        def sh(lines: str) -> None:
            text = ". .venv/bin/activate\n" * (clone / ".venv").exists() + lines
            subprocess.run(["bash", "-ec", text], cwd=clone, env=env, check=True, stdout=subprocess.DEVNULL)

        for line in install.splitlines():
            sh(line)
            done(f"`{line}`")
        whole = [digits + python[0], python[0].replace("runs/photos", "runs/again") + python[1]]  # as one session
        for name, code, after in zip(("section 3", "own class"), whole, shell, strict=True):
            (clone / "page.py").write_text(code, encoding="utf-8")
            sh("python page.py")
            done(f"{name}: a network trained, cut, fine-tuned, saved")
            sh(after)
            done("the commands behind it")
    images, option = ("images of its own", " --images FOLDER") if args.images else ("the page's digits", "")
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    day, nvcc = time.strftime("%Y-%m-%d", time.gmtime()), "there" if shutil.which("nvcc") else "not in PATH"
    text = f"""# From a clone to an own network

Written by `python scripts/newcomer.py{option}`: [your-own-network.md](../your-own-network.md) followed
literally, with {images}, in a fresh clone and a new environment. {os.cpu_count()} CPUs ({platform.machine()}),
Python {platform.python_version()}, nvcc {nvcc}; commit {commit.stdout.strip()}, {day}.
How long downloads take is the network's matter.

| step | seconds since the start |
|---|--:|
"""
    PAGE.write_text(text + "".join(f"| {what} | {at:.0f} |\n" for what, at in rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
