"""The client library: what goes in and comes out are frozen dataclasses that know no protobuf.

Enumerations are their lower-case names (``"context"``, ``"exact"``, ``"store"``); an empty string means unspecified.
Durations are seconds, sizes are bytes, points in time are Unix seconds.
"""
