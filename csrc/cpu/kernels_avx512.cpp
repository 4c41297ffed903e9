#define DK_ISA avx512
#include "table.inl"
