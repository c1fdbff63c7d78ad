"""Taps for training: computed live from the frozen target, or stored as safetensors shards."""
