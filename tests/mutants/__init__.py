"""Small changes, each with the tests that must notice: ``python -m tests.mutants --help``."""
