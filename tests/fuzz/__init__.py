"""Coverage-guided fuzzing of loaders and of the C++ binding: `python -m tests.fuzz --help`."""
