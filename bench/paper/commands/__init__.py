"""The commands of `python -m bench.paper`.

Each is a module: its docstring is its help, `add_arguments` has its options, and `main` returns the
exit code.
"""
