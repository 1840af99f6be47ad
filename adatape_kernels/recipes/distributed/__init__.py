"""Training in several processes, which torchrun starts.

`ranks` reads torchrun's environment, `joining` starts the process group, and `one_voice` lets one
rank say why all end; `dealing` decides which rank computes which images of a step, and remembers
how many rows each image took; `shared_gradients` makes the gradients of all ranks those of the
whole batch, and `divided_parameters` does so where each rank holds a part of each parameter;
`divided_checkpoint` writes the parts, and `checkpoint_parts` joins them; `imbalance` says how long
ranks wait for one another, and `loading_of_ranks` how fast they load; `sharded_evaluation` measures
a test set together; `rank_workers` deals out whole runs; `rank_watch` ends all ranks when one of
them is gone, and `begun_runs` says which runs go on when torchrun has started them anew.

Every rank prepares the same batch by the same random numbers, and so the images of a step, their
augmentation and their mixing are those of one process; only who computes what of it differs. Rank
0 alone prints, and writes into the run's folder.
"""
