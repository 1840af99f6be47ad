"""`train`: its options, its run folder, and the loop that the demo and the comparisons share.

`train` is the command's work from options to report, in stages: a `run_request` is what is asked
for, `run_setup` what is read and checked before a model is made, `trained_model` what is trained,
and `run_record` what is written while it is; `saved_run` is what a run goes on from.
`train_config` has the options, which `model_options`, `training_options` and `loading_options`
divide by what they decide.
`train_loop` trains a model by a `train_plan`: `epoch_batches` says what each step computes,
`train_step` computes its gradients as an `execution` says, and `epoch_metrics` keep what came out.
"""
