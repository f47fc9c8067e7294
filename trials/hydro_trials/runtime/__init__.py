"""Runs bundles: what happens around the training of lanes."""
