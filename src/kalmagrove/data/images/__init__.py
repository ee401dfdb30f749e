"""Images as sequences of patches, with labels and captions."""
