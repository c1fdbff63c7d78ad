"""The losslessness contract: what must hold for every drafter on every family. `checks` says it, the tests and `mutants` run it."""
