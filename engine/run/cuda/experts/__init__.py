"""Layers of experts on CUDA: which experts a row goes to, and their products, grouped by expert."""
