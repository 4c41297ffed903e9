#include "launch.inl"

template struct dk::Launcher<dk::bf16>;
