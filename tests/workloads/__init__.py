"""Tests of models, data, splits and the training of the dense network."""
