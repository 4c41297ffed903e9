"""A stand-in for a GPU, for `python -m bench.gpu --dry-run` alone: no other module imports it.

`device` puts tensors on the CPU, the kernels into the emulator of tests/cuda_emulator, and small
fakes into torch.cuda; `tools` puts fake programs of NVIDIA on PATH; `sizes` makes everything tiny.
"""
