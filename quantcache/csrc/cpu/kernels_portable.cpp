// See kernels.inc; build.py gives this file the flags of its instruction set.
#define QC_KERNELS kPortableKernels
#include "kernels.inc"
