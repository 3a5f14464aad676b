"""The page at the gateway's root: ask, see the answer stream, and see where the KV of each part came from."""
