#include "launch.inl"

template struct dk::Launcher<double>;
