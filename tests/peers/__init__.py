"""Other libraries' own tests, run on ours: ``python -m tests.peers --help``."""
