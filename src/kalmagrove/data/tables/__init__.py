"""Tables: their files, what their columns hold, and their rows as examples."""
