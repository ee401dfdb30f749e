"""The training loop, measured: what it adds to a step, beside other loops, and how soon its first step is done."""
