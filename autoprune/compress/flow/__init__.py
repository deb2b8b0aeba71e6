"""The flow of channels through a network: which of them share a scale, seen in one run."""
