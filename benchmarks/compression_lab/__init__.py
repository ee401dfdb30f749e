"""The methods of the compression benchmark."""
