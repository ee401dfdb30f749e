"""Turns the results of a comparison into a page, a Markdown table, a terminal table and a plain sentence."""
