"""The sub-commands: each module parses its words and calls one function of the package."""
