"""Where KV that is not resident comes from."""
