"""Tests of autoprune/cli/."""
