"""What s2megatron adds to Megatron's checkpoints, and conversion to and from dense formats."""
