"""The documents: figures are up to date, links lead somewhere, the Chinese README follows the English one."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "figures"
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(path for name in ("docs", "benchmarks", "tests") for path in (ROOT / name).rglob("*.md")),
]
LINK = re.compile(r"\]\(([^)#\s]+)[^)\s]*\)")


def draw(*arguments):
    pytest.importorskip("matplotlib")
    command = [sys.executable, ROOT / "scripts" / "draw_figures.py", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "FLASH_DMATTN_BACKEND"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def digests(folder):
    """Of the figures in a folder: what each says about its data and its program."""
    found = {path.name: re.search("<dc:description>(\\w+)", path.read_text()) for path in folder.iterdir()}
    return {name: match[1] for name, match in found.items()}


def test_figures_are_up_to_date_and_shown(tmp_path):
    done = draw("--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    drawn = digests(tmp_path)
    assert digests(FIGURES) == drawn, "run scripts/draw_figures.py"
    assert set(re.findall(r"figures/([\w.]+)", (ROOT / "docs" / "integration.md").read_text())) == set(drawn)
    (tmp_path / "plan.svg").write_text((tmp_path / "mask.svg").read_text())
    (tmp_path / "tiles.svg").unlink()
    done = draw("--check", "--out", tmp_path)
    stale = [Path(line.split()[0]).name for line in done.stdout.splitlines()]
    assert (done.returncode, stale) == (1, ["tiles.svg", "plan.svg"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    links = [link for link in LINK.findall(text) if "://" not in link and not link.startswith("mailto:")]
    assert [link for link in links if not (document.parent / link).exists()] == []


def code_of(text):
    """(the text without its code, the lines of its code without comments)"""
    code = re.findall(r"^```\w*\n(.*?)^```|^((?: {4}\S[^\n]*\n)+)", text, re.MULTILINE | re.DOTALL)
    lines = [re.sub(r" *#.*", "", line) for block in code for line in "".join(block).splitlines()]
    return re.sub(r"^```.*?^```|^ {4}\S[^\n]*$", "", text, flags=re.MULTILINE | re.DOTALL), lines


def sections(document):
    """Of each heading: level, heading, and numbers, links, widths of table rows and names below it. And all
    code."""
    text = re.sub(
        r"(<!-- table: .*?-->).*?(<!-- end of table -->)", r"\1\2", document.read_text(), flags=re.DOTALL
    )
    text, code = code_of(text)
    parts = re.split(r"^(#+) ", text, flags=re.MULTILINE)
    found = []
    for level, body in zip(parts[1::2], parts[2::2]):
        rows = [line.count("|") for line in body.splitlines() if line.startswith("|")]
        links = sorted(link for link in LINK.findall(body) if link not in ("README.md", "README.zh.md"))
        names = Counter(re.findall(r"`[^`]+`", body))
        found.append(
            (level, body.splitlines()[0], Counter(re.findall(r"\d+(?:\.\d+)*", body)), links, rows, names)
        )
    return found, code


def test_the_chinese_readme_says_what_the_english_one_does():
    (english, english_code), (chinese, chinese_code) = (
        sections(ROOT / name) for name in ("README.md", "README.zh.md")
    )
    assert [section[0] for section in english] == [section[0] for section in chinese], "headings"
    for first, second in zip(english, chinese):
        for what, one, other in zip(("numbers", "links", "rows of tables", "names"), first[2:], second[2:]):
            assert one == other, f"{what} of {first[1]!r} and {second[1]!r}"
    assert english_code == chinese_code
