// The kernels that write pages and tails and read them back: store_pages, restore, append, advance and append_blocks, a
// file each in pages/, which opens with its contract. Bit for bit what reference.py says.

#include "pages/advance.cuh"
#include "pages/append.cuh"
#include "pages/append_blocks.cuh"
#include "pages/restore.cuh"
#include "pages/store.cuh"
