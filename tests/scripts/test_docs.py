"""What the pages point at is there."""

import re

import pytest
from launches import ROOT

from s2megatron import cli

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
ANCHOR = re.compile(r"\]\(([^)\s#:]*)#([^)\s]+)\)")
FILE = re.compile(r"\b((?:scripts|tests|s2megatron|kernels)/[\w/]+\.(?:py|sh|sbatch)|"
                  r"configs/[\w/.]+\.yaml)\b")  # fmt: skip
TEST = re.compile(r"\b(tests/[\w/]+\.py)::(\w+)")
OPTION = re.compile(r"(?<!\S)(--[a-z][\w-]+)")
COMMANDS = [("show",), ("data",), ("plan",), ("calibrate",), ("verify",), ("convert", "to-hf"),
            ("convert", "to-megatron"), ("convert", "inspect"), ("evaluate",), ("compare",),
            ("generate",)]  # fmt: skip


def of_today() -> dict:
    """Page -> its text, a command in one line. Pages under raw/ keep the commands of their day."""
    pages = [page for page in PAGES if page.parent.name != "raw"]
    return {page.relative_to(ROOT): page.read_text().replace("\\\n", " ") for page in pages}


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


def test_every_link_leads_somewhere():
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in LINK.findall(page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken


def test_every_anchor_is_a_heading():
    broken = [
        f"{page.relative_to(ROOT)}: {target}#{anchor}"
        for page in PAGES
        for target, anchor in ANCHOR.findall(page.read_text())
        if anchor not in anchors(((page.parent / target) if target else page).read_text())
    ]
    assert not broken


def test_every_file_and_test_that_a_page_names_is_there():
    pages = of_today()
    files = {(page, name) for page, text in pages.items() for name in FILE.findall(text)}
    assert not {(page, name) for page, name in files if not (ROOT / name).exists()}
    tests = {(file, name) for text in pages.values() for file, name in TEST.findall(text)}
    assert not {x for x in tests if f"def {x[1]}(" not in (ROOT / x[0]).read_text()}


def options_of(script: str) -> set[str]:
    """What a Python script names as options, and what the modules beside it do."""
    file = ROOT / script
    text = file.read_text()
    beside = [
        file.parent / f"{name}.py" for name in re.findall(r"^(?:from|import) (\w+)", text, re.M)
    ]
    return {
        option
        for text in [text, *(module.read_text() for module in beside if module.exists())]
        for option in re.findall(r'"(--[a-z][\w-]+)"', text)
    }


def test_scripts_have_the_options_that_pages_give_them():
    unknown = {
        (page, script, option)
        for page, text in of_today().items()
        for script, rest in re.findall(r"\b(scripts/[\w/]+\.py)([^\n`]*)", text)
        for option in OPTION.findall(rest)
        if option not in options_of(script)
    }
    assert not unknown


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_have_the_options_that_pages_give_them(words, capsys):
    with pytest.raises(SystemExit):
        cli.main([*words, "--help"])
    known = set(re.findall(r"--[a-z][\w-]+", capsys.readouterr().out))
    given = {
        (page, option)
        for page, text in of_today().items()
        for rest in re.findall(rf"\bs2megatron {words[0]}\b([^\n`]*)", text)
        if words[-1] in f"{words[0]} {rest}"
        for option in OPTION.findall(rest)
    }
    assert not {(page, option) for page, option in given if option not in known}
