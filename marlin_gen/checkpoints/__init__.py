"""Quantised checkpoints of other libraries: each module reads one format's tensors into a ``QuantizedWeight``."""
