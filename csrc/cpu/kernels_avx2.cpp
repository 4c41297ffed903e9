#define DK_ISA avx2
#include "table.inl"
