"""The parity task: AdaTape beside a Transformer and a Universal Transformer, in one table.

`parity_table.run` is the command; a run is one model at one length from one seed.
"""
