"""Several prefill and decode services on one store, as processes on loopback."""
