"""The offline loop, on an objective that learns in milliseconds."""
