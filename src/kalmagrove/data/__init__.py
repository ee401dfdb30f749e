"""From text to batches: sources, splits, tokenisers, packed token files and the windows read from them."""
