"""Computing and publishing the KV of a chunk."""
