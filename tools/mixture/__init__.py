"""Choosing the mixture of data by merging models that were trained on one source each; `python -m tools.mixture`."""
