// Everything the library asks of the system: memory, and threads. It all passes here, operator new included, so that a
// test can let the i-th request fail, for every i, and see that the failure arrives as an error and nothing else breaks.
#pragma once
#include <cstddef>

#include "quadriga.h"

// True if a test wants this request to fail. Called before each; a load and a branch unless somebody watches.
bool must_fail() noexcept;

// Memory at a multiple of `alignment`; freed by std::free. Throws std::bad_alloc.
void* aligned_memory(size_t bytes, size_t alignment);

// See qd_watch_allocations.
qd_allocations watch_allocations(int64_t fail_at);
