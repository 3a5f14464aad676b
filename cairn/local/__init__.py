"""Services and models of this machine."""
