"""The password of a store's server in a file, where it need not stand on a command line."""

from __future__ import annotations

from pathlib import Path


def password_in(file: Path, setting: str) -> str:
    """The first line of ``file``. Raises ``ValueError`` that names the ``setting`` that names the file."""
    try:
        password = file.read_text().partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text"  # whose bytes would be shown
        raise ValueError(f"{setting}: cannot read {str(file)!r}: {reason}") from None
    if not password:
        raise ValueError(f"{setting}: {str(file)!r} begins with an empty line; write the password there")
    return password
