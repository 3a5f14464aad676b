"""The load generator: seeded workloads, how they arrive, whom they ask, and what came of it. `cairn bench serve`."""
