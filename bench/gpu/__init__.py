"""Everything that needs a GPU, in one call: `python -m bench.gpu --output DIR`.

`__main__` and `processes` use the standard library only, so that nothing broken in an installation
stops the call; each stage is a module and a process of its own. `plans` alone knows the kernels.
"""
