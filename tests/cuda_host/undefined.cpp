// The compiler's checks for undefined behaviour (-fsanitize=undefined, without its library).
//
// The facts of each check begin with where it is.
#include "machine.h"

namespace {

struct Facts {
    const char* file;
    uint32_t line, column;
};

void refuse(const void* facts, const char* what) {
    const auto* at = static_cast<const Facts*>(facts);
    if (cuda_host::machine.current == nullptr) return;
    cuda_host::fail(cuda_host::name_of(*cuda_host::machine.current) + ": " + what + " at line " +
                    std::to_string(at->line));
}

} // namespace

#define CHECK(NAME, WHAT)                                                                                              \
    void __ubsan_handle_##NAME(void* facts) { refuse(facts, WHAT); }

extern "C" {
CHECK(add_overflow, "a sum overflows")
CHECK(sub_overflow, "a difference overflows")
CHECK(mul_overflow, "a product overflows")
CHECK(negate_overflow, "a negation overflows")
CHECK(divrem_overflow, "a division overflows or is by zero")
CHECK(shift_out_of_bounds, "a shift is too wide")
CHECK(out_of_bounds, "an index is out of bounds")
CHECK(pointer_overflow, "a pointer overflows")
CHECK(type_mismatch_v1, "a pointer is null or not aligned")
CHECK(load_invalid_value, "a value is none of its type")
CHECK(float_cast_overflow, "a number does not fit the type it is converted to")
CHECK(nonnull_arg, "an argument is null")
CHECK(builtin_unreachable, "what cannot be reached is")
CHECK(missing_return, "a function ends without its value")
CHECK(vla_bound_not_positive, "an array has no size")
}
