"""Small changes made on purpose, each with the tests that must notice: ``python -m tests.mutants``."""
