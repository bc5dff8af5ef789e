"""What a run would cost on N GPUs: memory, bytes, step time, and the layouts that fit.

One explicit model; docs/scaling.md has it in formulas, gpus/*.yaml its constants.
"""
