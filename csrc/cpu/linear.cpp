#include "linear.h"

#include "layer.h"

namespace univigu::cpu::UNIVIGU_ISA {

constexpr int64_t PANELS = 8;  // of columns, of a task of many rows

// So many rows and columns of y, from row `top` and column `left` on.
template <class T, bool FEW>
__attribute__((noinline)) static void product(
    const LinearArgs& a, int64_t top, int64_t left, int64_t rows, int64_t columns) {
  const T *x = static_cast<const T*>(a.x) + top * a.x_row, *bias = static_cast<const T*>(a.bias);
  T* y = static_cast<T*>(a.y) + top * a.N;
  const auto put = [&](int64_t row, int64_t column, vf value) {
    const int64_t n = left + column;
    store_up_to(y + row * a.N + n, value + bias_at(bias, n, a.N), a.N - n);
  };
  if constexpr (FEW) {
    const T* weight = static_cast<const T*>(a.weight) + left * a.weight_row;
    gemm_rows<T>(x, a.x_row, rows, weight, a.weight_row, a.D, columns, put);
  } else {
    const auto* packed = reinterpret_cast<const Packed<T>*>(a.packed);
    gemm<T>(x, a.x_row, rows, panel<T>(packed, a.D, left), a.D, columns, put);
  }
}

template <class T, bool FEW>
static void run(const LinearArgs& a) {
  if constexpr (!FEW)
    pack_weight(a.run, static_cast<const T*>(a.weight), a.weight_row, a.N, a.D,
                reinterpret_cast<Packed<T>*>(a.packed));
  const int64_t width = (FEW ? GROUP : PANELS) * NR, across = (a.N + width - 1) / width;
  const int64_t block = FEW ? a.rows : task_rows(a.rows);
  Tasks tasks(a.run, (a.rows + block - 1) / block * across);
  tasks.share([&](auto next) {
    for (int64_t task; next(task);) {
      const int64_t top = task / across * block, left = task % across * width;
      const int64_t rows = a.rows - top < block ? a.rows - top : block;
      const int64_t columns = a.N - left < width ? a.N - left : width;
      product<T, FEW>(a, top, left, rows, columns);
    }
  });
}

void linear(const LinearArgs& a) {
  const bool few = !a.packed;
  if (a.low) few ? run<bf16, true>(a) : run<bf16, false>(a);
  else few ? run<float, true>(a) : run<float, false>(a);
}

}  // namespace univigu::cpu::UNIVIGU_ISA
