"""ETRM: an encoder-based Tiny Recursive Model for ARC-AGI. Importing this imports nothing heavy."""

__version__ = "0.1.0"
