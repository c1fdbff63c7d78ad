"""Drafters x prompts x settings, measured side by side in one process: the measure everything else is judged by."""
