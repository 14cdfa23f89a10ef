"""Records to documents to shards to batches.

`sources` (the table of data sources) opens documents with `readers/`; `shards` writes them as
tokens; `loader` makes batches of windows of tokens, and `packing` of a task's examples.
"""
