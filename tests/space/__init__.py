"""Tests of autoprune/space/."""
