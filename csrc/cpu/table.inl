// The body of every ISA unit: compiles all kernels with the flags of the unit and defines their
// table.
#include "backward.h"
#include "forward.h"

#define DK_STRING_(x) #x
#define DK_STRING(x) DK_STRING_(x)
#define DK_JOIN_(a, b) a##b
#define DK_JOIN(a, b) DK_JOIN_(a, b)

const dk::KernelTable dk::DK_JOIN(kernels_, DK_ISA) = {
    DK_STRING(DK_ISA), forward<float>, forward<double>, backward<float>, backward<double>,
};
