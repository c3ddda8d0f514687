"""Metrics, traces and logs: observers of the runtime. Nothing that serves a request depends on them."""
