"""One file or folder per drafter, found by listing this folder. They never import one another."""
