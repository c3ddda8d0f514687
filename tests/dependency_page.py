"""The runtime dependencies, direct and brought along, with their licences: makes and checks docs/dependencies.md.

    python tests/dependency_page.py          # writes the page; `make dependencies`

Licences are what the installed packages say of themselves; of one that says it in words, `SAID_IN_WORDS` has what was
read in its licence file.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "dependencies.md"

WHAT_FOR = {
    "googleapis-common-protos": "details of gRPC errors",
    "grpcio": "gRPC",
    "grpcio-health-checking": "health checks",
    "grpcio-reflection": "reflection",
    "grpcio-status": "gRPC errors with details",
    "numba": "compiled search and simulation",
    "numpy": "tables of requests",
    "prometheus-client": "metrics",
    "protobuf": "messages",
    "pydantic": "configuration and policy files",
    "rich": "tables, progress and the live view in the terminal",
    "scipy": "fits, quantiles of confidence intervals",
    "tomli": "reading TOML on Python 3.10",
    "tomli-w": "printing the configuration",
    "typer": "the command line",
    "uvloop": "the event loop",
}

EXTRAS = (
    ("turbomind", "lmdeploy, torch", "Apache-2.0, BSD-3-Clause", "serving a model"),
    ("ray", "ray", "Apache-2.0", "replicas on several machines"),
    ("report", "matplotlib", "Matplotlib's, of the kind of PSF-2.0", "pages with plots"),
    ("otel", "opentelemetry-sdk, opentelemetry-exporter-otlp-proto-grpc", "Apache-2.0", "traces"),
)

SAID_IN_WORDS = {
    "numba": "BSD-2-Clause",
    "protobuf": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "uvloop": "MIT OR Apache-2.0",
}
CLASSIFIERS = {"MIT License": "MIT", "ISC License (ISCL)": "ISC", "Apache Software License": "Apache-2.0"}

PERMISSIVE = {
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "ISC",
    "MIT",
    "PSF-2.0",
    "Unlicense",
    "Zlib",
}
PERMISSIVE |= {"LLVM-exception"}
"""What a product may be built on without further thought."""


@dataclass
class Package:
    licence: str
    brought_by: set[str] = field(default_factory=set)


def runtime_packages() -> dict[str, Package]:
    """By name, for Linux and every Python that is supported; raises LookupError for one that is not installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, Package] = {}
    todo = [("", name) for name in _needed(project["dependencies"], "")]
    while todo:
        by, name = todo.pop()
        if name not in found:
            found[name] = Package(licence_of(name))
            todo += [(name, needed) for needed in _needed(requires(name) or [], "")]
        if by:
            found[name].brought_by.add(by)
    return dict(sorted(found.items()))


def _needed(requirements: list[str], extra: str) -> Iterator[str]:
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or any(
            requirement.marker.evaluate(
                {"extra": extra, "python_version": v, "python_full_version": f"{v}.0", "platform_system": "Linux"}
            )
            for v in ("3.10", "3.11", "3.12", "3.13")
        ):
            yield canonicalize_name(requirement.name)


def licence_of(name: str) -> str:
    """As an SPDX expression. Raises LookupError where it cannot be told."""
    if name in SAID_IN_WORDS:
        return SAID_IN_WORDS[name]
    try:
        said = metadata(name)
    except PackageNotFoundError:
        raise LookupError(f"{name} is not installed") from None
    if said.get("License-Expression"):
        return str(said["License-Expression"])
    for classifier in said.get_all("Classifier") or []:
        if classifier.startswith("License :: OSI Approved :: "):
            licence = CLASSIFIERS.get(classifier.rpartition(" :: ")[2])
            if licence:
                return licence
    raise LookupError(f"{name} does not say its licence in a way that is understood: {said.get('License', '')[:80]!r}")


def is_permissive(licence: str) -> bool:
    return set(re.findall(r"[A-Za-z0-9.+-]+", licence)) - {"AND", "OR", "WITH"} <= PERMISSIVE


TEXT = """\
# Dependencies

Made by `make dependencies` from what the packages say of themselves; a test fails where this page lacks one.

| package | licence | what for |
|---|---|---|
{packages}

The wheels of numpy and scipy also carry GCC's libgfortran (GPL, with the exception that lets any program be linked with
it) and libquadmath (LGPL-2.1), as shared libraries.

| extra | packages | licences | what for |
|---|---|---|---|
{extras}

**Versions.** `pyproject.toml` has the least that works. `requirements-dev.lock` has exact versions, with the hashes of
their files, of a development environment for Python 3.10 to 3.13: `make locked` makes that environment, `make lock`
brings the file up to date.

**Audit.** `make audit` looks the locked versions up among the known vulnerabilities (pip-audit, which asks PyPI) and
fails where one is known or a package could not be looked up; and it checks that every licence above is permissive.
"""


def render() -> str:
    packages = "\n".join(
        f"| {name} | {package.licence} | {WHAT_FOR.get(name) or 'of ' + ', '.join(sorted(package.brought_by))} |"
        for name, package in runtime_packages().items()
    )
    extras = "\n".join(f"| `{extra}` | {names} | {licences} | {what} |" for extra, names, licences, what in EXTRAS)
    return TEXT.format(packages=packages, extras=extras)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
