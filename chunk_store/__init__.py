"""Chunk store: what a stored chunk is, and where chunks live. Bytes and metadata only, no torch."""
