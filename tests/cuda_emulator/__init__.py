"""The CUDA kernels compiled for the host: see emulator.h, build.py, check.py."""
