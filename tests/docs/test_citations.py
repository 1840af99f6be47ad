"""What the repository cites exists: sections of docs/SPEC.md, linked files and headings, paths."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("adatape_kernels", "benchmarks", "csrc", "docs", "tests")
SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h", ".md")
SPEC = ROOT / "docs/SPEC.md"

_NUMBER = r"\d+(?:\.\d+)?"
_LIST = rf"{_NUMBER}(?:(?:, and |, | and | to |–){_NUMBER})*"
CITATION = re.compile(rf"\bSPEC(?:\.md)?(?:,? sections?)? ({_LIST})")
# Within the definition a section is cited without its name.
INTERNAL_CITATION = re.compile(rf"\b[Ss]ections? ({_LIST})")
ITEM_CITATION = re.compile(r"\[section (\d+)\]\([^)]*\), item (\d+)")

LINK = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(([^()\s]+)\)")
QUOTED_PATH = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[^`\s]*)`")


def repository_files(*suffixes):
    found = [path for path in ROOT.iterdir() if path.suffix in suffixes]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def named(path):
    return str(path.relative_to(ROOT))


def prose(path):
    """A Markdown file's text with its code blocks, fenced or indented, left empty."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"(?<=\n\n) {4}\S.*(?:\n {4}.*|\n(?=\n {4}))*", "", text)


def definitions(text):
    """The numbers that a citation may have: of sections ("3") and of their items ("8.3")."""
    found, section = set(), None
    for line in text.splitlines():
        if heading := re.match(r"## (\d+)\. \S", line):
            section = heading[1]
            found.add(section)
        elif section and (item := re.match(r"(\d+)\. \S", line)):
            found.add(f"{section}.{item[1]}")
    return found


def cited_numbers(text, pattern=CITATION):
    """Every number that the text cites; "2 to 5" cites 2, 3, 4 and 5."""
    # A citation may run on into the next line, behind a comment's mark.
    text = re.sub(r"[ \t]*\n[ \t]*(?:#|//|\*)?[ \t]*", " ", text)
    numbers = []
    for match in pattern.finditer(text):
        for part in re.split(r", and |, | and ", match[1]):
            first, _, last = part.replace("–", " to ").partition(" to ")
            numbers += [str(n) for n in range(int(first), int(last) + 1)] if last else [first]
    return numbers


def missing_citations(spec_text):
    """(file, number) of each citation that leads nowhere in this text of the definition."""
    exist = definitions(spec_text)
    missing = []
    for path in repository_files(*SUFFIXES):
        if path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8")
        numbers = cited_numbers(text)
        if path == SPEC:
            numbers += cited_numbers(text, INTERNAL_CITATION)
            numbers += [".".join(match.groups()) for match in ITEM_CITATION.finditer(text)]
        missing += [(named(path), number) for number in numbers if number not in exist]
    return missing


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("(SPEC 6)", ["6"]),
        ("SPEC 3 and 4.", ["3", "4"]),
        ("(SPEC 2 to 5)", ["2", "3", "4", "5"]),
        ("SPEC sections 3, 4 and 6", ["3", "4", "6"]),
        ("(SPEC 2, 6)", ["2", "6"]),
        ("as SPEC 8.3 says", ["8.3"]),
        ("SPEC.md section 10", ["10"]),
        ("# the rule of SPEC\n    # 3, which", ["3"]),
        ("SPEC 6; scenic adatape/layers.py", ["6"]),
        ("the SPEC says 4", []),
    ],
)
def test_a_citation_is_understood(text, numbers):
    assert cited_numbers(text) == numbers


def test_each_citation_leads_to_a_section():
    assert missing_citations(SPEC.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("section", range(1, 13))
def test_the_definition_has_its_sections(section):
    assert str(section) in definitions(SPEC.read_text(encoding="utf-8"))


@pytest.mark.parametrize("removed", ["## 3. ", "## 6. ", "## 10. ", "3. *Nothing leaks"])
def test_a_citation_of_a_removed_section_is_found(removed):
    """The check above can fail: without a heading or an item its citations lead nowhere."""
    text = SPEC.read_text(encoding="utf-8")
    without = "".join(line for line in text.splitlines(True) if not line.startswith(removed))
    assert without != text
    assert missing_citations(without)


def anchors(path):
    """The anchors of a Markdown file's headings, as GitHub and the site name them."""
    found = set()
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for title in re.findall(r"^#{1,6} (.+)$", text, flags=re.M):
        slug = re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        number, unique = 0, slug
        while unique in found:
            number += 1
            unique = f"{slug}-{number}"
        found.add(unique)
    return found


@pytest.mark.parametrize("path", repository_files(".md"), ids=named)
def test_links_lead_somewhere(path):
    broken = []
    for target in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("path", repository_files(".md"), ids=named)
def test_paths_in_prose_exist(path):
    """`adatape_kernels/elastic.py` is there; <op> and * stand for anything."""
    missing = []
    for quoted in QUOTED_PATH.findall(prose(path)):
        if re.search(r"…|\.\.\.", quoted):
            continue
        pattern = re.sub(r"<\w+>", "*", re.sub(r"\{[^}]*\}", "*", quoted)).rstrip("/")
        if not any(ROOT.glob(pattern)):
            missing.append(quoted)
    assert missing == []


def test_make_targets_exist():
    """Every `make target` that a page names is one of the Makefile's."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named_targets = {
        target
        for path in repository_files(".md")
        for targets_named in re.findall(r"`make ([a-z ]+)", path.read_text(encoding="utf-8"))
        for target in targets_named.split()
    }
    assert {"test", "docs"} <= named_targets
    assert named_targets - targets == set()
