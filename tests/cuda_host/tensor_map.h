// What the tests' driver writes into a tensor map, and copies of boxes read from it: a matrix of 16-bit values. The real one is
// opaque.
#pragma once

#include <cstdint>

struct HostTensorMap {
    uint64_t address, columns, rows, stride; // of a row, bytes
    uint64_t wide, high;                     // of a box
    uint64_t mark;
    uint64_t unused[9];
};
static_assert(sizeof(HostTensorMap) == 128, "as large as CUtensorMap");
constexpr uint64_t TENSOR_MAP_MARK = 0x746573656e746d70;
