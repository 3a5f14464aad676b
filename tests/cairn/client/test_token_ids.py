"""Token ids as callers give them: anything that is an integer, nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cairn.client.errors import InvalidRequest
from cairn.client.token_ids import TOKEN_ID_MAX, token_ids


def test_whatever_is_an_integer_is_a_token_id() -> None:
    given: Any = [0, np.int64(7), True, TOKEN_ID_MAX]
    assert token_ids(given, "ids") == [0, 7, 1, TOKEN_ID_MAX]


@pytest.mark.parametrize("given", [[1.0], ["1"], [None], [-1], [TOKEN_ID_MAX + 1]])
def test_what_is_none_is_refused(given: Any) -> None:
    with pytest.raises(InvalidRequest, match="ids: token id"):
        token_ids(given, "ids")
