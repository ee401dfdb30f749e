"""Two made languages whose best possible loss is known: a hidden Markov source and associative recall."""
