"""Measurement: capability, latency, size, memory, and the host behind the figures."""
