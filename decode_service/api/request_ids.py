"""Which requests run, by owner and id: one owner's ids say nothing of another's."""

from __future__ import annotations

import uuid

from chunk_store.tenant import Tenant
from serving.errors import Conflict
from serving.rpc.field_bounds import check_request_id
from serving.trace.request_id import current_request_id


class RequestIds:
    """The ids from ``claim`` to ``release``. It belongs to the event loop."""

    def __init__(self) -> None:
        self._active: set[tuple[Tenant, str]] = set()
        self._aborted: set[tuple[Tenant, str]] = set()  # of the active ones; some are not with the worker yet

    def __len__(self) -> int:
        """How many run."""
        return len(self._active)

    def claim(self, wanted: str, owner: Tenant) -> str:
        """The id of a request that begins: the one that is wanted, or the call's. Raises ``Conflict`` if that runs."""
        check_request_id(wanted)
        request_id = wanted or current_request_id()
        if not wanted and (owner, request_id) in self._active:  # tried again while the first attempt still ends
            request_id = uuid.uuid4().hex
        if (owner, request_id) in self._active:
            raise Conflict(f"{request_id!r} is running", field="request_id", remedy="use another one")
        self._active.add((owner, request_id))
        return request_id

    def abort(self, request_id: str, owner: Tenant) -> bool:
        """Notes that a request is to end, wherever it is; whether it runs."""
        found = (owner, request_id) in self._active
        if found:
            self._aborted.add((owner, request_id))
        return found

    def is_aborted(self, request_id: str, owner: Tenant) -> bool:
        return (owner, request_id) in self._aborted

    def release(self, request_id: str, owner: Tenant) -> None:
        """The request is over."""
        self._active.discard((owner, request_id))
        self._aborted.discard((owner, request_id))
