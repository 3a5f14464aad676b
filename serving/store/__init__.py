"""What both services put around a chunk store: a meter, gauges, heartbeats."""
