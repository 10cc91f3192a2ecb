"""The options of each command, and the files that hold them."""
