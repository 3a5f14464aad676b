"""Forwards: one runner a kind of device, side by side."""
