"""S2 attention inside Megatron's layers: the module, its checks, and corrections of Megatron."""
