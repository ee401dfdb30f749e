"""Scaling laws: losses of many runs against parameters, tokens and rank."""
