"""The trainer behind the command line: data, models, loop, checkpoints."""
