"""A KV cache that evicts: which page holds what, the cache that transformers sees, CUDA graphs."""
