"""Training a self-speculative drafter from rollouts: speculative decoding of prompts, and updates from what the verifier said of it.

The trainer of the alignment-telemetry document (`train_bestcase.py`), on this engine (DVI, Bhansali and Heck, 2510.05421). It is
here that the shallow layers' LoRA trains too: the head alone learns in `training.online`.
"""
