"""THE offline loop that trains every drafter, and what learns outside it: online from decoding, and by reinforcement."""
