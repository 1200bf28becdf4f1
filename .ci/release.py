# SPDX-License-Identifier: Apache-2.0
"""Build what a release publishes, twice, and compare the bytes; `.ci/release` calls it.

    python .ci/release.py check [--tag vX.Y.Z]   the tree can be released; needs Python alone
    python .ci/release.py build FOLDER           the files of the last commit, in a new folder
    python .ci/release.py notes vX.Y.Z           print the changelog's section, for .ci/attach

The source distribution is made from the last commit, and the wheels from the source distribution,
one for each architecture. ziglang builds their compiled core on any machine. Every time in the
files is that of the commit.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Extras whose packages run in a user's process; the bill of materials lists what they bring.
RUNTIME_EXTRAS = (
    "cli",
    "cuda",
    "integrations",
    "metrics",
    "migrate",
    "mooncake",
    "nixl",
    "otel",
    "remote",
    "serving",
    "storage",
    "triton",
    "zstd",
)
#: The architectures of the wheels.
ARCHITECTURES = ("x86_64", "aarch64")
#: A section of the changelog: `## 0.1.0, 2026-12-01`, or `## Unreleased: 0.1.0` before that.
SECTION = r"^## (?:(Unreleased): )?{version}(?:, (\d{{4}}-\d\d-\d\d))?$"
#: Where files of a tag are at the host of the repository.
FILES = "https://github.com/portakv/portakv/blob"
#: What another build may differ in: folder, time zone, language, and the rights of new files.
SURROUNDINGS = (
    {"TZ": "UTC", "LC_ALL": "C.UTF-8"},
    {"TZ": "Pacific/Auckland", "LC_ALL": "C"},
)


class Refused(Exception):
    """The tree cannot be released; the message is one sentence with what to do."""


def version_of(root: Path) -> str:
    """Return `__version__` of the package, and import nothing."""
    tree = ast.parse((root / "portakv" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise Refused("Expected __version__ in portakv/__init__.py, got none. Write it.")


def check(root: Path, tag: str | None) -> str:
    """Return the version that the tree would publish. A development version has the section of the
    version that it leads to.

    Args:
        root: a clone.
        tag: the tag that is released; None: a dry run, whose changelog may be undated.

    Raises:
        Refused: the tree has changes, the version has no section in the changelog, or the tag does
            not fit.
    """
    changes = git(root, "status", "--porcelain")
    if changes:
        first = changes.splitlines()[0].split(maxsplit=1)[1]
        raise Refused(
            f"Expected a clean tree, got {len(changes.splitlines())} changed files, first {first}. "
            f"Commit or remove them."
        )
    version = version_of(root)
    if tag is not None and ".dev" in version:
        raise Refused(f"Expected a version without .dev for a tag, got {version}. Set __version__.")
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    leads_to = version.partition(".dev")[0]
    section = re.search(SECTION.format(version=re.escape(leads_to)), text, re.MULTILINE)
    if section is None:
        raise Refused(
            f"Expected a section of version {leads_to} in CHANGELOG.md, got none. Write "
            f"`## {leads_to}, YYYY-MM-DD`, or `## Unreleased: {leads_to}` before the release."
        )
    if tag is not None:
        check_tag(root, tag, version, section)
    return version


def check_tag(root: Path, tag: str, version: str, section: re.Match[str]) -> None:
    """Raise `Refused` if a tag does not name this version and commit, or the section is undated."""
    if tag != f"v{version}":
        raise Refused(f"Expected the tag v{version}, got {tag}. Change the tag or __version__.")
    if section[1] or not section[2]:
        raise Refused(
            f"Expected a date in the changelog's section of {version}, got {section[0]!r}. Write "
            f"`## {version}, YYYY-MM-DD`."
        )
    tagged = git(root, "rev-parse", f"refs/tags/{tag}^{{commit}}")
    if tagged != git(root, "rev-parse", "HEAD"):
        raise Refused(f"Expected {tag} to be the checked-out commit, got another. Check it out.")


def notes(root: Path, tag: str) -> str:
    """Return the changelog's section of a tag, whose links lead to the files of that tag.

    Raises:
        Refused: the changelog has no such section.
    """
    version = tag.removeprefix("v")
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    section = re.search(SECTION.format(version=re.escape(version)), text, re.MULTILINE)
    if section is None:
        raise Refused(f"Expected a section of version {version} in CHANGELOG.md, got none.")
    body = text[section.end() :].partition("\n## ")[0].strip()
    return re.sub(r"\]\((?!#|\w+:)", f"]({FILES}/{tag}/", body)


def git(root: Path, *words: str) -> str:
    """Return the output of a git command in a clone."""
    done = subprocess.run(
        ["git", "-C", str(root), *words], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.strip()


def build(root: Path, folder: Path, surroundings: Mapping[str, str]) -> dict[str, str]:
    """Build the files of the last commit into a folder, and return their SHA-256 by name."""
    folder.mkdir(parents=True, exist_ok=True)
    epoch = git(root, "log", "-1", "--format=%ct")
    around = {**os.environ, **surroundings, "SOURCE_DATE_EPOCH": epoch}
    around.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch, "tree")
        archive = subprocess.run(
            ["git", "-C", str(root), "archive", "HEAD"], stdout=subprocess.PIPE, check=True
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
            packed.extractall(tree, filter="tar")
        make("--sdist", tree, folder, around)
        (source,) = folder.glob("*.tar.gz")
        normalize(source, int(epoch))

        unpacked = Path(scratch, "source")
        with tarfile.open(source) as packed:
            packed.extractall(unpacked, filter="data")
        (inside,) = unpacked.iterdir()
        for architecture in ARCHITECTURES:
            make("--wheel", inside, folder, {**around, "PORTAKV_CORE_TARGET": architecture})
        bill_of_materials(inside, folder, around)
    return {path.name: digest(path) for path in sorted(folder.iterdir())}


def make(kind: str, tree: Path, folder: Path, around: Mapping[str, str]) -> None:
    """Run `python -m build` with the setuptools of this environment."""
    # Rights of files that the build writes must not depend on the user's.
    command = ["-m", "build", "--no-isolation", kind, "--outdir", str(folder), str(tree)]
    done = subprocess.run(
        [sys.executable, *command],
        env=around,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        umask=0o022,
        check=False,
    )
    if done.returncode != 0:
        sys.stderr.write(done.stdout)
        raise Refused(
            f"Expected {kind[2:]} to be built, got exit code {done.returncode}. See above."
        )


def normalize(path: Path, epoch: int) -> None:
    """Write a source distribution anew: sorted, without users, every time the epoch's."""
    with tarfile.open(path) as packed:
        members = sorted(packed.getmembers(), key=lambda member: member.name)
        files = {each.name: packed.extractfile(each) for each in members if each.isfile()}
        contents = {name: file.read() for name, file in files.items() if file is not None}
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.PAX_FORMAT) as packed:
        for member in members:
            if not member.isfile() and not member.isdir():
                raise Refused(f"Expected files and folders, got {member.name}. Leave it out.")
            plain = tarfile.TarInfo(member.name)
            plain.type = member.type
            plain.mtime = epoch
            plain.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            plain.size = member.size
            packed.addfile(plain, io.BytesIO(contents.get(member.name, b"")))
    with path.open("wb") as target, gzip.GzipFile("", "wb", 9, target, mtime=epoch) as packed_again:
        packed_again.write(written.getvalue())


def bill_of_materials(tree: Path, folder: Path, around: Mapping[str, str]) -> None:
    """Write the packages that an installation brings, as a CycloneDX document.

    These are what uv resolves for the base package and its run-time extras under constraints.txt.
    """
    about = HeaderParser().parsestr((tree / "PKG-INFO").read_text(encoding="utf-8"))
    name, version = about["Name"], about["Version"]
    extras = [word for extra in RUNTIME_EXTRAS for word in ("--extra", extra)]
    platform = ["--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_28"]
    certificates = ["--system-certs"] if Path("/etc/ssl/certs/ca-certificates.crt").exists() else []
    resolve = [sys.executable, "-m", "uv", "pip", "compile", str(tree / "pyproject.toml")]
    resolve += [*extras, *platform, "-c", str(ROOT / "constraints.txt"), *certificates]
    resolved = subprocess.run(
        [*resolve, "--no-annotate", "--no-header", "--quiet"],
        env=around,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    project = tree / "sbom" / "pyproject.toml"
    project.parent.mkdir()
    fields = {"name": name, "version": version, "description": about["Summary"]}
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in fields.items()]
    project.write_text("".join(["[project]\n", *lines, 'license = "Apache-2.0"\n']))
    describe = [sys.executable, "-W", "ignore", "-m", "cyclonedx_py", "requirements", "-"]
    describe += [
        "--pyproject",
        str(project),
        "--mc-type",
        "library",
        "--output-reproducible",
        "--short-PURLs",
    ]
    subprocess.run(
        [*describe, "-o", str(folder / f"{name}-{version}.cdx.json")],
        env=around,
        input=resolved,
        check=True,
    )


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def print_what(folder: Path) -> None:
    """Print what the wheels hold, by package, and what they require. They differ in the core."""
    first, *others = sorted(folder.glob("*.whl"))
    with zipfile.ZipFile(first) as archive:
        names = archive.namelist()
        (path,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        about = HeaderParser().parsestr(archive.read(path).decode())
    for other in others:
        with zipfile.ZipFile(other) as archive:
            if sorted(archive.namelist()) != sorted(names):
                raise Refused(
                    f"Expected the files of {first.name} in {other.name}, got other ones."
                )
    required = [each for each in about.get_all("Requires-Dist", []) if "extra ==" not in each]
    print(f"{about['Name']} {about['Version']}, Python {about['Requires-Python']}")
    print(f"requires  {', '.join(required)}")
    for package, count in sorted(Counter(name.partition("/")[0] for name in names).items()):
        print(f"holds     {package}: {count} files")
    (bill,) = folder.glob("*.cdx.json")
    print(f"materials {len(json.loads(bill.read_text())['components'])} packages in {bill.name}")


def build_twice(folder: Path) -> None:
    """Build into a folder, once more elsewhere, and print the sizes and both hashes.

    Raises:
        Refused: the folder has files, or the two builds differ.
    """
    if folder.exists() and any(folder.iterdir()):
        raise Refused(f"Expected {folder} to be empty, got files. Remove them.")
    first = build(ROOT, folder, SURROUNDINGS[0])
    with tempfile.TemporaryDirectory() as scratch:
        second = build(ROOT, Path(scratch, "a second folder"), SURROUNDINGS[1])
    print_what(folder)
    for name, sha in first.items():
        print(f"{name}, {(folder / name).stat().st_size:,} bytes")
        print(f"  first   {sha}")
        print(f"  second  {second.get(name)}")
    differing = sorted(name for name in {*first, *second} if first.get(name) != second.get(name))
    if differing:
        shutil.rmtree(folder)
        raise Refused(f"Expected the same bytes twice, got other ones of {', '.join(differing)}.")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 with one sentence on standard error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("check").add_argument("--tag")
    verbs.add_parser("build").add_argument("folder", type=Path)
    verbs.add_parser("notes").add_argument("tag")
    args = parser.parse_args(words)
    try:
        if args.verb == "check":
            print(f"{check(ROOT, args.tag)} can be released")
        elif args.verb == "notes":
            print(notes(ROOT, args.tag))
        else:
            build_twice(args.folder)
    except Refused as error:
        print(f".ci/release: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
