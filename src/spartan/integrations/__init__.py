"""Trainers that people use: one module each, to be imported by its name.

`spartan.integrations.transformers` and `spartan.integrations.lightning` need these libraries.
"""
