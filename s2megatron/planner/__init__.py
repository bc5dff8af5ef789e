"""What a run would cost on N GPUs: memory, bytes, step time, and the layouts that fit.

docs/scaling.md has the model's formulas, s2megatron/gpus/*.yaml the machine's constants.
"""
