"""S2 attention inside Megatron's layers: the module, its checks, what Megatron needs mended."""
