"""What a sequence holds beside words: an input encoder and an output head each, by name."""
