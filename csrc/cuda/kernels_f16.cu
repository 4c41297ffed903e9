#include "launch.inl"

template struct dk::Launcher<dk::f16>;
