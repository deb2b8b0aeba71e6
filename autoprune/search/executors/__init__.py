"""Executors: who runs the trials that a driver decided on, on this machine or on a cluster."""
