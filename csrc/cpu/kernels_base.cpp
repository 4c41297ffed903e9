#define DK_ISA base
#include "table.inl"
