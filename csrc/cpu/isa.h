// What every CPU kernel shares with its caller: the instruction sets it is compiled for, how it
// runs in parallel, and bfloat16. No torch headers, and none of the standard library that holds
// inline functions: the linker keeps one copy of those, and it might be the AVX-512 one.
#pragma once
#include <cstddef>
#include <cstdint>

namespace univigu::cpu {

struct bf16 {
  uint16_t bits;
};

enum class Isa { portable, avx2, avx512, avx512bf16 };

// Runs body(first, last, context) over parts of [begin, end) of at least `grain`.
using Body = void (*)(int64_t, int64_t, void*);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, Body, void* context);

template <class F>
static inline void parallel(ParallelFor run, int64_t begin, int64_t end, int64_t grain, F&& f) {
  run(begin, end, grain,
      [](int64_t first, int64_t last, void* context) { (*static_cast<F*>(context))(first, last); },
      &f);
}

// UNIVIGU_KERNEL declares `function(const Args&)` once per instruction set; UNIVIGU_CALL calls the
// copy of one.
#if defined(__x86_64__)
#define UNIVIGU_KERNEL(function, Args)             \
  namespace portable { void function(const Args&); } \
  namespace avx2 { void function(const Args&); }     \
  namespace avx512 { void function(const Args&); }   \
  namespace avx512bf16 { void function(const Args&); }
#define UNIVIGU_CALL(isa, function, args)                                                    \
  switch (isa) {                                                                             \
    case ::univigu::cpu::Isa::portable: ::univigu::cpu::portable::function(args); break;     \
    case ::univigu::cpu::Isa::avx2: ::univigu::cpu::avx2::function(args); break;             \
    case ::univigu::cpu::Isa::avx512: ::univigu::cpu::avx512::function(args); break;         \
    case ::univigu::cpu::Isa::avx512bf16: ::univigu::cpu::avx512bf16::function(args); break; \
  }
#else
#define UNIVIGU_KERNEL(function, Args) namespace portable { void function(const Args&); }
#define UNIVIGU_CALL(isa, function, args) ::univigu::cpu::portable::function(args)
#endif

}  // namespace univigu::cpu
