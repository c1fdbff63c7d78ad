"""Learning while decoding (DVI): a listener that turns cycles into samples, and samples into steps of the draft head."""
