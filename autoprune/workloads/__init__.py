"""Workloads: models by name or file, data by specification, splits, and the metric of a task."""
