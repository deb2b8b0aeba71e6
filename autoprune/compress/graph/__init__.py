"""Which channels of a network can only be removed together, read from its exported graph."""
