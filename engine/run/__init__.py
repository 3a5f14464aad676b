"""Running a model: one protocol, a runner for any model's own code and a runner of fused kernels side by side."""
