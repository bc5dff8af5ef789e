"""One training run: from a run file to Megatron's loop, its options, output folder and figures."""
