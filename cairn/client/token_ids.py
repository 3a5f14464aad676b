"""Token ids as callers give them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from cairn.client.errors import invalid

TOKEN_ID_MAX = 2**32 - 1


def token_ids(ids: Sequence[int], field: str) -> list[int]:
    """Token ids as plain integers; numpy's and torch's are accepted. Raises ``InvalidRequest``."""
    try:
        plain = [operator.index(token) for token in ids]
    except TypeError as error:
        raise invalid(field, f"token ids must be integers ({error})") from error
    for token in plain:
        if not 0 <= token <= TOKEN_ID_MAX:
            raise invalid(field, f"token id {token} is not in 0..{TOKEN_ID_MAX}")
    return plain
