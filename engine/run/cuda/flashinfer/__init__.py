"""FlashInfer's kernels as an attention backend: an optional dependency."""
