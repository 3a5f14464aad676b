"""From what a caller asks to a composition."""
