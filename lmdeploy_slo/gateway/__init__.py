"""The gRPC face: validation, status mapping, the service, health and reflection. Knows nothing of scheduling."""
