"""Tests of autoprune.compress."""
