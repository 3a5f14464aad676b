"""Both services as one process: one copy of the model, one pool, one device thread."""
