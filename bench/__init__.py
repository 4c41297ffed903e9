"""Data sets, the masked-dense peer, training and the demo: not part of the package."""
