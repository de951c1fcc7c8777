// Quantising pages, restoring them and writing the tail. Bit for bit what reference.py says.
//
// Macros: HEAD_DIM, V_HEAD_DIM (head_dims), DTYPE (of the states).

#include "pages/advance.cuh"
#include "pages/append.cuh"
#include "pages/restore.cuh"
#include "pages/store.cuh"
