"""Values in the memory of a Mooncake cluster."""
