"""Forwards through the model's own code, attention in torch: the CPU, and the reference for the others."""
