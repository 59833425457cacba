"""The documents say what is true: snippets run, links, names and commands exist, tables are the committed ones."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch

import fastprune
from fastprune import cli

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
EACH = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """(line, source) of the fenced blocks in ``language``."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


FOLLOWED = ("docs/your-own-network.md",)  # whose commands are run, too, after the snippet before them
SNIPPETS = [path for path in DOCUMENTS if blocks(path.read_text(), "python")]


@pytest.mark.parametrize("path", SNIPPETS, ids=lambda path: str(path.relative_to(ROOT)))
def test_snippets_run(path, tmp_path, monkeypatch):
    """The snippets of a document run from top to bottom in one namespace, in an empty folder, without a warning."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastprune.methods.base, "METHODS", dict(fastprune.methods.METHODS))  # a snippet registers one
    monkeypatch.setattr(fastprune.backends, "PREFERENCE", dict(fastprune.backends.PREFERENCE))  # and another an op
    module = types.ModuleType("snippet")
    monkeypatch.setitem(sys.modules, "snippet", module)  # dataclasses look their module up
    torch.manual_seed(0)
    text = path.read_text()
    for line, source in blocks(text, "python"):
        # blank lines in front: a traceback then names the line of the document
        exec(compile("\n" * line + source, str(path), "exec"), vars(module))
        if str(path.relative_to(ROOT)) in FOLLOWED:
            follow(shell_after(text, line))


def shell_after(text: str, line: int) -> str:
    """The shell lines between the Python snippet that begins behind ``line`` and the next one."""
    starts = [at for at, _ in blocks(text, "python")] + [text.count("\n")]
    end = starts[starts.index(line) + 1]
    return "".join(source for at, source in blocks(text, "sh") if line < at < end)


def follow(shell: str) -> None:
    """Run commands of ours, and the ``echo ... > file`` between them, in this process."""
    for line in shell.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["echo"]:
            Path(words[3]).write_text(words[1])
        elif words[:1] == ["fastprune"]:
            assert cli.main(words[1:]) == 0, line


def test_commands_of_the_page_about_them_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    follow("".join(source for _, source in blocks((ROOT / "docs" / "commands.md").read_text(), "sh")))


def test_all_methods_and_their_options_are_described():
    text = (ROOT / "docs" / "methods.md").read_text()
    for name, method in fastprune.methods.METHODS.items():
        assert f"`{name}`" in text, name
        for field in dataclasses.fields(method.Options):
            assert re.search(rf"`{field.name}[`=]", text), f"{name}: {field.name}"


def test_all_commands_are_described():
    text = (ROOT / "docs" / "commands.md").read_text()
    assert [name for name in cli.COMMANDS if f"`fastprune {name}`" not in text] == []


def test_readme_and_the_pages_for_users_have_snippets():
    names = {str(path.relative_to(ROOT)) for path in SNIPPETS}
    wanted = ("README.md", "docs/quickstart.md", "docs/plug-into-your-loop.md", "docs/ops.md", "docs/methods.md")
    assert names >= {*wanted, "docs/adding-a-method.md"}


@EACH
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not re.match(r"https?://|#", target):
            assert (path.parent / target.partition("#")[0]).exists(), f"{path.name}: {target}"


@EACH
def test_names_exist(path):
    """Every ``fp.name`` in a document is there."""
    for name in sorted(set(re.findall(r"\bfp\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)", path.read_text()))):
        thing = fastprune
        for part in name.split("."):
            assert hasattr(thing, part), f"{path.name}: fp.{name}"
            thing = getattr(thing, part)


@EACH
def test_commands_exist(path):
    text, makefile = path.read_text(), (ROOT / "Makefile").read_text()
    shell = "".join(source for _, source in blocks(text, "sh"))
    said = "\n".join([*re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text), shell])
    for command in re.findall(r"^fastprune ([a-z]+)", said, re.MULTILINE):
        assert command in cli.COMMANDS, f"{path.name}: fastprune {command}"
    for target in re.findall(r"^make (?:[A-Z]+=\S+ )*([a-z]+)", said, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{path.name}: make {target}"


def test_readme_shows_what_make_runs():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for pinned in ("torch==2.11.0", "torchvision==0.26.0", "triton==3.6.0", "setuptools>=77,<82"):
        assert pinned in readme and pinned in makefile
    assert "--no-build-isolation -e" in readme and "--no-build-isolation -e" in makefile


def test_readme_table_is_the_committed_one():
    block = re.search(r"<!-- quickstart:.*?-->\n(.*?)<!-- end -->", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    rows = [line for line in block.splitlines() if line.startswith("|")]
    committed = (ROOT / "docs" / "results" / "quickstart.md").read_text()
    assert rows and all(row in committed for row in rows)


def test_index_of_results_is_up_to_date():
    import runpy

    written = runpy.run_path(str(ROOT / "scripts" / "results_index.py"))["index"]()
    assert (ROOT / "docs" / "results" / "index.md").read_text() == written, "run python scripts/results_index.py"


def test_changelog_has_this_version():
    assert f"\n## {fastprune.__version__}" in (ROOT / "CHANGELOG.md").read_text()
