// What layers over rows share: tasks for all threads, a weight packed by all of them, a bias.
#pragma once
#include "gemm.h"

namespace univigu::cpu::UNIVIGU_ISA {

// Tasks 0 .. count in the order in which threads are free for them: with equal shares, all would
// wait for a thread on a busy core.
class Tasks {
 public:
  Tasks(ParallelFor run, int64_t count) : run_(run), count_(count) {}

  // worker(next) on every thread; next(task) is false when none is left.
  template <class F>
  void share(F&& worker) {
    parallel(run_, 0, count_, 1, [&](int64_t, int64_t) {
      worker([&](int64_t& task) {
        task = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED);
        return task < count_;
      });
    });
  }

 private:
  ParallelFor run_;
  int64_t count_, next_ = 0;
};

constexpr int64_t BLOCK = 48;  // rows of a task at most

// Rows of a task: whole tiles, and an even number of tasks. 64 rows are 36 and 28, not 48 and 16.
static inline int64_t task_rows(int64_t rows) {
  const int64_t tasks = (rows + 2 * BLOCK - 1) / (2 * BLOCK) * 2;
  return tasks ? ((rows + tasks - 1) / tasks + MR - 1) / MR * MR : BLOCK;
}

// weight [N, D] -> packed, shared out by panels.
template <class T>
static inline void pack_weight(ParallelFor run, const T* weight, int64_t ld, int64_t N, int64_t D,
                               Packed<T>* packed) {
  const int64_t panels = (N + NR - 1) / NR;
  parallel(run, 0, panels, 65536 / (NR * (D + 1)) + 1, [&](int64_t first, int64_t last) {
    const int64_t from = first * NR, to = last * NR < N ? last * NR : N;
    pack_rows(weight + from * ld, ld, to - from, D, panel<T>(packed, D, from));
  });
}

// bias or zeros for W columns, of which there are N.
template <class T>
static inline vf bias_at(const T* bias, int64_t column, int64_t N) {
  return bias ? load_up_to(bias + column, N - column) : vf{};
}

}  // namespace univigu::cpu::UNIVIGU_ISA
