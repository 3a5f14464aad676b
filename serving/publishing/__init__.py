"""From the pages of a pool into the store, beside what the device computes next."""
