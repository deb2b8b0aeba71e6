"""Compression: groups found in a model, criteria, surgery and recovery."""
