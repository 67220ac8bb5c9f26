// GPTQ on the GPU: one panel of columns for all rows of a stack of weights, and the small kernels around it.
//
// The method is `solver/mod.rs`'s: Babai's nearest plane (arXiv 2507.18553). With H + λI = Ũ Ũᵀ and D = Ŵ − W,
// q_i = round( w_i − (1/Ũ_ii) Σ_{j<i} Ũ_ji d_j ); at a group's start its scale is fitted to w_g − (Ũ_ggᵀ)⁻¹ r_g.
// "Column" is a position in quantization order, "lane" an output feature. K columns in all, P in the panel, N lanes,
// G groups. Sums in fp32 by fused multiply-add in a fixed order: two runs give the same bytes. What decides a
// code or a scale is written with rounded intrinsics, which are never fused; compile without --use_fast_math or --ftz.
//
// One thread block has 32 lanes and all P columns. It walks in steps of up to 32 columns, which never cross a group:
//   1. warp 0, a thread a lane, solves the step's columns one after another, their sums in registers;
//      meanwhile the other warps copy what comes next (cp.async): this step's rows of Ũ, the next step's corner of Ũ
//      and weights;
//   2. all warps add the step's effect to the columns behind it, a warp 32 columns at a time, 8x4 sums a thread, and
//      write what warp 0 found.
// A group whose scales are fitted is walked twice: once for the compensated weights, once for the codes. Where scales are
// searched for, all warps compare candidates between the two walks: first by the diagonal, a thread some candidates of a
// lane; then by the block, a warp a finalist.
// (Walking a block and then updating what follows is the lazy batch update of the GPTQ paper, arXiv 2210.17323.)
//
// Compiled by NVRTC 13.0, --std=c++17, no include folder; docs/kernels.md has the registers that each kernel takes (the panel
// kernels may take 128); none spills.
// Shared memory of the panel kernels is dynamic: `4·(64·P32 + extra + 5376 + 3·(P32 + 32))` bytes, P32 = P rounded up to 32
// and `extra` floats: gptq_solve_given 6144; gptq_compensate 0; gptq_solve_fitted 0 for groups of g ≤ 32, else 32 times
// the columns of the steps that a group touches, min(P32, g if 32 divides it, else g + 31 rounded up to 32).
// gptq_solve_searched takes more: `layout`, and panels.rs.
// P = 256: 88.4 KiB for groups of 32, 96.4 for 64, 104.4 for 128, 120.2 for 256, 112.4 given: two blocks a multiprocessor
// on Hopper but for groups of 256. Blocks may have 227 KiB on sm_90, 163 on sm_80, 99 on sm_86 and sm_89, where panels are
// narrower (solver/cuda/panels.rs, which plans the launches).
// They are launched on ceil(N / 32) blocks of 32·GPTQ_WARPS threads. Addresses and strides that are multiples of 16
// bytes are copied 16 bytes at a time; others are allowed. A group wider than a panel is compensated panel by panel, then
// solved with its scales given; its last panel ends where it ends.

#define LANES 32
#define STEP 32
#ifndef GPTQ_WARPS
#define GPTQ_WARPS 8
#endif
#define THREADS (32 * GPTQ_WARPS)
// Columns solved without a branch between them; a step that is no multiple of this solves a few for nothing.
#define RUN 8

static_assert(GPTQ_WARPS >= 2 && GPTQ_WARPS <= 16, "warp 0 solves, the others copy");
static_assert(STEP % RUN == 0 && RUN % 4 == 0 && LANES == 32, "warp 0 has a thread a lane, four codes a word");

// ---- fp16, without a header, so that no include folder is needed ----

struct Half {
    unsigned short bits;
};
#define INFINITE 0x7c00

// ---- instructions ----
// A host build, by which the tests run these kernels without a GPU, has its own (tests/cuda_host).

#ifdef CUDA_HOST
#include "gptq_block_instructions.h"
#else
// Rounded once, to the nearest, ties to even.
__device__ __forceinline__ Half nearest_half(double value) {
    Half half;
    asm("cvt.rn.f16.f64 %0, %1;" : "=h"(half.bits) : "d"(value));
    return half;
}

__device__ __forceinline__ float widen(Half value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return (unsigned)__cvta_generic_to_shared(pointer);
}

// Copies the first `bytes` of 16 (or 4), fills the rest with zeros.
__device__ __forceinline__ void copy_16(float* to, const float* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void copy_4(float* to, const float* from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#endif

// Arguments of the panel kernels; `#[repr(C)]` on the host. Rows of [P, N] arrays are N apart.
struct PanelArguments {
    const float* factor;       // Ũ_pp: Ũ[j, c] at factor[j * factor_stride + c]; below the diagonal is never used
    const float* weights;      // [P, N]
    const float* residuals;    // [P, N], Σ over all columns before the panel of Ũ_jc d_j; null: zeros
    float* differences;        // [P, N] out: d; may be `weights`. gptq_compensate: x, may not be `weights`
    unsigned char* codes;      // [K, N] out
    Half* scales;              // [G, N] out, or in for gptq_solve_given
    unsigned char* zeros;      // [G, N] likewise
    const int* groups;         // [P] group of each column
    const int* rows;           // [P] row of `codes` of each column: its original feature
    double* objective;         // [N] adds Σ ((ŵ − t) Ũ_ii)²
    double* distance;          // [N] adds Σ d²
    float* minima;             // [N] gptq_compensate only: smallest and
    float* maxima;             // [N] largest compensated weight of the group so far
    const double* factors;     // [candidates] gptq_solve_searched only, as what comes last here: each candidate's part of the
                               // scale of the range; a negative one turns a symmetric grid around
    long long factor_stride;
    int n;
    int columns;               // P
    int group_size;            // gptq_solve_fitted, gptq_solve_searched: a group starts at each multiple of it
    int bits;                  // 2, 3, 4, 8
    int symmetric;             // 0 or 1
    int flags;                 // gptq_compensate: FIRST | LAST
    int candidates;
    int finalists;             // the best candidates by the diagonal, 1 to candidates, which are compared by the block; 1: no block
    int at_once;               // finalists compared at the same time, 1 to GPTQ_WARPS
    int unused;
};
static_assert(sizeof(PanelArguments) == 160, "14 pointers, a stride, 10 integers");

#define FIRST 1 // the panel begins the group: minima and maxima are set, not read
#define LAST 2  // the panel ends the group: its scale is fitted

enum Mode { FITTED, SEARCHED, GIVEN, COMPENSATE };

// Scales are found at the beginning of groups, and the panel has whole groups.
__device__ constexpr bool finds_scales(Mode mode) { return mode == FITTED || mode == SEARCHED; }

// ---- the grid: grid.rs in f64, operation for operation ----

__device__ __forceinline__ Half to_scale(double scale) {
    if (scale == 0.0) return nearest_half(2.0 / 15.0); // a group of zeros gets any scale
    const Half rounded = nearest_half(scale);
    // Not zero: the smallest subnormal instead. Too large: infinite, for the host to refuse.
    return rounded.bits == 0 ? Half{1} : rounded;
}

__device__ __forceinline__ void fit(double min, double max, int bits, bool symmetric, Half* scale, int* zero) {
    const double levels = (double)((1 << bits) - 1);
    if (symmetric) {
        *scale = to_scale(__ddiv_rn(__dmul_rn(2.0, fmax(fabs(min), fabs(max))), levels));
        *zero = 1 << (bits - 1);
        return;
    }
    min = fmin(min, 0.0);
    max = fmax(max, 0.0);
    Half rounded = to_scale(__ddiv_rn(__dsub_rn(max, min), levels));
    double offset = rint(__ddiv_rn(-min, (double)widen(rounded)));
    if (offset < 1.0 && rounded.bits != INFINITE) {
        rounded = to_scale(__ddiv_rn(max, levels - 1.0)); // all levels but one lie above zero
        offset = 1.0;
    }
    *scale = rounded;
    *zero = (int)fmin(fmax(offset, 1.0), levels);
}

// A candidate: the grid of `factor` times the range.
__device__ __forceinline__ void fit_scaled(float low, float high, double factor, int bits, bool symmetric, Half* scale,
                                           int* zero) {
    const double size = fabs(factor);
    fit(__dmul_rn((double)low, size), __dmul_rn((double)high, size), bits, symmetric, scale, zero);
    if (factor < 0.0) scale->bits ^= 0x8000;
}

// Added and taken away again, it rounds what is below 2²² to whole numbers, ties to even.
#define WHOLE 12582912.0f

// Codes less zero: clamp(round(x) + zero, 0, max) − zero. The limits are whole, so that clamping may come first.
__device__ __forceinline__ float nearest_offset(float weight, float inverse, float zero, float max_code) {
    const float offset = fminf(fmaxf(__fmul_rn(weight, inverse), -zero), max_code - zero);
    return __fsub_rn(__fadd_rn(offset, WHOLE), WHOLE);
}

// ---- tiles ----

__device__ __forceinline__ bool aligned_16(const void* pointer, long long stride) {
    return (((unsigned long long)pointer | (unsigned long long)stride * 4) & 15) == 0;
}

// Copies `rows` rows of `width` floats (a multiple of 4), of which those from `valid` on are zeros. Warp `warp` of
// `warps`.
__device__ __forceinline__ void copy_tile(float* to, int to_stride, const float* from, long long from_stride, int rows,
                                          int width, int valid, int warp, int warps, int lane) {
    const bool wide = aligned_16(from, from_stride);
    for (int row = warp; row < rows; row += warps) {
        float* to_row = to + row * to_stride;
        const float* from_row = from + row * from_stride;
        if (wide) {
            for (int c = 4 * lane; c < width; c += 128) {
                const int left = min(max(valid - c, 0), 4);
                copy_16(to_row + c, left ? from_row + c : from, 4 * left);
            }
        } else {
            for (int c = lane; c < width; c += 32) {
                copy_4(to_row + c, c < valid ? from_row + c : from, c < valid ? 4 : 0);
            }
        }
    }
}

// ---- shared memory ----

struct Shared {
    float* residuals;  // [P32, LANES]
    float* extra;      // fitted, searched: [group's columns, LANES] r less the effect of x. given: [2][3][STEP, LANES]
                       // searched, while scales are compared: costs [candidates, LANES], then codes of the finalists
    float* factor;     // [STEP, P32]: the step's rows, columns where they are in the panel
    float* corner;     // [2][STEP, STEP]: the step's rows, columns from its start on
    float* weights;    // [2][STEP, LANES]
    float* changes;    // [STEP, LANES]: d, or −x
    float* pivots;     // [P32 + STEP] Ũ_cc
    float* inverses;   // [P32 + STEP] 1 / Ũ_cc
    int* rows;         // [P32 + STEP]
    unsigned char* codes; // [STEP, LANES]
    // Searched:
    float* compensated; // [group's columns, rounded up to 32, LANES]
    float* range;       // [2, LANES] smallest and largest of them
    float* costs;       // [finalists, LANES] of the finalists, by the block
    int* finalists;     // [finalists, LANES] candidates
    int* walk;          // [4] the walk while scales are compared, so that it is not in registers
};

__device__ __forceinline__ int round_up(int value) { return (value + STEP - 1) / STEP * STEP; }
__device__ __forceinline__ int round_down(int value) { return value / STEP * STEP; }

template <Mode MODE>
__device__ __forceinline__ Shared layout(float* memory, const PanelArguments& a) {
    const int padded = round_up(a.columns), rows = round_up(min(a.group_size, a.columns));
    int extra = 0;
    if (MODE == GIVEN) extra = 6 * STEP * LANES;
    if (finds_scales(MODE) && a.group_size > STEP) {
        extra = LANES * min(padded, a.group_size % STEP == 0 ? a.group_size : round_up(a.group_size + STEP - 1));
    }
    if (MODE == SEARCHED) extra = max(extra, max(LANES * a.candidates, LANES / 4 * a.at_once * rows));
    Shared s;
    s.residuals = memory;
    s.extra = s.residuals + padded * LANES;
    s.factor = s.extra + extra;
    s.corner = s.factor + STEP * padded;
    s.weights = s.corner + 2 * STEP * STEP;
    s.changes = s.weights + 2 * STEP * LANES;
    s.pivots = s.changes + STEP * LANES;
    s.inverses = s.pivots + padded + STEP;
    s.rows = (int*)(s.inverses + padded + STEP);
    s.codes = (unsigned char*)(s.rows + padded + STEP);
    s.compensated = (float*)(s.codes + STEP * LANES);
    s.range = s.compensated + rows * LANES;
    s.costs = s.range + 2 * LANES;
    s.finalists = (int*)(s.costs + a.finalists * LANES);
    s.walk = s.finalists + a.finalists * LANES;
    return s;
}

// ---- the walk ----

// Columns start..end of the group from..to, walked to fit its scale or to choose codes.
struct Walk {
    int from, to, start, end;
    bool fits;
};

template <Mode MODE>
__device__ __forceinline__ Walk first_step(int columns, int group_size) {
    const int to = finds_scales(MODE) ? min(group_size, columns) : columns;
    return {0, to, 0, min(STEP, to), MODE != GIVEN};
}

// The step after `w`; its start is P when there is none.
template <Mode MODE>
__device__ __forceinline__ Walk next_step(Walk w, int columns, int group_size) {
    if (w.end < w.to) {
        w.start = w.end;
    } else if (finds_scales(MODE) && w.fits) {
        w.fits = false;
        w.start = w.from;
    } else {
        w.from = w.start = w.to;
        w.to = finds_scales(MODE) ? min(w.from + group_size, columns) : columns;
        w.fits = MODE != GIVEN;
    }
    w.end = min(w.start + STEP, w.to);
    return w;
}

// What a lane of warp 0 carries.
struct LaneState {
    float min, max;             // of the group's compensated weights so far
    float scale, inverse, zero; // of the group
    double objective, distance;
};

// Adds the effect of column i, whose change is in sum[i], to the step's columns behind it.
__device__ __forceinline__ void spread(const float* corner, int i, float (&sum)[STEP]) {
#pragma unroll
    for (int c = 0; c < STEP; c += 4) {
        if (c + 3 > i) {
            const float4 u = *(const float4*)(corner + i * STEP + c);
            if (c > i) sum[c] = __fmaf_rn(u.x, sum[i], sum[c]);
            if (c + 1 > i) sum[c + 1] = __fmaf_rn(u.y, sum[i], sum[c + 1]);
            if (c + 2 > i) sum[c + 2] = __fmaf_rn(u.z, sum[i], sum[c + 2]);
            sum[c + 3] = __fmaf_rn(u.w, sum[i], sum[c + 3]);
        }
    }
}

// x of the step's columns: forward substitution with Ũ_ggᵀ. `sums` [.., LANES] has r less what earlier steps left.
__device__ __forceinline__ void compensate_step(const float* sums, const float* corner, const float* weights,
                                                const float* inverses, float* changes, int length, int lane,
                                                LaneState& state) {
    float sum[STEP];
#pragma unroll
    for (int i = 0; i < STEP; ++i) sum[i] = i < length ? sums[i * LANES + lane] : 0.0f;
#pragma unroll
    for (int run = 0; run < STEP; run += RUN) {
        if (run < length) {
#pragma unroll
            for (int i = run; i < run + RUN; ++i) {
                const float x = __fmul_rn(sum[i], inverses[i]);
                const float weight = __fsub_rn(weights[i * LANES + lane], x);
                state.min = i < length ? fminf(state.min, weight) : state.min;
                state.max = i < length ? fmaxf(state.max, weight) : state.max;
                sum[i] = -x;
                spread(corner, i, sum);
            }
            // Stored together: loads for the next column wait neither behind a store of this one nor behind a branch.
#pragma unroll
            for (int i = run; i < run + RUN; ++i) {
                changes[i * LANES + lane] = sum[i];
            }
        }
    }
}

// Codes of the step's columns, whose sums are in `sum`. A trial keeps its codes only: `changes` is null.
template <Mode MODE, bool TRIAL>
__device__ __forceinline__ void quantize_columns(float (&sum)[STEP], const float* corner, const float* weights,
                                                 const float* pivots, const float* inverses, const float* given,
                                                 float* changes, unsigned char* codes, int length, int max_code, int lane,
                                                 float scale, float inverse, float zero, float& objective,
                                                 float& distance) {
#pragma unroll
    for (int run = 0; run < STEP; run += RUN) {
        if (run < length) {
            unsigned four_codes[RUN / 4] = {};
#pragma unroll
            for (int i = run; i < run + RUN; ++i) {
                if (MODE == GIVEN) {
                    scale = given[i * LANES + lane];
                    inverse = given[(STEP + i) * LANES + lane];
                    zero = given[(2 * STEP + i) * LANES + lane];
                }
                const float weight = weights[i * LANES + lane];
                const float target = __fsub_rn(weight, __fmul_rn(sum[i], inverses[i]));
                const float offset = nearest_offset(target, inverse, zero, (float)max_code);
                const float quantized = __fmul_rn(offset, scale);
                const float change = __fsub_rn(quantized, weight);
                const float error = __fmul_rn(__fsub_rn(quantized, target), pivots[i]);
                objective = i < length ? __fmaf_rn(error, error, objective) : objective;
                if (!TRIAL) distance = i < length ? __fmaf_rn(change, change, distance) : distance;
                // A whole number from 0 to 255 plus 2²³ has itself as its lowest bits.
                const unsigned code = (unsigned)__float_as_int(__fadd_rn(__fadd_rn(offset, zero), 8388608.0f)) & 255;
                four_codes[(i - run) / 4] |= code << ((i - run) % 4 * 8);
                sum[i] = change;
                spread(corner, i, sum);
            }
#pragma unroll
            for (int i = run; i < run + RUN; ++i) {
                if (!TRIAL) changes[i * LANES + lane] = sum[i];
                codes[i * LANES + lane] = (unsigned char)(four_codes[(i - run) / 4] >> ((i - run) % 4 * 8));
            }
        }
    }
}

template <Mode MODE>
__device__ __forceinline__ void quantize_step(const float* sums, const float* corner, const float* weights,
                                              const float* pivots, const float* inverses, const float* given,
                                              float* changes, unsigned char* codes, int length, int max_code, int lane,
                                              LaneState& state) {
    float sum[STEP];
#pragma unroll
    for (int i = 0; i < STEP; ++i) sum[i] = i < length ? sums[i * LANES + lane] : 0.0f;
    float objective = 0.0f, distance = 0.0f;
    quantize_columns<MODE, false>(sum, corner, weights, pivots, inverses, given, changes, codes, length, max_code, lane,
                                  state.scale, state.inverse, state.zero, objective, distance);
    state.objective += (double)objective;
    state.distance += (double)distance;
}

// to[c] = from[c] + Σ_j Ũ_jc change_j for columns begin..end, in whole runs of 32. Columns already solved that share
// such a run with others are changed too; nobody reads them again.
__device__ __forceinline__ void push(const float* factor, int padded, const float* changes, const float* from,
                                     float* to, int length, int begin, int end, int warp, int lane) {
    const int lanes = (lane & 7) * 4, own = (lane >> 3) * 4;
    for (int first = begin + warp * STEP; first < end; first += GPTQ_WARPS * STEP) {
        float sums[8][4];
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            const int column = first + own + (c & 3) + (c >> 2) * 16;
            const float4 r = *(const float4*)(from + column * LANES + lanes);
            sums[c][0] = r.x, sums[c][1] = r.y, sums[c][2] = r.z, sums[c][3] = r.w;
        }
#pragma unroll 4
        for (int j = 0; j < length; ++j) {
            const float4 d = *(const float4*)(changes + j * LANES + lanes);
            const float4 low = *(const float4*)(factor + j * padded + first + own);
            const float4 high = *(const float4*)(factor + j * padded + first + 16 + own);
            const float u[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                sums[c][0] = __fmaf_rn(u[c], d.x, sums[c][0]);
                sums[c][1] = __fmaf_rn(u[c], d.y, sums[c][1]);
                sums[c][2] = __fmaf_rn(u[c], d.z, sums[c][2]);
                sums[c][3] = __fmaf_rn(u[c], d.w, sums[c][3]);
            }
        }
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            const int column = first + own + (c & 3) + (c >> 2) * 16;
            *(float4*)(to + column * LANES + lanes) = make_float4(sums[c][0], sums[c][1], sums[c][2], sums[c][3]);
        }
    }
}

// Writes what warp 0 found for a step's columns. The warps that push least are first.
template <Mode MODE>
__device__ __forceinline__ void write_step(const PanelArguments& a, const Shared& s, int start, int length, int n,
                                           int part, int lane) {
    for (int i = part; i < length; i += GPTQ_WARPS) {
        const float change = s.changes[i * LANES + lane];
        a.differences[(long long)(start + i) * a.n + n] = MODE == COMPENSATE ? -change : change;
        if (MODE != COMPENSATE) a.codes[(long long)s.rows[start + i] * a.n + n] = s.codes[i * LANES + lane];
    }
}

// Scales, their inverses and zeros of a step's columns, for gptq_solve_given. Lanes beyond N get 1, 1, 0.
__device__ __forceinline__ void stage_given(const PanelArguments& a, const Walk& w, float* to, int n0, int warp,
                                            int warps, int lane) {
    const bool mine = n0 + lane < a.n;
    for (int i = warp; i < w.end - w.start; i += warps) {
        const long long at = (long long)a.groups[w.start + i] * a.n + n0 + lane;
        const float scale = mine ? widen(a.scales[at]) : 1.0f;
        to[i * LANES + lane] = scale;
        to[(STEP + i) * LANES + lane] = __frcp_rn(scale);
        to[(2 * STEP + i) * LANES + lane] = mine ? (float)a.zeros[at] : 0.0f;
    }
}

// A step's corner of Ũ and its weights.
__device__ __forceinline__ void copy_step(const PanelArguments& a, const Walk& w, float* corner, float* weights,
                                          int n0, int warp, int warps, int lane) {
    copy_tile(corner, STEP, a.factor + w.start * a.factor_stride + w.start, a.factor_stride, w.end - w.start, STEP,
              a.columns - w.start, warp, warps, lane);
    copy_tile(weights, LANES, a.weights + (long long)w.start * a.n + n0, a.n, w.end - w.start, LANES, a.n - n0, warp,
              warps, lane);
}

// Sets the group's scale; warp 0, a thread a lane.
__device__ __forceinline__ void set_lane(const PanelArguments& a, int group, int n, bool mine, Half scale, int zero,
                                         LaneState& state) {
    state.scale = widen(scale);
    state.inverse = __frcp_rn(state.scale);
    state.zero = (float)zero;
    if (mine) {
        a.scales[(long long)group * a.n + n] = scale;
        a.zeros[(long long)group * a.n + n] = (unsigned char)zero;
    }
}

__device__ __forceinline__ void fit_lane(const PanelArguments& a, int group, int n, bool mine, LaneState& state) {
    Half scale;
    int zero;
    fit((double)state.min, (double)state.max, a.bits, a.symmetric != 0, &scale, &zero);
    set_lane(a, group, n, mine, scale, zero, state);
}

// ---- the search for a group's scale: all warps, a thread a lane and some candidates; the definition is
// solver/tests/reference.rs ----

// Candidates of a thread at the same time.
#define CANDIDATES 4

// What a thread holds of a candidate.
struct Candidate {
    float scale, inverse, zero;
};

__device__ __forceinline__ Candidate candidate_of(const PanelArguments& a, float low, float high, int index) {
    Half scale;
    int zero;
    fit_scaled(low, high, a.factors[index], a.bits, a.symmetric != 0, &scale, &zero);
    const float wide = widen(scale);
    return {wide, __frcp_rn(wide), (float)zero};
}

// Adds Ũ_ii² (q − w)² of a weight. A scale beyond fp16 makes it NaN.
__device__ __forceinline__ float add_cost(float cost, const Candidate& candidate, float weight, float pivot,
                                          float max_code) {
    const float offset = nearest_offset(weight, candidate.inverse, candidate.zero, max_code);
    const float error = __fmul_rn(__fsub_rn(__fmul_rn(offset, candidate.scale), weight), pivot);
    return __fmaf_rn(error, error, cost);
}

// Costs [candidates, LANES] of all candidates by the diagonal; NaN becomes infinite.
__device__ __forceinline__ void judge_by_diagonal(const PanelArguments& a, const Shared& s, int from, int length, int warp,
                                                  int lane) {
    const float low = s.range[lane], high = s.range[LANES + lane], max_code = (float)((1 << a.bits) - 1);
    const float infinity = __int_as_float(0x7f800000);
    for (int first = warp * CANDIDATES; first < a.candidates; first += GPTQ_WARPS * CANDIDATES) {
        Candidate candidates[CANDIDATES];
        float costs[CANDIDATES] = {};
#pragma unroll
        for (int c = 0; c < CANDIDATES; ++c) candidates[c] = candidate_of(a, low, high, min(first + c, a.candidates - 1));
        for (int i = 0; i < length; ++i) {
            const float weight = s.compensated[i * LANES + lane], pivot = s.pivots[from + i];
#pragma unroll
            for (int c = 0; c < CANDIDATES; ++c) costs[c] = add_cost(costs[c], candidates[c], weight, pivot, max_code);
        }
#pragma unroll
        for (int c = 0; c < CANDIDATES; ++c) {
            if (first + c < a.candidates) s.extra[(first + c) * LANES + lane] = fminf(costs[c], infinity);
        }
    }
}

// The candidates with the least costs, in ascending order; of equal ones the first is first.
__device__ __forceinline__ void choose_finalists(const PanelArguments& a, const Shared& s, int warp, int lane) {
    for (int first = warp * CANDIDATES; first < a.candidates; first += GPTQ_WARPS * CANDIDATES) {
        float own[CANDIDATES];
        int rank[CANDIDATES] = {};
#pragma unroll
        for (int c = 0; c < CANDIDATES; ++c) own[c] = s.extra[min(first + c, a.candidates - 1) * LANES + lane];
        for (int other = 0; other < a.candidates; ++other) {
            const float cost = s.extra[other * LANES + lane];
#pragma unroll
            for (int c = 0; c < CANDIDATES; ++c) rank[c] += cost < own[c] || (cost == own[c] && other < first + c);
        }
#pragma unroll
        for (int c = 0; c < CANDIDATES; ++c) {
            if (first + c < a.candidates && rank[c] < a.finalists) s.finalists[rank[c] * LANES + lane] = first + c;
        }
    }
}

// The column loop in the group alone, for the columns start..start + length of it: codes of a finalist, and what they
// cost. `tile` [start + length, STEP] has Ũ_gg above and in these columns' corner.
__device__ __forceinline__ void try_step(const Shared& s, const float* tile, const float* pivots, const float* inverses,
                                         unsigned char* codes, const Candidate& candidate, int start, int length,
                                         int max_code, int lane, float& cost) {
    float sum[STEP] = {};
#pragma unroll 1
    for (int j = 0; j < start; ++j) {
        const float quantized = __fmul_rn(__fsub_rn((float)codes[j * LANES + lane], candidate.zero), candidate.scale);
        const float change = __fsub_rn(quantized, s.compensated[j * LANES + lane]);
        const float* row = tile + j * STEP;
#pragma unroll
        for (int c = 0; c < STEP; c += 4) {
            const float4 u = *(const float4*)(row + c);
            sum[c] = __fmaf_rn(u.x, change, sum[c]);
            sum[c + 1] = __fmaf_rn(u.y, change, sum[c + 1]);
            sum[c + 2] = __fmaf_rn(u.z, change, sum[c + 2]);
            sum[c + 3] = __fmaf_rn(u.w, change, sum[c + 3]);
        }
    }
    float distance = 0.0f;
    quantize_columns<SEARCHED, true>(sum, tile + start * STEP, s.compensated + start * LANES, pivots + start,
                                     inverses + start, nullptr, nullptr, codes + start * LANES, length, max_code, lane,
                                     candidate.scale, candidate.inverse, candidate.zero, cost, distance);
}

// Costs [finalists, LANES] by the block, ‖(q − w) Ũ_gg‖² with the codes that the column loop chooses: a warp a finalist.
__device__ __forceinline__ void judge_by_block(const PanelArguments& a, const Shared& s, int from, int length, int warp,
                                               int lane) {
    const float low = s.range[lane], high = s.range[LANES + lane], infinity = __int_as_float(0x7f800000);
    const int rows = round_up(min(a.group_size, a.columns));
    unsigned char* codes = (unsigned char*)s.extra + warp * rows * LANES;
    for (int round = 0; round < a.finalists; round += a.at_once) {
        const int finalist = round + warp;
        const bool tries = warp < a.at_once && finalist < a.finalists;
        const Candidate candidate =
            tries ? candidate_of(a, low, high, s.finalists[finalist * LANES + lane]) : Candidate{1.0f, 1.0f, 0.0f};
        float cost = 0.0f;
        for (int start = 0; start < length; start += STEP) {
            const int count = min(STEP, length - start);
            const float* corner = a.factor + from * a.factor_stride + from + start;
            copy_tile(s.factor, STEP, corner, a.factor_stride, start + count, STEP, a.columns - from - start, warp,
                      GPTQ_WARPS, lane);
            commit();
            wait<0>();
            __syncthreads();
            if (tries) {
                try_step(s, s.factor, s.pivots + from, s.inverses + from, codes, candidate, start, count,
                         (1 << a.bits) - 1, lane, cost);
            }
            __syncthreads();
        }
        if (tries) s.costs[finalist * LANES + lane] = fminf(cost, infinity);
    }
}

// Adds a lane's sums to those of its output feature, and begins new ones.
__device__ __forceinline__ void add_sums(const PanelArguments& a, int n, bool mine, LaneState& state) {
    if (mine) {
        a.objective[n] += state.objective;
        a.distance[n] += state.distance;
    }
    state.objective = state.distance = 0.0;
}

// Finds the scale of the group from..to, whose compensated weights and range are in shared memory. Nothing of `state` is
// kept in registers meanwhile.
__device__ __forceinline__ void search(const PanelArguments& a, const Shared& s, int from, int to, int n, bool mine,
                                       int warp, int lane, LaneState& state) {
    if (warp == 0) add_sums(a, n, mine, state);
    judge_by_diagonal(a, s, from, to - from, warp, lane);
    __syncthreads();
    choose_finalists(a, s, warp, lane);
    __syncthreads();
    if (a.finalists > 1) {
        judge_by_block(a, s, from, to - from, warp, lane);
        __syncthreads();
    }
    if (warp == 0) {
        int best = 0;
        for (int i = 1; i < a.finalists; ++i) best = s.costs[i * LANES + lane] < s.costs[best * LANES + lane] ? i : best;
        Half scale;
        int zero;
        const double factor = a.factors[s.finalists[best * LANES + lane]];
        fit_scaled(s.range[lane], s.range[LANES + lane], factor, a.bits, a.symmetric != 0, &scale, &zero);
        set_lane(a, a.groups[from], n, mine, scale, zero, state);
    }
}

template <Mode MODE>
__device__ __forceinline__ void solve_panel(const PanelArguments& a) {
    extern __shared__ __align__(16) float memory[];
    const Shared s = layout<MODE>(memory, a);
    const int padded = round_up(a.columns);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n0 = blockIdx.x * LANES, n = n0 + lane;
    const bool mine = n < a.n;
    const float infinity = __int_as_float(0x7f800000);

    Walk step = first_step<MODE>(a.columns, a.group_size);
    if (a.residuals != nullptr) {
        copy_tile(s.residuals, LANES, a.residuals + n0, a.n, a.columns, LANES, a.n - n0, warp, GPTQ_WARPS, lane);
    }
    for (int c = (a.residuals == nullptr ? 0 : a.columns) + warp; c < padded; c += GPTQ_WARPS) {
        s.residuals[c * LANES + lane] = 0.0f;
    }
    copy_step(a, step, s.corner, s.weights, n0, warp, GPTQ_WARPS, lane);
    commit();
    for (int c = threadIdx.x; c < padded + STEP; c += THREADS) {
        const float pivot = c < a.columns ? a.factor[c * a.factor_stride + c] : 1.0f;
        s.pivots[c] = pivot;
        s.inverses[c] = __frcp_rn(pivot);
        s.rows[c] = MODE != COMPENSATE && c < a.columns ? a.rows[c] : 0;
    }
    if (MODE == GIVEN) stage_given(a, step, s.extra, n0, warp, GPTQ_WARPS, lane);
    wait<0>();
    __syncthreads();

    LaneState state = {infinity, -infinity, 1.0f, 1.0f, 0.0f, 0.0, 0.0};
    if (MODE == COMPENSATE && warp == 0 && mine && !(a.flags & FIRST)) {
        state.min = a.minima[n];
        state.max = a.maxima[n];
    }
    for (int buffer = 0; step.start < a.columns; buffer ^= 1) {
        const Walk next = next_step<MODE>(step, a.columns, a.group_size);
        const int length = step.end - step.start, base = round_down(step.from);
        // Where the sums are that this step reads and, behind it, changes.
        const bool own_sums = finds_scales(MODE) && step.fits;
        const float* sums = own_sums && step.start > step.from ? s.extra - base * LANES : s.residuals;
        const int limit = own_sums ? step.to : a.columns;
        const float* corner = s.corner + buffer * STEP * STEP;
        const float* weights = s.weights + buffer * STEP * LANES;
        if (warp == 0) {
            if (step.fits) {
                if (finds_scales(MODE) && step.start == step.from) {
                    state.min = infinity;
                    state.max = -infinity;
                }
                compensate_step(sums + step.start * LANES, corner, weights, s.inverses + step.start, s.changes, length,
                                lane, state);
                if (MODE == FITTED && step.end == step.to) fit_lane(a, a.groups[step.from], n, mine, state);
                if (MODE == SEARCHED && step.end == step.to) {
                    s.range[lane] = state.min;
                    s.range[LANES + lane] = state.max;
                }
            } else {
                quantize_step<MODE>(sums + step.start * LANES, corner, weights, s.pivots + step.start,
                                    s.inverses + step.start, s.extra + buffer * 3 * STEP * LANES, s.changes, s.codes,
                                    length, (1 << a.bits) - 1, lane, state);
            }
        } else {
            if (step.end < limit) {
                const int begin = round_down(step.end);
                copy_tile(s.factor + begin, padded, a.factor + step.start * a.factor_stride + begin, a.factor_stride,
                          length, round_up(limit) - begin, a.columns - begin, warp - 1, GPTQ_WARPS - 1, lane);
            }
            commit();
            if (next.start < a.columns) {
                const int other = buffer ^ 1;
                copy_step(a, next, s.corner + other * STEP * STEP, s.weights + other * STEP * LANES, n0, warp - 1,
                          GPTQ_WARPS - 1, lane);
                if (MODE == GIVEN) {
                    stage_given(a, next, s.extra + other * 3 * STEP * LANES, n0, warp - 1, GPTQ_WARPS - 1, lane);
                }
            }
            commit();
        }
        wait<1>();
        __syncthreads();
        if (MODE == SEARCHED && step.fits) {
            for (int i = warp; i < length; i += GPTQ_WARPS) {
                s.compensated[(step.start - step.from + i) * LANES + lane] =
                    __fadd_rn(weights[i * LANES + lane], s.changes[i * LANES + lane]);
            }
            if (step.end == step.to) {
                if (threadIdx.x == 0) *(int4*)s.walk = make_int4(step.from, step.to, step.start, buffer);
                __syncthreads();
                search(a, s, step.from, step.to, n, mine, warp, lane, state);
                const int4 walk = *(const int4*)s.walk;
                step = {walk.x, walk.y, walk.z, walk.y, true};
                buffer = walk.w;
            }
        }
        if (step.end < limit) {
            float* to = own_sums ? s.extra - base * LANES : s.residuals;
            push(s.factor, padded, s.changes, sums, to, length, round_down(step.end), limit, warp, lane);
        }
        if (mine && !own_sums) write_step<MODE>(a, s, step.start, length, n, GPTQ_WARPS - 1 - warp, lane);
        wait<0>();
        __syncthreads();
        step = next_step<MODE>(step, a.columns, a.group_size);
    }

    if (warp == 0 && mine) {
        if (MODE == COMPENSATE) {
            a.minima[n] = state.min;
            a.maxima[n] = state.max;
            if (a.flags & LAST) fit_lane(a, a.groups[0], n, true, state);
        } else {
            add_sums(a, n, true, state);
        }
    }
}

// Two blocks a multiprocessor: 128 registers a thread.
#define PANEL_KERNEL extern "C" __global__ void __launch_bounds__(THREADS, 16 / GPTQ_WARPS)

// Scales are fitted at each group's start; a group lies in the panel as a whole. Grid: ceil(N / 32).
PANEL_KERNEL gptq_solve_fitted(const __grid_constant__ PanelArguments a) { solve_panel<FITTED>(a); }

// The same, with scales searched for.
PANEL_KERNEL gptq_solve_searched(const __grid_constant__ PanelArguments a) { solve_panel<SEARCHED>(a); }

// Scales and zeros are given; groups in any order.
PANEL_KERNEL gptq_solve_given(const __grid_constant__ PanelArguments a) { solve_panel<GIVEN>(a); }

// A group wider than a panel, panel by panel: x = (Ũ_ggᵀ)⁻¹ r out, `minima` and `maxima` of w − x; with LAST its scale.
// Between panels the host takes Ũᵀ x from the residuals of the group's later columns.
PANEL_KERNEL gptq_compensate(const __grid_constant__ PanelArguments a) { solve_panel<COMPENSATE>(a); }

// ---- around the panels ----

// Smallest and largest weight of a group: features first + part, first + part + 8 ... of one output feature in each of 8
// threads; all of them get the range.
__device__ __forceinline__ void range_of_group(const float* weights, const int* positions, int first, int end, int n,
                                               int column, float* low, float* high) {
    __shared__ float lows[8][32], highs[8][32];
    const float infinity = __int_as_float(0x7f800000);
    *low = infinity, *high = -infinity;
    if (column < n) {
#pragma unroll 4
        for (int feature = first + threadIdx.y; feature < end; feature += 8) {
            const float weight = weights[(long long)positions[feature] * n + column];
            *low = fminf(*low, weight);
            *high = fmaxf(*high, weight);
        }
    }
    lows[threadIdx.y][threadIdx.x] = *low;
    highs[threadIdx.y][threadIdx.x] = *high;
    __syncthreads();
    for (int i = 0; i < 8; ++i) {
        *low = fminf(*low, lows[i][threadIdx.x]);
        *high = fmaxf(*high, highs[i][threadIdx.x]);
    }
}

// Scales from the original weights [K, N] in quantization order, for static groups and one group a row. `positions`
// [K]: where an original feature stands in quantization order; group g has features g·size ... Block 32x8, grid
// (ceil(N / 32), G).
extern "C" __global__ void __launch_bounds__(256)
gptq_fit_static(const float* weights, const int* positions, Half* scales, unsigned char* zeros, int n, int k,
                int group_size, int bits, int symmetric) {
    const int column = blockIdx.x * 32 + threadIdx.x, group = blockIdx.y;
    float low, high;
    range_of_group(weights, positions, group * group_size, min((group + 1) * group_size, k), n, column, &low, &high);
    if (threadIdx.y != 0 || column >= n) return;
    Half scale;
    int zero;
    fit((double)low, (double)high, bits, symmetric != 0, &scale, &zero);
    scales[(long long)group * n + column] = scale;
    zeros[(long long)group * n + column] = (unsigned char)zero;
}

// The same with the best of `candidates` by Σ Ũ_ii² (q_i − w_i)²; of equal ones the first. `factor` is Ũ [K, K]. Its
// candidates are `factors` [candidates], as in PanelArguments.
extern "C" __global__ void __launch_bounds__(256)
gptq_search_static(const float* weights, const int* positions, const float* factor, const double* factors, Half* scales,
                   unsigned char* zeros, int n, int k, int group_size, int bits, int symmetric, int candidates) {
    __shared__ float least[8][32];
    __shared__ int best[8][32];
    const int lane = threadIdx.x, part = threadIdx.y, column = blockIdx.x * 32 + lane, group = blockIdx.y;
    const int begin = group * group_size, end = min(begin + group_size, k);
    const float infinity = __int_as_float(0x7f800000), max_code = (float)((1 << bits) - 1);
    float low, high;
    range_of_group(weights, positions, begin, end, n, column, &low, &high);
    PanelArguments a = {};
    a.factors = factors;
    a.bits = bits;
    a.symmetric = symmetric;
    float own_least = infinity;
    int own_best = min(part * CANDIDATES, candidates - 1);
    if (column < n) {
        for (int first = part * CANDIDATES; first < candidates; first += 8 * CANDIDATES) {
            Candidate some[CANDIDATES];
            float costs[CANDIDATES] = {};
#pragma unroll
            for (int c = 0; c < CANDIDATES; ++c) some[c] = candidate_of(a, low, high, min(first + c, candidates - 1));
            for (int feature = begin; feature < end; ++feature) {
                const long long position = positions[feature];
                const float weight = weights[position * n + column], pivot = factor[position * k + position];
#pragma unroll
                for (int c = 0; c < CANDIDATES; ++c) costs[c] = add_cost(costs[c], some[c], weight, pivot, max_code);
            }
#pragma unroll
            for (int c = 0; c < CANDIDATES; ++c) {
                // NaN is not less.
                if (first + c < candidates && costs[c] < own_least) own_least = costs[c], own_best = first + c;
            }
        }
    }
    least[part][lane] = own_least;
    best[part][lane] = own_best;
    __syncthreads();
    if (part != 0 || column >= n) return;
    for (int i = 1; i < 8; ++i) {
        const float cost = least[i][lane];
        if (cost < own_least || (cost == own_least && best[i][lane] < own_best)) {
            own_least = cost, own_best = best[i][lane];
        }
    }
    Half scale;
    int zero;
    fit_scaled(low, high, factors[own_best], bits, symmetric != 0, &scale, &zero);
    scales[(long long)group * n + column] = scale;
    zeros[(long long)group * n + column] = (unsigned char)zero;
}

// Costs [G, N] of rounding a group's weights to nearest: Σ H_ii d_i². `members` [K]: positions of group g from g·size on.
// `diagonal` [K]: H_ii in quantization order. Block 32x8, grid (ceil(N / 32), G).
extern "C" __global__ void __launch_bounds__(256)
gptq_rounding_costs(const float* weights, const int* members, const float* diagonal, float* costs, int n, int k,
                    int group_size, int bits, int symmetric) {
    __shared__ float sums[8][32];
    const int lane = threadIdx.x, part = threadIdx.y, column = blockIdx.x * 32 + lane, group = blockIdx.y;
    const int begin = group * group_size, end = min(begin + group_size, k);
    float low, high, sum = 0.0f;
    range_of_group(weights, members, begin, end, n, column, &low, &high);
    Half half;
    int zero;
    fit((double)low, (double)high, bits, symmetric != 0, &half, &zero);
    const float scale = widen(half), inverse = __frcp_rn(scale);
    if (column < n) {
        for (int i = begin + part; i < end; i += 8) {
            const int position = members[i];
            const float weight = weights[(long long)position * n + column];
            const float offset = nearest_offset(weight, inverse, (float)zero, (float)((1 << bits) - 1));
            const float change = __fsub_rn(__fmul_rn(offset, scale), weight);
            sum = __fmaf_rn(__fmul_rn(change, change), diagonal[position], sum);
        }
    }
    sums[part][lane] = sum;
    __syncthreads();
    if (part != 0 || column >= n) return;
    for (int i = 1; i < 8; ++i) sum = __fadd_rn(sum, sums[i][lane]);
    costs[(long long)group * n + column] = sum;
}

// One period of the bit stream (pack/bits.rs) for four neighbouring output features.
template <int BITS, int CODES, int WORDS>
__device__ __forceinline__ void pack_period(const unsigned char* codes, long long stride, int* packed, int n) {
    unsigned words[WORDS][4] = {};
#pragma unroll
    for (int i = 0; i < CODES; ++i) {
        const uchar4 four = *(const uchar4*)(codes + i * stride);
        const unsigned code[4] = {four.x, four.y, four.z, four.w};
        constexpr int bits = BITS;
        const int word = i * bits / 32, shift = i * bits % 32;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            words[word][c] |= code[c] << shift;
            if (shift + bits > 32) words[word + 1 < WORDS ? word + 1 : word][c] |= code[c] >> (32 - shift);
        }
    }
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
        *(int4*)(packed + (long long)w * n) =
            make_int4((int)words[w][0], (int)words[w][1], (int)words[w][2], (int)words[w][3]);
    }
}

// Packs codes [K, n], rows `stride` apart, to words [K·bits/32, n]: a little-endian stream of bits along K. n and stride
// are multiples of 4, `codes` is aligned to 4 bytes, `packed` to 16. One thread a period and 4 features: block 256, grid
// (ceil(n / 1024), periods), K = periods · 16, 32, 8, 4 for 2, 3, 4, 8 bits.
extern "C" __global__ void __launch_bounds__(256)
gptq_pack(const unsigned char* codes, long long stride, int* packed, int n, int bits) {
    const int column = (blockIdx.x * 256 + threadIdx.x) * 4;
    if (column >= n) return;
    const long long period = blockIdx.y;
    codes += column;
    packed += column;
    if (bits == 2) pack_period<2, 16, 1>(codes + period * 16 * stride, stride, packed + period * n, n);
    if (bits == 3) pack_period<3, 32, 3>(codes + period * 32 * stride, stride, packed + period * 3 * n, n);
    if (bits == 4) pack_period<4, 8, 1>(codes + period * 8 * stride, stride, packed + period * n, n);
    if (bits == 8) pack_period<8, 4, 1>(codes + period * 4 * stride, stride, packed + period * n, n);
}

// `reordered` of the CPU solver: H + λI [K, K] with rows and columns in the order of `columns`, on and below the
// diagonal; zeros above. H is symmetric in full. A dead feature, whose diagonal is zero, gets `mean` there. `lower` is
// not `hessian`. Block 256, grid K: a block a row, whose source row stays in the first cache.
extern "C" __global__ void __launch_bounds__(256)
gptq_reorder_hessian(const float* __restrict__ hessian, const int* __restrict__ columns, float* __restrict__ lower,
                     int k, double mean, double lambda) {
    const int i = blockIdx.x;
    const float* from = hessian + (long long)columns[i] * k;
    float* to = lower + (long long)i * k;
    for (int j = threadIdx.x; j < k; j += 256) {
        float value = j <= i ? from[columns[j]] : 0.0f;
        if (j == i) value = __double2float_rn(__dadd_rn(value == 0.0f ? mean : (double)value, lambda));
        to[j] = value;
    }
}

__device__ __forceinline__ float widen(float value) { return value; }
struct Brain {
    unsigned short bits;
};
__device__ __forceinline__ float widen(Brain value) { return __int_as_float((int)((unsigned)value.bits << 16)); }

// A weight [rows, K] into rows `positions[k]` and columns first.. of the stack [K, N] fp32; dead features are zero.
// Reads and writes whole lines: act order moves rows of the stack, not parts of them. Block 32x8, grid
// (ceil(K / 64), ceil(rows / 32)).
template <typename T>
__device__ __forceinline__ void stack_weight(const T* weight, const int* positions, const unsigned char* dead,
                                             float* stack, int rows, int k, int n, int first) {
    __shared__ float tile[64][33];
    const int k0 = blockIdx.x * 64, row0 = blockIdx.y * 32;
    for (int row = threadIdx.y; row < 32; row += 8) {
        for (int part = 0; part < 64; part += 32) {
            const int feature = k0 + part + threadIdx.x;
            if (row0 + row < rows && feature < k) {
                tile[part + threadIdx.x][row] = widen(weight[(long long)(row0 + row) * k + feature]);
            }
        }
    }
    __syncthreads();
    const int row = row0 + threadIdx.x;
    for (int i = threadIdx.y; i < 64; i += 8) {
        const int feature = k0 + i;
        if (row < rows && feature < k) {
            const float value = dead[feature] ? 0.0f : tile[i][threadIdx.x];
            stack[(long long)positions[feature] * n + first + row] = value;
        }
    }
}

extern "C" __global__ void __launch_bounds__(256)
gptq_stack_f32(const float* weight, const int* positions, const unsigned char* dead, float* stack, int rows, int k,
               int n, int first) {
    stack_weight(weight, positions, dead, stack, rows, k, n, first);
}

extern "C" __global__ void __launch_bounds__(256)
gptq_stack_f16(const Half* weight, const int* positions, const unsigned char* dead, float* stack, int rows, int k,
               int n, int first) {
    stack_weight(weight, positions, dead, stack, rows, k, n, first);
}

extern "C" __global__ void __launch_bounds__(256)
gptq_stack_bf16(const unsigned short* weight, const int* positions, const unsigned char* dead, float* stack, int rows,
                int k, int n, int first) {
    stack_weight((const Brain*)weight, positions, dead, stack, rows, k, n, first);
}

__device__ __forceinline__ void narrow(float value, float* to) { *to = value; }
__device__ __forceinline__ void narrow(float value, Half* to) { *to = nearest_half((double)value); }
// To the nearest, ties to even; dense weights are numbers.
__device__ __forceinline__ void narrow(float value, Brain* to) {
    const unsigned bits = (unsigned)__float_as_int(value);
    to->bits = (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Dense weights [K, N] of codes [K, N] whose rows are `stride` apart, and of scales and zeros [G, N] whose rows are
// `step_stride` apart. `groups` [K]: the group of each row. Block 256, grid (ceil(N / 256), K).
template <typename T>
__device__ __forceinline__ void dequantize(const unsigned char* codes, long long stride, const Half* scales,
                                           const unsigned char* zeros, long long step_stride, const int* groups, T* dense,
                                           int n) {
    const int column = blockIdx.x * 256 + threadIdx.x;
    if (column >= n) return;
    const long long row = blockIdx.y, step = groups[row] * step_stride + column;
    const float offset = __fsub_rn((float)codes[row * stride + column], (float)zeros[step]);
    narrow(__fmul_rn(offset, widen(scales[step])), dense + row * n + column);
}

extern "C" __global__ void __launch_bounds__(256)
gptq_dequantize_f32(const unsigned char* codes, long long stride, const Half* scales, const unsigned char* zeros,
                    long long step_stride, const int* groups, float* dense, int n) {
    dequantize(codes, stride, scales, zeros, step_stride, groups, dense, n);
}

extern "C" __global__ void __launch_bounds__(256)
gptq_dequantize_f16(const unsigned char* codes, long long stride, const Half* scales, const unsigned char* zeros,
                    long long step_stride, const int* groups, Half* dense, int n) {
    dequantize(codes, stride, scales, zeros, step_stride, groups, dense, n);
}

extern "C" __global__ void __launch_bounds__(256)
gptq_dequantize_bf16(const unsigned char* codes, long long stride, const Half* scales, const unsigned char* zeros,
                     long long step_stride, const int* groups, unsigned short* dense, int n) {
    dequantize(codes, stride, scales, zeros, step_stride, groups, (Brain*)dense, n);
}
