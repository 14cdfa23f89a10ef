"""Attention: one mask specification, and the backends that honour it.

Every backend is a function of q [B, T, K, G, C] (K key/value heads, G query heads on each), k and v
[B, S, K, C] and a `Mask`, and gives [B, T, K, G, C]. To add one, write a file with such a function
and add a row to `BACKENDS` in backends.py.
"""
