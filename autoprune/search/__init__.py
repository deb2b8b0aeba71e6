"""The search: what is tried next, for how long, and how one trial runs."""
