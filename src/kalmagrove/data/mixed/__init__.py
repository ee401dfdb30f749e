"""Texts with images and rows of tables in one sequence."""
