# SPDX-License-Identifier: Apache-2.0
"""`.ci/release`: what it refuses, and that a file's bytes do not depend on when it was built.

And the other scripts of the workflows, without what they would install or upload.
"""

from __future__ import annotations

import gzip
import importlib
import io
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from support.waits import LIMIT

from portakv import __version__

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
#: Hosts of package registries, which a user may have replaced.
HOSTS = re.compile(r"(pypi|pythonhosted|conda|docker|ghcr|quay|nvcr)\.(?:org|io|com)\b")
#: Files that people and programs read as text.
READ = {"", ".py", ".md", ".yml", ".yaml", ".toml", ".txt", ".sh", ".cff"}
UNDATED = "# Changelog\n\n## Unreleased: 1.2.3\n\nA line.\n"
DATED = "# Changelog\n\n## 1.2.3, 2026-12-01\n\nA line.\n"


#: A package index with one release of each package, for `python3 -m pip index versions PACKAGE`.
INDEX = '#!/bin/sh\n[ "$5" = absent ] || echo "$5 (9.8.7)"\n'


@pytest.fixture(scope="module")
def release() -> Iterator[Any]:
    """.ci/release.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / ".ci"))
        module: Any = importlib.import_module("release")
        yield module


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A small repository of version 1.2.3, whose section in the changelog has no date."""
    (tmp_path / "portakv").mkdir()
    (tmp_path / "portakv" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text(UNDATED)
    git(tmp_path, "init", "-q", "-b", "main")
    commit(tmp_path)
    return tmp_path


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=a test", "-c", "user.email=test@localhost"]
    who += ["-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, timeout=LIMIT)


def commit(folder: Path) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "a commit")


def test_a_clean_tree_is_accepted(release: Any, clone: Path) -> None:
    assert release.check(clone, None) == "1.2.3"


def test_a_development_version_has_the_section_of_the_next_one(release: Any, clone: Path) -> None:
    (clone / "portakv" / "__init__.py").write_text('__version__ = "1.2.3.dev0"\n')
    commit(clone)
    assert release.check(clone, None) == "1.2.3.dev0"
    git(clone, "tag", "v1.2.3.dev0")
    with pytest.raises(release.Refused, match=r"without \.dev for a tag, got 1\.2\.3\.dev0"):
        release.check(clone, "v1.2.3.dev0")


def test_this_version_has_a_section(release: Any) -> None:
    assert release.version_of(ROOT) == __version__
    version = re.escape(__version__.partition(".dev")[0])
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(release.SECTION.format(version=version), text, re.MULTILINE)


@pytest.mark.parametrize("file", ["portakv/__init__.py", "new.txt"])
def test_a_changed_tree_is_refused(release: Any, clone: Path, file: str) -> None:
    (clone / file).write_text('__version__ = "1.2.3"  # changed\n')
    with pytest.raises(release.Refused, match=f"clean tree, got 1 changed files, first {file}"):
        release.check(clone, None)


@pytest.mark.parametrize("heading", ["## 1.2.4", "## Unreleased: 1.2.30", "### 1.2.3", "## 1x2y3"])
def test_a_version_without_a_section_is_refused(release: Any, clone: Path, heading: str) -> None:
    (clone / "CHANGELOG.md").write_text(f"{heading}\n\nA line that says 1.2.3.\n")
    commit(clone)
    with pytest.raises(release.Refused, match=r"a section of version 1\.2\.3 in CHANGELOG\.md"):
        release.check(clone, None)


def test_a_tag_is_accepted(release: Any, clone: Path) -> None:
    (clone / "CHANGELOG.md").write_text(DATED)
    commit(clone)
    git(clone, "tag", "v1.2.3")
    assert release.check(clone, "v1.2.3") == "1.2.3"


def test_a_tag_of_another_version_is_refused(release: Any, clone: Path) -> None:
    with pytest.raises(release.Refused, match=r"the tag v1\.2\.3, got v1\.2\.4"):
        release.check(clone, "v1.2.4")


def test_a_tag_whose_section_has_no_date_is_refused(release: Any, clone: Path) -> None:
    git(clone, "tag", "v1.2.3")
    with pytest.raises(release.Refused, match="a date in the changelog's section"):
        release.check(clone, "v1.2.3")


def test_a_tag_of_another_commit_is_refused(release: Any, clone: Path) -> None:
    (clone / "CHANGELOG.md").write_text(DATED)
    commit(clone)
    git(clone, "tag", "v1.2.3")
    (clone / "new.txt").touch()
    commit(clone)
    with pytest.raises(release.Refused, match="the checked-out commit"):
        release.check(clone, "v1.2.3")


def packed(path: Path, mtime: int, names: list[str]) -> None:
    """Write an archive as a build would, at a time and in an order."""
    with (
        gzip.GzipFile(path, "wb", mtime=mtime) as file,
        tarfile.open(fileobj=file, mode="w") as tar,
    ):
        for name in names:
            member = tarfile.TarInfo(name)
            member.mtime = mtime
            member.uid = mtime
            member.uname = f"user{mtime}"
            member.size = len(name)
            member.mode = 0o600 + mtime % 2
            tar.addfile(member, io.BytesIO(name.encode()))


def test_an_archive_does_not_depend_on_its_build(release: Any, tmp_path: Path) -> None:
    first = tmp_path / "first.tar.gz"
    second = tmp_path / "second.tar.gz"
    packed(first, 1_000, ["a/b", "a/c"])
    packed(second, 2_002, ["a/c", "a/b"])
    assert first.read_bytes() != second.read_bytes()
    for path in (first, second):
        release.normalize(path, 1_700_000_000)
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as tar:
        files = {each.name: tar.extractfile(each) for each in tar.getmembers()}
        assert {name: file.read() for name, file in files.items() if file} == {
            "a/b": b"a/b",
            "a/c": b"a/c",
        }


def test_two_builds_that_differ_are_refused(
    release: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is left that could be published."""
    builds = iter(("one", "another"))

    def build(root: Path, folder: Path, _: object) -> dict[str, str]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.whl").write_text(next(builds))
        return {"a.whl": release.digest(folder / "a.whl")}

    monkeypatch.setattr(release, "build", build)
    monkeypatch.setattr(release, "print_what", lambda folder: None)
    with pytest.raises(release.Refused, match=r"the same bytes twice, got other ones of a\.whl"):
        release.build_twice(tmp_path / "dist")
    assert not (tmp_path / "dist").exists()


def test_the_bill_of_materials_covers_every_extra_of_a_user_s_process(release: Any) -> None:
    """Other extras serve who writes, measures or tests PortaKV, or shows the demo."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    others = {"all", "bench", "conformance", "demo", "docs", "lint", "test"}
    extras = {*project["optional-dependencies"]}
    assert others < extras
    assert {*release.RUNTIME_EXTRAS} == extras - others


def test_the_text_of_a_release_is_its_section_of_the_changelog(release: Any, clone: Path) -> None:
    """Its links lead to the files of the tag: the text is shown elsewhere."""
    line = "[a](docs/a.md#b), [c](https://localhost/c), [d](#d)"
    (clone / "CHANGELOG.md").write_text(
        f"# Changelog\n\n## 1.2.3, 2026-12-01\n\n{line}\n\n### Fixed\n\nLast.\n\n## 1.2.2\n\nOld.\n"
    )
    at = f"{release.FILES}/v1.2.3"
    shown = f"[a]({at}/docs/a.md#b), [c](https://localhost/c), [d](#d)"
    assert release.notes(clone, "v1.2.3") == f"{shown}\n\n### Fixed\n\nLast."
    assert release.notes(clone, "v1.2.2") == "Old."
    with pytest.raises(release.Refused, match=r"a section of version 1\.2\.4"):
        release.notes(clone, "v1.2.4")


# scripts of the workflows


def program(folder: Path, name: str, text: str) -> None:
    """Write a program that stands in for another one."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    (folder / name).chmod(0o755)


def script(
    folder: Path, *words: str, tree: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of a tree, for which the programs of a folder come first."""
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **variables}
    return subprocess.run(
        words, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT
    )


def tree_of(clone: Path, *scripts: str) -> Path:
    """Return a clone that also has some scripts of .ci."""
    for name in scripts:
        text = (ROOT / ".ci" / name).read_text(encoding="utf-8")
        program(clone / ".ci", name, text)
    return clone


def built(clone: Path, version: str = "1.2.3") -> list[str]:
    """Write the files of a release, and return their names."""
    wheels = [f"a-{version}-py3-none-manylinux_2_17_{x}.whl" for x in ("aarch64", "x86_64")]
    names = [f"a-{version}.tar.gz", *wheels, f"a-{version}.cdx.json"]
    (clone / "dist").mkdir()
    for name in names:
        (clone / "dist" / name).touch()
    return [f"dist/{name}" for name in names]


#: Writes its arguments, one a line, and the text of the release.
GH = (
    '#!/bin/sh\nprintf "%s\\n" "$@" >gh; while [ "$1" != --notes-file ]; do shift; done; cat "$2"\n'
)


def test_attach_makes_a_release_with_its_files(tmp_path: Path, clone: Path) -> None:
    (clone / "CHANGELOG.md").write_text(DATED)
    tree = tree_of(clone, "attach", "release.py")
    files = built(tree)
    program(tmp_path / "bin", "gh", GH)
    done = script(tmp_path / "bin", ".ci/attach", "v1.2.3", tree=tree)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "A line.\n"
    words = (tree / "gh").read_text(encoding="utf-8").splitlines()
    assert words[:6] == ["release", "create", "v1.2.3", "--verify-tag", "--title", "PortaKV 1.2.3"]
    assert words[-4:] == files


def test_a_dry_run_of_attach_makes_no_release(tmp_path: Path, clone: Path) -> None:
    (clone / "CHANGELOG.md").write_text(DATED)
    tree = tree_of(clone, "attach", "release.py")
    files = built(tree)
    program(tmp_path / "bin", "gh", GH)
    done = script(tmp_path / "bin", ".ci/attach", "--dry-run", "v1.2.3", tree=tree)
    assert done.returncode == 0, done.stderr
    command, *text = done.stdout.splitlines()
    assert command.startswith("gh release create v1.2.3 ")
    assert command.split()[-4:] == files
    assert text == ["A line."]
    assert not (tree / "gh").exists()


@pytest.mark.parametrize(
    ("words", "version", "why"),
    [
        (["v1.2.3"], "1.2.4", "of v1.2.3 in dist/, got 0 files"),
        (["v1.2.3"], "1.2.3", "Expected a section of version 1.2.3"),
        ([], "1.2.3", "Expected a tag such as v0.1.0, got ''"),
        (["--dry-run", "main"], "1.2.3", "Expected a tag such as v0.1.0, got 'main'"),
    ],
)
def test_attach_refuses_files_and_texts_of_another_release(
    tmp_path: Path, clone: Path, words: list[str], version: str, why: str
) -> None:
    (clone / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.2\n\nA line.\n")
    tree = tree_of(clone, "attach", "release.py")
    built(tree, version)
    program(tmp_path / "bin", "gh", GH)
    done = script(tmp_path / "bin", ".ci/attach", *words, tree=tree)
    assert done.returncode != 0
    assert why in done.stderr
    assert not (tree / "gh").exists()


#: Makes an environment whose only program is `mike`.
TOOLS = '#!/bin/sh\nmkdir -p "$1/bin" && cp mike "$1/bin/mike"\n'
#: Adds a file of its first name to the branch, and lets another clone push meanwhile, one time.
MIKE = """#!/usr/bin/env bash
set -eu
[[ $1 == deploy ]] || exit 0
pages=$(mktemp -d -p .)
git worktree add -q --detach "$pages" "$(git rev-parse -q --verify gh-pages || git rev-parse HEAD)"
echo "${@: -1}" >"$pages/${*: -1}.html"
git -C "$pages" add -A
git -C "$pages" commit -qm "Add ${*: -1}"
git branch -qf gh-pages "$(git -C "$pages" rev-parse HEAD)"
if [[ -n ${RACE:-} && ! -e raced ]]; then
    touch raced
    (cd "$RACE" && RACE= .ci/docs-site dev)
fi
"""


def site(folder: Path, origin: Path) -> Path:
    """Return a clone of an origin, in which the scripts of the site run."""
    git(origin.parent, "clone", "-q", str(origin), str(folder))
    for key in ("user.name", "user.email"):
        git(folder, "config", key, "test@localhost")
    program(folder, "mike", MIKE)
    program(tree_of(folder, "docs-site") / ".ci", "tools", TOOLS)
    return folder


def test_two_pushes_of_the_site_at_the_same_time_keep_both(tmp_path: Path, clone: Path) -> None:
    """The main branch's is first while that of a tag is being built."""
    origin = tmp_path / "origin.git"
    git(clone, "clone", "-q", "--bare", str(clone), str(origin))
    main = site(tmp_path / "main", origin)
    tag = site(tmp_path / "tag", origin)
    around = {"PUSH": "1", "RACE": str(main), "LC_ALL": "C"}
    done = script(tmp_path, ".ci/docs-site", "v1.2.3", tree=tag, **around)
    assert done.returncode == 0, done.stderr
    assert "rejected" in done.stderr
    pages = script(
        tmp_path, "git", "ls-tree", "--name-only", "gh-pages", tree=origin
    ).stdout.split()
    assert {"dev.html", "latest.html"} < {*pages}


def test_without_push_the_site_stays_in_the_clone(tmp_path: Path, clone: Path) -> None:
    origin = tmp_path / "origin.git"
    git(clone, "clone", "-q", "--bare", str(clone), str(origin))
    tree = site(tmp_path / "tree", origin)
    assert script(tmp_path, ".ci/docs-site", "dev", tree=tree).returncode == 0
    branches = script(tmp_path, "git", "branch", "--list", "gh-pages", tree=origin).stdout
    assert branches == ""
    assert "gh-pages" in script(tmp_path, "git", "branch", "--list", tree=tree).stdout


def nightly(folder: Path, *engines: str) -> subprocess.CompletedProcess[str]:
    """Run `.ci/nightly --list`; the newest release of each package is 9.8.7."""
    program(folder, "python3", INDEX)
    return script(folder, ".ci/nightly", "--list", *engines)


def matrix(folder: Path) -> list[str]:
    return script(folder, ".ci/plugs", "--list").stdout.split()


def test_nightly_runs_each_part_of_the_matrix_in_the_newest_releases(tmp_path: Path) -> None:
    parts = {re.sub(r"-[\d.]+", "-9.8.7", name) for name in matrix(tmp_path)}
    assert {"vllmcpu-9.8.7", "vllmcpu-9.8.7-rest"} < parts
    done = nightly(tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(parts)


def test_nightly_runs_all_parts_of_one_engine(tmp_path: Path) -> None:
    listed = nightly(tmp_path, "vllmcpu", "lmcache").stdout.split()
    assert listed == ["vllmcpu-9.8.7", "vllmcpu-9.8.7-rest", "lmcache-9.8.7"]


@pytest.mark.parametrize("engine", ["pandas", "vllmcp", "0.32.0"])
def test_nightly_refuses_an_engine_that_the_matrix_lacks(tmp_path: Path, engine: str) -> None:
    """With no release to run, .ci/plugs would run the whole matrix."""
    done = nightly(tmp_path, engine)
    assert done.returncode == 2
    assert f"Expected an engine of the matrix of .ci/plugs, got '{engine}'." in done.stderr


def test_nightly_refuses_an_index_without_the_engine(tmp_path: Path) -> None:
    program(tmp_path, "python3", INDEX.replace("absent", "sglang"))
    done = script(tmp_path, ".ci/nightly", "--list", "sglang")
    assert done.returncode == 1
    assert "Expected a release of sglang in the package index, got none." in done.stderr


def test_the_workflow_runs_every_engine_of_the_matrix(tmp_path: Path) -> None:
    text = (ROOT / ".github" / "workflows" / "nightly.yml").read_text(encoding="utf-8")
    listed = re.search(r"engine: \[(.+)\]", text)
    assert listed
    assert {*listed[1].split(", ")} == {name.partition("-")[0] for name in matrix(tmp_path)}


# workflows


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_each_step_of_a_workflow_calls_one_script(workflow: Path) -> None:
    """So that what runs there runs here."""
    lines = workflow.read_text(encoding="utf-8").splitlines()
    stripped = [line.strip() for line in lines]
    commands = [line.removeprefix("run: ") for line in stripped if line.startswith("run: ")]
    assert commands
    for command in commands:
        (script, *_) = command.split()
        assert re.fullmatch(r"\.ci/[\w-]+( (--)?[\w-]+| \"\$\w+\")*", command), command
        assert (ROOT / script).stat().st_mode & 0o100, script


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_named_by_a_commit(workflow: Path) -> None:
    text = workflow.read_text(encoding="utf-8")
    used = re.findall(r"uses: (.+)", text)
    wrong = [each for each in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", each)]
    assert used
    assert wrong == []


def test_the_nightly_workflow_keeps_the_results_of_each_script() -> None:
    """Also if the script failed, since a row of the table says so."""
    text = (ROOT / ".github" / "workflows" / "nightly.yml").read_text(encoding="utf-8")
    for job in text.partition("\njobs:\n")[2].split("\n\n"):
        folder = re.search(r"STEP_RESULTS: (\S+)", job)
        assert folder
        upload = job.partition("uses: actions/upload-artifact@")[2]
        assert "if: always()" in upload
        assert f"path: {folder[1]}/\n" in upload


def test_what_a_tag_starts_waits_for_the_reviewer() -> None:
    """Neither the release's page nor its documentation appears before the upload."""
    folder = ROOT / ".github" / "workflows"
    by_tag = [path.name for path in WORKFLOWS if "tags:" in path.read_text(encoding="utf-8")]
    assert by_tag == ["release.yml"]
    text = (folder / "release.yml").read_text(encoding="utf-8")
    jobs = {job.split(":")[0].strip(): job for job in text.partition("\njobs:\n")[2].split("\n\n")}
    assert "environment: release" in jobs["publish"]
    for name in {*jobs} - {"build", "publish"}:
        assert "needs: publish" in jobs[name], name
    assert {*jobs} == {"build", "publish", "attach", "docs"}


def test_no_file_names_the_host_of_a_registry() -> None:
    """A user's index may be another one."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    assert HOSTS.search(".".join(("files", "pythonhosted", "org")))
    found = []
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix in READ:
            match = HOSTS.search(path.read_text(encoding="utf-8", errors="replace"))
            found += [f"{name}: {match[0]}"] if match else []
    assert found == []
