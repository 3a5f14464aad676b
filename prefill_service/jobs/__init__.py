"""From what a caller asks of a chunk to its KV in the store."""
