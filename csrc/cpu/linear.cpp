#include "linear.h"

#include "layer.h"

namespace univigu::cpu::UNIVIGU_ISA {

constexpr int64_t PANELS = 8;  // of columns, of a task

template <class T>
static void run(const LinearArgs& a) {
  const T *x = static_cast<const T*>(a.x), *bias = static_cast<const T*>(a.bias);
  T* y = static_cast<T*>(a.y);
  auto* packed = reinterpret_cast<Packed<T>*>(a.packed);
  pack_weight(a.run, static_cast<const T*>(a.weight), a.weight_row, a.N, a.D, packed);
  const int64_t width = PANELS * NR, across = (a.N + width - 1) / width;
  const int64_t block = task_rows(a.rows);
  Tasks tasks(a.run, (a.rows + block - 1) / block * across);
  tasks.share([&](auto next) {
    for (int64_t task; next(task);) {
      const int64_t top = task / across * block, left = task % across * width;
      const int64_t rows = a.rows - top < block ? a.rows - top : block;
      const int64_t columns = a.N - left < width ? a.N - left : width;
      gemm<T>(x + top * a.x_row, a.x_row, rows, panel<T>(packed, a.D, left), a.D, columns,
              [&](int64_t row, int64_t column, vf value) {
                const int64_t n = left + column;
                store_up_to(y + (top + row) * a.N + n, value + bias_at(bias, n, a.N), a.N - n);
              });
    }
  });
}

void linear(const LinearArgs& a) { a.low ? run<bf16>(a) : run<float>(a); }

}  // namespace univigu::cpu::UNIVIGU_ISA
