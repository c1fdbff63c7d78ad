"""What crosses rooms: records, the strict config base, errors, seeds, provenance and atomic files. Imports nothing of ours."""
