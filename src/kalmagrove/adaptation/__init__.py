"""``kalmagrove adapt``: the training of an adaptor over a frozen model, in a run folder of its own."""
