"""What a tape adds to a pretrained ViT: it is fine-tuned without one and with one, side by side.

`finetune.run` is the command; each of its runs is one of `train`, in a folder of its own.
"""
