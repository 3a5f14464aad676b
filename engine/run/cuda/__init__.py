"""Forwards on CUDA: fused layers, captured decode steps, attention of long pieces, loading from host memory."""
