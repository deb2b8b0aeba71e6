"""What may be tried: groups found in a model, recipes, and search spaces."""
