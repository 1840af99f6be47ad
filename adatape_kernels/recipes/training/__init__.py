"""`train`: its options, its run folder, and the loop that the demo and the comparisons share.

`train` is the command's work from options to report, and `train_config` its options, which
`model_options`, `training_options` and `loading_options` divide by what they decide.
`train_loop` trains a model by a `train_plan`: `epoch_batches` says what each step computes,
`train_step` computes its gradients as an `execution` says, and `epoch_metrics` keep what came out.
"""
