"""Parts of the benchmark of tables: its data, its rivals, our models and the page."""
