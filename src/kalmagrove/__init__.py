"""KalmaGrove: train language models cheaply."""

__version__ = "0.1.0"
