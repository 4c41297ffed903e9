"""The PTX of nvcc as C++ for the emulator of ../emulator.h: translate.py, runtime.h, build.py."""
