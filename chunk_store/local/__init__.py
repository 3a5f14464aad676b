"""A store in a directory: an SQLite index, and files that are read straight into the pool."""
