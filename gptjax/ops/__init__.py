"""Pure functions of arrays: attention, norms, activations, products, cross-entropy.

Each op has a *reference* of a few lines, the definition that the field would write, next to faster
implementations of the same function. `implementations.py` is the table: one row a platform, one
column an op. This folder is the only one that knows what a CPU, a GPU or a TPU likes.

To add a faster form of an op, write it next to its reference and name it in the row of its
platform; `tests/ops/test_implementations.py` then compares it with the reference.
"""
