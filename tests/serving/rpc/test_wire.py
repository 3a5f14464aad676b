"""Enums of the domain and their numbers on the wire, and stage times in a reply."""

from __future__ import annotations

import pytest

from chunk_store.entry import MissReason
from chunk_store.key import ChunkType
from engine.reuse import Exactness, ReuseMode
from protos import chunks_pb2
from serving.errors import InvalidRequest
from serving.rpc import wire
from serving.trace.stages import STAGES


def test_every_enum_of_the_domain_has_a_number() -> None:
    assert {wire.chunk_type(wire.chunk_type_out(kind)) for kind in ChunkType} == set(ChunkType)
    assert {wire.reuse_mode(wire.reuse_mode_out(mode)) for mode in ReuseMode} == set(ReuseMode)
    assert len({wire.exactness_out(kind) for kind in Exactness}) == len(Exactness)
    assert len({wire.miss_reason_out(reason) for reason in (None, *MissReason)}) == len(MissReason) + 1
    for reason in MissReason:
        assert chunks_pb2.MissReason.Name(wire.miss_reason_out(reason)) == f"MISS_REASON_{reason.name}"


def test_unspecified_and_unknown_numbers() -> None:
    assert wire.chunk_type(0) is ChunkType.CONTEXT
    assert wire.chunk_type(0, unspecified=ChunkType.QUERY) is ChunkType.QUERY
    assert wire.reuse_mode(0) is ReuseMode.EXACT
    for parse_number in (wire.chunk_type, wire.reuse_mode):
        with pytest.raises(InvalidRequest) as caught:
            parse_number(99)
        assert "99" in caught.value.message


def test_stages_are_the_fields_of_the_message() -> None:
    assert {f"{stage}_ns" for stage in STAGES} == set(chunks_pb2.StageTimings.DESCRIPTOR.fields_by_name)
    message = wire.timings_out({stage: 1 + index for index, stage in enumerate(STAGES)})
    assert [getattr(message, f"{stage}_ns") for stage in STAGES] == list(range(1, len(STAGES) + 1))
