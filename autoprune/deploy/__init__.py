"""Deployment: one file for each runtime, from a network to a model file and what really runs of it."""
