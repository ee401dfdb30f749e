"""Models as folders and files for other tools."""
