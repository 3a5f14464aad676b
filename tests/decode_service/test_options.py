"""What follows from the decode service's options: its token for the prefill service, its batch sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from decode_service.options import DecodeOptions


def options(**given: Any) -> DecodeOptions:
    return DecodeOptions(**{"model": "m", "store": "file:///s", "prefill": "127.0.0.1:1", **given})


@pytest.mark.parametrize(
    ("batch_max", "strict", "sizes", "multiple"),
    [(1, False, (1, 4), 4), (4, False, (1, 4), 4), (6, False, (1, 4, 8), 4), (33, False, (1, 4, 8, 16, 32, 64), 4),
     (6, True, (6,), 6)],
)  # fmt: skip
def test_batches_are_padded_to_few_sizes(batch_max: int, strict: bool, sizes: tuple[int, ...], multiple: int) -> None:
    found = options(batch_max=batch_max)
    assert (found.decode_buckets(one_size=strict), found.row_multiple(one_size=strict)) == (sizes, multiple)


def test_the_token_is_the_given_one_or_the_files_first(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    assert options().token_for_prefill() == "" and options(prefill_token="t").token_for_prefill() == "t"
    file.write_text("# ours\nfirst\nsecond salt\n")
    assert options(prefill_token_file=file).token_for_prefill() == "first"
    file.write_text("first - admin\n")
    assert options(prefill_token_file=file).token_for_prefill() == "first"
    file.write_text("# nobody\n")
    assert options(prefill_token_file=file).token_for_prefill() == ""


def test_a_token_for_one_tenant_or_two_tokens_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("first red\n")
    with pytest.raises(ValueError, match="has a salt"):
        options(prefill_token_file=file).token_for_prefill()
    with pytest.raises(ValueError, match="are both set"):
        options(prefill_token="t", prefill_token_file=file).token_for_prefill()
    with pytest.raises(OSError):
        options(prefill_token_file=tmp_path / "absent").token_for_prefill()


def test_the_authority_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "ca").write_bytes(b"pem")
    assert options().prefill_ca is None and options(prefill_tls_ca=tmp_path / "ca").prefill_ca == b"pem"
