"""The atomic steps of the Redis ledger, as Lua scripts that the server runs one at a time.

Each may run twice, when the connection broke before its answer came; the second run then answers like the first.

Time is the server's, so machines with different clocks agree. Every script gets the store's prefix as KEYS[1] and
builds the other names from it: one Redis server, not a cluster. What they share, and the names of things, is in
``prelude.py``.
"""
