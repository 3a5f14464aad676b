"""The password of a store's server, where it need not stand on a command line: in the environment or in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

VARIABLE = "CAIRN_STORE_PASSWORD"
FILE_VARIABLE = "CAIRN_STORE_PASSWORD_FILE"


def password_from(environment: Mapping[str, str]) -> str | None:
    """The value of ``CAIRN_STORE_PASSWORD``, or what stands in the file that ``CAIRN_STORE_PASSWORD_FILE`` names.

    None without either; an empty variable is none. Raises ``ValueError`` that names the variable.
    """
    password, file = environment.get(VARIABLE), environment.get(FILE_VARIABLE)
    if password and file:
        raise ValueError(f"{VARIABLE} and {FILE_VARIABLE} are both set; set one of them")
    return password_in(Path(file), FILE_VARIABLE) if file else password or None


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
