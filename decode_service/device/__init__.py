"""The device thread: what comes to it, and what it launches and reads."""
