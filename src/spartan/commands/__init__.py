"""The `spartan` command line: one folder or file for each command."""
