"""What ``benchmarks/optimizers.py`` is made of."""
