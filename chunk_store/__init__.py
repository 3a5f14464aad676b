"""Chunk store: what a stored chunk is, and where chunks live. Bytes and metadata only, no torch.

Start at ``store.py`` for the promises and at ``open.py`` for a store; ``docs/store_format.md`` has the bytes.
"""
