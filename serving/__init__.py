"""Serving: what both gRPC services share. Above the engine, below the services; it knows neither of them."""
