"""EAGLE-3: its objective, decoding, checkpoints. `reference` is the slow version that the objective is compared with."""
