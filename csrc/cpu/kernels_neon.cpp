#define DK_ISA neon
#define DK_NEON
#include "table.inl"
