"""Benchmarks: ours beside the alternative in the same run, as ratios."""
