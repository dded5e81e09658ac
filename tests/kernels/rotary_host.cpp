// Runs rope3d on the host with the index functions of csrc/cuda/rotary.cuh, thread by thread as
// the kernels do. Tables t, h, w, text and then x [L, H, K], fp32, come on stdin; the result and
// then the row's 32-bit count of writes of every channel leave on stdout. Exit 1 names what is off.
#define __host__
#define __device__
#define __forceinline__ inline
#include "../../csrc/cuda/rotary.cuh"

#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace univigu::cuda;

namespace {

void require(bool holds, const char* what, long long got) {
  if (holds) return;
  std::fprintf(stderr, "%s: %lld\n", what, got);
  std::exit(1);
}

std::vector<float> read(size_t count) {
  std::vector<float> values(count);
  require(std::fread(values.data(), 4, count, stdin) == count, "short input", count);
  return values;
}

void write(const void* values, size_t count) {
  require(std::fwrite(values, 4, count, stdout) == count, "short output", count);
}

void check_division() {
  const int top = 2147483647;
  for (int d : {1, 2, 3, 5, 7, 30, 52, 64, 104, 1000003, 1 << 30, top}) {
    const Divider by = divider(d);
    for (long long q : {0LL, 1LL, 2LL, 1559LL, 32759LL, 32760LL, static_cast<long long>(top) / d})
      for (long long n : {q * d - 1, q * d, q * d + d - 1})
        if (0 <= n && n <= top) require(divide(static_cast<int>(n), by) == n / d, "divide", n);
  }
}

void check_tiles(int rows) {
  for (int tiles : {1, 2, 3, 7, 132, 1000}) {
    require(tile_start(rows, 0, tiles) == 0, "first tile", tiles);
    require(tile_start(rows, tiles, tiles) == rows, "last tile", tiles);
    for (int i = 0; i < tiles; i++)
      require(tile_start(rows, i, tiles) <= tile_start(rows, i + 1, tiles), "tile", i);
  }
  for (int warps : {1, 3, 20})
    for (int samples : {2, 6, 70000}) {
      const int tiles = tiles_of(rows, samples, 1, warps, 24, 132);
      require(tiles >= 1 && tiles <= (rows > 1 ? rows : 1), "tiles", tiles);
    }
}

template <int E>
void rotate(const Rotary& r, int rows, int heads, int max_units, float sign,
            const std::vector<float>& x, std::vector<float>& out, std::vector<int>& writes) {
  const int K = 2 * r.half;
  const Spread s = spread(heads, r.half, E, max_units);
  require(s.warps > 0 && s.units <= max_units, "spread", s.warps);
  for (int row = 0; row < rows; row++) {
    const Place place = place_of(r, row);
    for (int thread = 0; thread < 32 * s.warps; thread++) {
      const Share share = share_of(s, heads, thread);
      Angle angles[E];
      for (int i = 0; i < E; i++) {
        angles[i] = *angle_of(r, place, pair_of<E>(r, place.text, share.unit, i));
        angles[i].sin *= sign;
      }
      for (int j = 0; j < s.units; j++) {
        const int head = share.head + j * share.step;
        if (head >= heads) break;
        const long long at = (static_cast<long long>(row) * heads + head) * K + share.unit * E;
        require(at % E == 0 && r.half % E == 0, "a vector across 16 bytes", at);
        float values[2][E];
        for (int i = 0; i < 2 * E; i++) values[i / E][i % E] = x[at + i / E * r.half + i % E];
        rotate_unit(values, angles, place.text);
        for (int i = 0; i < 2 * E; i++) {
          out[at + i / E * r.half + i % E] = values[i / E][i % E];
          writes[at + i / E * r.half + i % E]++;
        }
      }
    }
  }
}

}  // namespace

// frames height width text_rows heads head_dim pairs_t pairs_h elements max_units sign
int main(int count, char** arguments) {
  require(count == 12, "arguments", count);
  int a[12];
  for (int i = 1; i < 12; i++) a[i] = std::atoi(arguments[i]);
  const int frames = a[1], height = a[2], width = a[3], text_rows = a[4], heads = a[5], K = a[6];
  const int pairs_t = a[7], pairs_h = a[8], rows = frames * height * width + text_rows;
  const auto t = read(2 * frames * pairs_t), h = read(2 * height * pairs_h);
  const auto w = read(2 * width * (K / 2 - pairs_t - pairs_h)), text = read(text_rows * K);
  const auto x = read(static_cast<size_t>(rows) * heads * K);
  const auto angles = [](const std::vector<float>& table) {
    return reinterpret_cast<const Angle*>(table.data());
  };
  const Rotary r{angles(t), angles(h), angles(w), angles(text), pairs_t, pairs_h, K / 2,
                 divider(height), divider(width), frames * height * width};
  check_division();
  check_tiles(rows);
  std::vector<float> out(x.size());
  std::vector<int> writes(x.size());
  const float sign = static_cast<float>(a[11]);
  if (a[9] == 8) {
    rotate<8>(r, rows, heads, a[10], sign, x, out, writes);
  } else {
    rotate<4>(r, rows, heads, a[10], sign, x, out, writes);
  }
  write(out.data(), out.size());
  write(writes.data(), writes.size());
}
