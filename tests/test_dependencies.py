"""Declared lower bounds keep out versions with published advisories."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

# (package, newest version that is affected, advisory, source). An extra counts as its package.
ADVISORIES = (
    ("torch", "2.5.1", "CVE-2025-32434", "https://github.com/pytorch/pytorch/security/advisories/GHSA-53q9-r3pm-6pq6"),
    ("torch", "2.9.1", "CVE-2026-24747", "https://nvd.nist.gov/vuln/detail/CVE-2026-24747"),
    ("torch", "2.10.0", "PYSEC-2026-139", "https://osv.dev/vulnerability/PYSEC-2026-139"),
    ("ray", "2.54.1", "GHSA-mw35-8rx3-xf9r", "https://github.com/advisories/GHSA-mw35-8rx3-xf9r"),
    ("ray", "2.51.1", "CVE-2025-62593", "https://github.com/ray-project/ray/security/advisories/GHSA-q279-jhrf-cc6v"),
    ("ray", "2.8.0", "CVE-2023-48022", "https://nvd.nist.gov/vuln/detail/CVE-2023-48022"),
    ("onnx", "1.15.0", "CVE-2024-27318", "https://nvd.nist.gov/vuln/detail/CVE-2024-27318"),
    ("onnx", "1.15.0", "CVE-2024-27319", "https://nvd.nist.gov/vuln/detail/CVE-2024-27319"),
    ("onnx", "1.16.1", "CVE-2024-5187", "https://nvd.nist.gov/vuln/detail/CVE-2024-5187"),
    ("onnx", "1.16.2", "CVE-2024-7776", "https://nvd.nist.gov/vuln/detail/CVE-2024-7776"),
    ("onnx", "1.20.1", "CVE-2026-27489", "https://github.com/advisories/GHSA-3r9x-f23j-gc73"),
    ("onnx", "1.20.1", "CVE-2026-34445", "https://nvd.nist.gov/vuln/detail/CVE-2026-34445"),
    ("pillow", "12.1.0", "CVE-2026-25990", "https://nvd.nist.gov/vuln/detail/CVE-2026-25990"),
    ("pillow", "10.0.0", "CVE-2023-4863", "https://nvd.nist.gov/vuln/detail/CVE-2023-4863"),
    ("pillow", "10.1.0", "CVE-2023-50447", "https://nvd.nist.gov/vuln/detail/CVE-2023-50447"),
    ("pillow", "10.2.0", "CVE-2024-28219", "https://nvd.nist.gov/vuln/detail/CVE-2024-28219"),
    ("pillow", "11.2.1", "CVE-2025-48379", "https://nvd.nist.gov/vuln/detail/CVE-2025-48379"),
    ("scikit-learn", "1.4.2", "CVE-2024-5206", "https://nvd.nist.gov/vuln/detail/CVE-2024-5206"),
    ("transformers", "4.52.4", "CVE-2025-5197", "https://nvd.nist.gov/vuln/detail/CVE-2025-5197"),
)  # fmt: skip


def bounds(repository: Path) -> dict[str, Requirement]:
    """Return what is declared of each package."""
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    found = [Requirement(line) for line in [*extras, *project["dependencies"]]]
    return {requirement.name.lower(): requirement for requirement in found}


@pytest.mark.parametrize(
    ("package", "version", "advisory", "source"), ADVISORIES, ids=lambda value: str(value)[:20]
)
def test_affected_versions_are_refused(
    repository: Path, package: str, version: str, advisory: str, source: str
) -> None:
    requirement = bounds(repository)[package]
    assert not requirement.specifier.contains(version), (
        f"{requirement} allows {version}: {advisory}, {source}"
    )


def test_every_dependency_has_a_lower_bound(repository: Path) -> None:
    unbounded = [
        str(each)
        for each in bounds(repository).values()
        if not any(part.operator in (">=", "==", "~=") for part in each.specifier)
    ]
    assert unbounded == []
