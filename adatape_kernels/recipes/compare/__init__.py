"""AdaTape beside ViT, UViT, U2T and A-ViT: accuracy against speed and against FLOPs, in one run.

`compare.run` is the command; a run is one model of one size from one seed.
"""
