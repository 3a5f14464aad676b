"""The KV in memory: pages, resident chunks, the host tier, and pages as bytes."""
