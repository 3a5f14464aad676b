"""The bytes of a stored entry, and how data and listings are cut."""
