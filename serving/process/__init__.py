"""A service as a process: options, loading, logs, metrics, start and end."""
