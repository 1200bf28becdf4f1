# SPDX-License-Identifier: Apache-2.0
"""The Python code of the documentation runs, block after block, as it stands."""

from __future__ import annotations

import re
import runpy
import secrets
import subprocess
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import torch
from support import ready
from support.conform_runs import python
from support.inductor import needs_inductor
from support.migrate_pulls import Rows, sides
from support.sentences import LIMIT, long_sentences

from portakv import errors
from portakv.graph.alarms import RULES, Rule
from portakv.migrate import Ticket
from portakv.registry import registry
from portakv_conformance.contract.command import implementation, outcomes_of
from portakv_conformance.simdev import build

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: str) -> list[str]:
    code = BLOCK.findall((ROOT / page).read_text())
    assert code, f"{page} holds no block marked python"
    return code


def run(page: str, code: list[str], names: dict[str, Any]) -> dict[str, Any]:
    for number, block in enumerate(code, 1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    return names


INDUCTOR = [needs_inductor, pytest.mark.xdist_group("inductor")]  # one process imports it
PAGES = [
    pytest.param(
        str(page.relative_to(ROOT)),
        marks=INDUCTOR if "@torch.compile" in page.read_text() else [],
    )
    for page in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
    if BLOCK.search(page.read_text())
]


@pytest.fixture
def acme(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page may register a backend or metrics: no test meets them."""
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    monkeypatch.setattr(prometheus_client, "REGISTRY", prometheus_client.CollectorRegistry())


def _named_anywhere(check_available: bool = False) -> torch.device | None:
    """PyPI's torch names ``cuda`` as its accelerator anywhere, unless it checks availability."""
    return None if check_available else torch.device("cuda")


@pytest.mark.usefixtures("acme")
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("no_driver", [False, True], ids=["as it is", "cuda without a driver"])
def test_a_page_s_code_runs(
    no_driver: bool, page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # a page may name a folder
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    if no_driver:
        if torch.accelerator.is_available():
            pytest.skip("there is a device to take")
        monkeypatch.setattr(torch.accelerator, "current_accelerator", _named_anywhere)
    run(page, blocks(page), {})


def test_the_first_copy_of_the_quickstart_moves_what_it_says() -> None:
    names = run("docs/quickstart.md", blocks("docs/quickstart.md")[:1], {})
    caches = names["caches"]
    chunk = names["chunk"]
    slots = names["slots"]
    for layer, cache in enumerate(caches):
        for kv in range(2):
            rows = cache[kv].flatten(0, 1)[slots].flatten(1)
            assert torch.equal(chunk[kv, layer], rows)


def migration_page() -> list[str]:
    """Return the code of the page on migration that needs other processes or objects."""
    page = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    return re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def test_the_migration_page_pulls_an_offer_by_its_name() -> None:
    src = Rows()
    dst = Rows(8, fill=-1)
    with sides() as made:
        owner = made.owner(src.shard)
        names = {
            "secrets": secrets,
            "Ticket": Ticket,
            "owner": owner,
            "owner_address": owner.channel.address,
            "epoch": owner.epoch,
            "reader": made.reader(dst.shard),
        }
        exec(migration_page()[2], names)
        pulled: Any = names["pulled"]
        pulled.synchronize(30)
        assert torch.equal(src.rows([7, 3], 32), dst.rows([0, 1], 32))


def test_the_migration_page_pulls_rows_that_are_still_written() -> None:
    src = Rows()
    rows = src.whole.clone()
    src.whole.fill_(-2)
    dst = Rows(8, fill=-1)

    def run_layer(layer: int) -> None:
        src.whole[layer] = rows[layer]

    with sides() as made:
        names = {
            "owner": made.owner(src.shard),
            "reader": made.reader(dst.shard),
            "layers": 2,
            "run_layer": run_layer,
        }
        exec(migration_page()[3], names)
        pulled: Any = names["pulled"]
        pulled.synchronize(30)
        assert torch.equal(src.rows([7, 3], 32), dst.rows([0, 1], 32))


def test_the_two_processes_of_the_migration_page_hand_rows_over() -> None:
    owner, reader, *_ = migration_page()
    with ready.Python("-c", owner, stdout=subprocess.PIPE) as offering:
        assert offering.stdout is not None
        done = ready.run("-c", reader, stdin=offering.stdout)
    assert done.returncode == 0, done.stderr
    assert offering.returncode == 0


def test_the_pictures_are_what_their_code_draws() -> None:
    images = ROOT / "docs" / "images"
    pictures = runpy.run_path(str(images / "diagrams.py"))["PICTURES"]
    pictures["pull"] = runpy.run_path(str(images / "pull.py"))["picture"]
    for name, draw in pictures.items():
        drawn = images.joinpath(f"{name}.svg").read_text(encoding="utf-8")
        assert drawn == draw(), f"Run the code of docs/images/{name}.svg."


#: The kinds of documentation pages, as a page's first lines name them.
KINDS = re.compile(r"^\*.*?(Tutorial|How-to|Reference|Explanation)\b", re.IGNORECASE | re.MULTILINE)
EVERY_PAGE = sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_page_says_its_kind(page: Path) -> None:
    opening = page.read_text(encoding="utf-8").splitlines()[:6]
    assert KINDS.search("\n".join(opening)), (
        f"Expected a line such as *How-to: ...* under the title of {page.name}."
    )


@pytest.mark.parametrize(
    "page",
    [*sorted(ROOT.glob("*.md")), *EVERY_PAGE],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_sentences_are_short(page: Path) -> None:
    """`python tests/support/sentences.py --list PAGE` prints the long ones."""
    assert long_sentences(page) == []


def test_a_long_sentence_is_found_across_lines_and_not_in_code(tmp_path: Path) -> None:
    words = " ".join(["Word"] * (LIMIT + 1))
    page = tmp_path / "page.md"
    page.write_text(f"# {words}\n\n```\n{words}\n```\n\n- Short. {words[:49]}\n  {words[50:]}.\n")
    assert [(line, count) for line, count, _ in long_sentences(page)] == [(7, LIMIT + 1)]
    page.write_text(f"{words[:60]}. And `{words}` is one word.\n\n| {words} |\n")
    assert [(line, count) for line, count, _ in long_sentences(page)] == [(3, LIMIT + 1)]


#: Where links of pages that are shown elsewhere lead: the README, and links out of docs/.
FILES = re.compile(r"https://github.com/portakv/portakv/(?:blob|raw)/main/")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w -]", "", title).strip().replace(" ", "-") for title in plain}


def broken_links(page: Path) -> list[str]:
    """Return the links of a page to files and headings of this tree that do not exist."""
    broken = []
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for link in _LINK.findall(re.sub(r"`[^`]*`", "", text)):
        own = FILES.sub("", link)
        place, _, anchor = own.partition("#")
        if "://" in own or own.startswith("mailto:"):
            continue
        path = page if not place else (ROOT if own != link else page.parent) / place
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            broken.append(link)
    return broken


def test_links_lead_to_files_and_headings() -> None:
    pages = [*ROOT.glob("*.md"), *EVERY_PAGE, *ROOT.glob("*/*.md"), *ROOT.glob("benchmarks/*/*.md")]
    found = {str(page.relative_to(ROOT)): broken_links(page) for page in pages}
    assert {page: links for page, links in found.items() if links} == {}


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A title\n\n[a](#a-title) [b](#b) [c](other.md) `[d](none.md)` [e](page.md#e)\n"
    )
    assert broken_links(page) == ["#b", "other.md", "page.md#e"]


def test_the_tables_of_the_api_list_what_its_directives_render() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for section in page.split("\n## ")[1:]:
        cells = re.findall(r"^\| (`[^|]+) \|", section, re.M)
        names = re.findall(r"`([\w.]+)`", " ".join(cells))
        listed = {name.rpartition(".")[2] for name in names}
        for directive in section.split("\n::: ")[1:]:
            name = directive.split()[0].rpartition(".")[2]
            members = re.search(r"members: \[(.+)\]", directive)
            if name.islower() and members:  # a module
                assert listed >= set(members[1].split(", ")), f"{name}: {listed}"
            elif not name.islower() or "_" in name:
                assert name in listed, f"docs/api.md lists no {name} in a table."


def _section(page: str, title: str) -> str:
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_design_names_each_package() -> None:
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    terms = [line for line in _section(design, "Glossary").splitlines() if line.startswith("| ")]
    assert len(terms) > len(["heading"])
    rows = [
        line.rpartition(" | ")[2]
        for line in _section(design, "Where to look").splitlines()
        if line.startswith("| ")
    ]
    named = {name for row in rows for name in re.findall(r"`(\w[\w/]*)`", row)} - {"conform"}
    library = ROOT / "portakv"
    for name in named:
        places = (library / name, library / f"{name}.py", ROOT / name)
        assert any(place.exists() for place in places), name
    packages = {file.parent.name for file in library.glob("*/__init__.py")}
    assert packages - named == set(), "docs/design.md does not say what lies there"


@pytest.mark.parametrize(
    ("contract", "name"),
    [
        ("tier", "portakv_examples.memory_tier:make"),
        ("io", "portakv_examples.plain_io:Plain"),
        ("transport", "portakv_examples.channel_transport:ChannelTransport"),
    ],
)
def test_the_examples_of_extending_keep_their_contract(contract: str, name: str) -> None:
    assert f"portakv conform --contract {contract} {name}" in (
        ROOT / "docs" / "extending.md"
    ).read_text(encoding="utf-8")
    outcomes = outcomes_of(contract, implementation(contract, name))
    assert outcomes
    assert {each.name: each.failure for each in outcomes if each.failure is not None} == {}


#: The last backend of the guide for vendors checks rows that a plane shows, and split ones.
CHECKS = """
cache = torch.zeros(4, 2, 2, 8, 16, device="npu")
for layout in ("block head dim/16 token dim%16", "layer block head token dim"):
    form = KVView(cache, layout).form
    print(AcmePlanes(torch.device("npu")).check(CopyPlan(form, form, 1, 0)))
"""


@pytest.mark.skipif(build.missing() is not None, reason=build.missing() or "")
def test_the_code_of_the_guide_for_vendors_runs() -> None:
    """It runs in a separate process, since the guide gives the simulated device another name."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    guide = re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    done = python("-c", "\n".join([*guide, CHECKS]))
    assert done.returncode == 0, done.stderr
    assert re.findall("rejected|accepted", done.stdout) == ["rejected", "accepted"]


def _sources() -> list[str]:
    """Return the texts of the library with pieces of one string put together."""
    return [
        re.sub(r'"\s*\n?\s*f?"', "", path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / "portakv").rglob("*.py"))
    ]


def _missing(messages: list[str]) -> list[str]:
    """Return the messages that no source has; `...` stands for at most 150 characters."""
    sources = _sources()
    missing = []
    for message in messages:
        parts = [part for part in message.split("...") if part.strip()]
        pattern = re.compile(".{0,150}?".join(map(re.escape, parts)), re.DOTALL)
        candidates = [source for source in sources if all(part in source for part in parts)]
        if not any(map(pattern.search, candidates)):
            missing.append(message)
    return missing


def _first_cells(title: str) -> list[str]:
    """Return the code that begins the rows of the tables of a section of docs/operations.md."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    return [
        line.removeprefix("| `").partition("` | ")[0]
        for line in _section(page, title).splitlines()
        if line.startswith("| `")
    ]


def test_the_page_of_operations_has_each_error() -> None:
    classes = {name for name, each in vars(errors).items() if isinstance(each, type)}
    assert {*_first_cells("Errors")} >= classes - {"PortaKVError"} | {"IntegrationError"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_page_of_operations_has_each_warning(rule: Rule) -> None:
    text = re.sub(r"\{[^}]*\}", "...", rule.text)
    (message,) = (each for each in _first_cells("Troubleshooting") if text.startswith(each))
    assert len(message) > 30


def test_the_messages_of_troubleshooting_are_those_of_the_library() -> None:
    messages = _first_cells("Troubleshooting")
    assert len(messages) > 50
    assert _missing(messages) == []
    assert _missing(["Expected a folder of gold, got ..."]) == [
        "Expected a folder of gold, got ..."
    ]
