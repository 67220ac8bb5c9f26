// Arithmetic in 16 bits, and what a warp does together, by their definitions.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_host.h"

namespace cuda_host {

namespace {

// A binary format: an implicit one, `digits` with it, the exponent of the last place of subnormals, bits of the exponent.
struct Format {
    int digits, last_place, exponent_bits;
    unsigned short nan;
};
constexpr Format F16 = {11, -24, 5, 0x7fff};
constexpr Format BF16 = {8, -133, 8, 0x7fff};

unsigned short encode(double value, Format f) {
    if (std::isnan(value)) return f.nan;
    const int mantissa_bits = f.digits - 1;
    const unsigned sign = std::signbit(value) ? 0x8000 : 0, infinity = ((1u << f.exponent_bits) - 1) << mantissa_bits;
    double size = std::fabs(value);
    if (std::isinf(size)) return (unsigned short)(sign | infinity);
    if (size == 0) return (unsigned short)sign;
    int exponent;
    std::frexp(size, &exponent); // size < 2^exponent
    const int place = std::max(exponent - f.digits, f.last_place);
    // Ties to even: the mode that a process starts with.
    const unsigned whole = (unsigned)std::rint(std::ldexp(size, -place));
    // The hidden one and a carry out of the mantissa both add to the exponent.
    const unsigned bits = (unsigned)(place - f.last_place) * (1u << mantissa_bits) + whole;
    return (unsigned short)(sign | std::min(bits, infinity));
}

double decode(unsigned short bits, Format f) {
    const int mantissa_bits = f.digits - 1, top = (1 << f.exponent_bits) - 1;
    const int exponent = bits >> mantissa_bits & top, mantissa = bits & ((1 << mantissa_bits) - 1);
    double size;
    if (exponent == top) {
        size = mantissa == 0 ? INFINITY : NAN;
    } else if (exponent == 0) {
        size = std::ldexp(mantissa, f.last_place);
    } else {
        size = std::ldexp(mantissa + (1 << mantissa_bits), f.last_place + exponent - 1);
    }
    return bits & 0x8000 ? -size : size;
}

// a·b is exact. Their sum with c is rounded to odd, so that rounding it again is as good as rounding once.
unsigned short fma16(unsigned short a, unsigned short b, unsigned short c, Format f) {
    const double product = decode(a, f) * decode(b, f), addend = decode(c, f);
    double sum = product + addend;
    if (std::isfinite(sum)) {
        // What the sum has lost (Knuth's TwoSum).
        const double from_product = sum - addend, from_addend = sum - from_product;
        const double lost = (product - from_product) + (addend - from_addend);
        uint64_t bits;
        memcpy(&bits, &sum, sizeof(bits));
        if (lost != 0 && (bits & 1) == 0) sum = std::nextafter(sum, lost > 0 ? INFINITY : -INFINITY);
    }
    return encode(sum, f);
}

// Products are exact, and so nearly is their sum; a device's sum of fp32 is less exact and of no specified order.
void mma(void* const* lanes, Format f) {
    double a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const Mma& own = *static_cast<const Mma*>(lanes[lane]);
        for (int e = 0; e < 8; ++e) { // of A: register e / 2, half e % 2
            const int row = lane / 4 + e / 2 % 2 * 8, column = lane % 4 * 2 + e % 2 + e / 4 * 8;
            a[row][column] = decode((unsigned short)(own.a[e / 2] >> e % 2 * 16), f);
        }
        for (int e = 0; e < 4; ++e) {
            const int row = lane % 4 * 2 + e % 2 + e / 2 * 8;
            b[row][lane / 4] = decode((unsigned short)(own.b[e / 2] >> e % 2 * 16), f);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        float* d = static_cast<const Mma*>(lanes[lane])->d;
        for (int c = 0; c < 4; ++c) {
            const int row = lane / 4 + c / 2 * 8, column = lane % 4 * 2 + c % 2;
            double sum = d[c];
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            d[c] = (float)sum;
        }
    }
}

} // namespace

unsigned short to_f16(double value) { return encode(value, F16); }
unsigned short to_bf16(double value) { return encode(value, BF16); }
float from_f16(unsigned short bits) { return (float)decode(bits, F16); }
float from_bf16(unsigned short bits) { return (float)decode(bits, BF16); }
unsigned short fma_f16(unsigned short a, unsigned short b, unsigned short c) { return fma16(a, b, c, F16); }
unsigned short fma_bf16(unsigned short a, unsigned short b, unsigned short c) { return fma16(a, b, c, BF16); }

void mma_f16(void* const* lanes) { mma(lanes, F16); }
void mma_bf16(void* const* lanes) { mma(lanes, BF16); }

// Lanes 8i..8i+7 name the rows of matrix i; lane l gets word l % 4 of row l / 4 of each.
void load_matrices(void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
        LoadMatrices& own = *static_cast<LoadMatrices*>(lanes[lane]);
        for (int i = 0; i < 4; ++i) {
            own.words[i] = static_cast<const LoadMatrices*>(lanes[i * 8 + lane / 4])->row[lane % 4];
        }
    }
}

} // namespace cuda_host
