"""Which version of the package this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """The installed version; "unknown" in a checkout that is not installed."""
    try:
        return version("cairn")
    except PackageNotFoundError:
        return "unknown"
