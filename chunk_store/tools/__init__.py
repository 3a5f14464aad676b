"""Looking after a store: verifying, archives, capacity, selecting chunks."""
