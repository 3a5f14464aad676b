"""The cascade kernels: attention over shared chunks on a GPU."""
