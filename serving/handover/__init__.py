"""KV from one process's pool into another's on the same host, without the store: lender, borrower, and leases."""
