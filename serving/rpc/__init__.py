"""gRPC: the server, who may call, what may be sent, and statuses."""
