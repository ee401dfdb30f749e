"""Parts of the benchmark of images."""
