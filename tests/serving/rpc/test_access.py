"""The token file: whose salt, who may administer, and the quotas of a tenant."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunk_store.tenant import SHARED_TENANT, Tenant, tenant_of
from serving.rpc.access import Access
from serving.tenancy.quotas import NO_QUOTAS, Quotas, TenantQuotas

B = Tenant("b")


def test_a_token_file_with_options(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("one\nboss - admin\na1 salt-a bytes=10GiB chunks=5 pins=0 waiting=3 running=2 jobs=4\na2 salt-a\n")
    access = Access.from_file(file)

    def caller(token: str, salt: str = "") -> tuple[str, bool, bool, Tenant]:
        found = access.caller([("authorization", f"Bearer {token}")], salt)
        return found.salt, found.admin, found.sees_all, found.owner

    assert caller("one", "x") == ("x", False, False, "") and caller("boss", "x") == ("x", True, True, "")
    assert caller("a1", "x") == caller("a2") == ("salt-a", False, False, tenant_of("salt-a"))
    quotas = TenantQuotas(access.quotas, Quotas(chunks=7, jobs=1))
    assert quotas.of(tenant_of("salt-a")) == Quotas(5, 10 * 2**30, 0, 3, 2, 4)
    assert quotas.of(B) == Quotas(chunks=7, jobs=1) and quotas.of(SHARED_TENANT) == NO_QUOTAS
    open_to_all = Access().caller(None, "x")
    assert (open_to_all.salt, open_to_all.admin, open_to_all.sees_all) == ("x", False, True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a salt what", "'what' is not one of admin, chunks=N"),
        ("a salt bytes=much", "bytes: 'much' is not a size"),
        ("a salt chunks=-1", "chunks: -1 is negative"),
        ("a salt running=0", "running: at least 1"),
        ("a salt chunks=1 chunks=2", "chunks stands there twice"),
        ("a salt chunks=1\nb salt chunks=2", ":2: other quotas for the same tenant"),
    ],
)
def test_a_line_that_is_none(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "tokens").write_text(line)
    with pytest.raises(ValueError, match=words):
        Access.from_file(tmp_path / "tokens")
