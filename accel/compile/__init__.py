"""Regions of a model, compiled once and kept."""
