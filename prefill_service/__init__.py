"""Prefill service: registers chunks, computes their KV once across all workers and publishes it."""
