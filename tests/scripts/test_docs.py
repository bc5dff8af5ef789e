"""What the pages point at is there."""

import re

from launches import ROOT

PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
SCRIPT = re.compile(r"\b(scripts/[\w/]+\.(?:py|sh|sbatch)|configs/[\w/.]+\.yaml)\b")


def test_every_link_leads_somewhere():
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in LINK.findall(page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken


def test_every_script_that_a_page_names_is_there():
    """Pages under raw/ keep the commands of their day."""
    missing = {
        f"{page.relative_to(ROOT)}: {name}"
        for page in PAGES
        if page.parent.name != "raw"
        for name in SCRIPT.findall(page.read_text())
        if not (ROOT / name).exists()
    }
    assert not missing
