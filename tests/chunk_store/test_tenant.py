"""Whose content it is."""

from __future__ import annotations

from chunk_store.tenant import DEFAULT_TENANT, SHARED_SALT, SHARED_TENANT, tenant_of, visible_to


def test_a_salt_is_known_by_a_digest_only() -> None:
    assert tenant_of("") == DEFAULT_TENANT and tenant_of(SHARED_SALT) == SHARED_TENANT
    assert tenant_of("pepper") == tenant_of("pepper") != tenant_of("salt")
    assert "pepper" not in tenant_of("pepper") and len(tenant_of("pepper")) == 64


def test_each_tenant_sees_its_own_first_and_what_is_shared() -> None:
    tenant = tenant_of("pepper")
    assert visible_to(tenant) == (tenant, SHARED_TENANT)
    assert visible_to(DEFAULT_TENANT) == (DEFAULT_TENANT, SHARED_TENANT)
    assert visible_to(SHARED_TENANT) == (SHARED_TENANT,)
