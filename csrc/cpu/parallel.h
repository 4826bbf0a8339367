#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <vector>
#if defined(__SANITIZE_THREAD__)
#include <thread>
#endif

namespace secondorder::cpu {

// Below this much work (elements touched) a phase stays on one thread: waking others costs more.
constexpr int64_t kSerialWork = 1 << 16;
// So many multiply-adds of a register kernel take as long as touching one element does.
constexpr int64_t kProductsPerElement = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// at::parallel_for. ThreadSanitizer does not see the forks and joins of an OpenMP runtime, so it gets plain threads.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
#if defined(__SANITIZE_THREAD__)
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), ceil_div(end - begin, grain));
  if (threads <= 1) return begin < end ? f(begin, end) : void();
  const int64_t chunk = ceil_div(end - begin, threads);
  std::vector<std::thread> others;
  for (int64_t first = begin + chunk; first < end; first += chunk)
    others.emplace_back([&f, first, chunk, end] { f(first, std::min(first + chunk, end)); });
  f(begin, std::min(begin + chunk, end));
  for (std::thread& other : others) other.join();
#else
  at::parallel_for(begin, end, grain, f);
#endif
}

// Calls f(worker, item) for every item, items handed out one by one in order, so put the largest first.
// `work` is the total work of all items.
template <typename F>
void parallel_items(int64_t items, int64_t work, F&& f) {
  const int64_t workers =
      work < kSerialWork || at::in_parallel_region() ? 1 : std::min<int64_t>(items, at::get_num_threads());
  std::atomic<int64_t> next{0};
  const auto run = [&](int64_t worker) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) f(worker, item);
  };
  if (workers <= 1) return run(0);
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) run(worker);
  });
}

// Rows of `row_work` each, in contiguous ranges f(begin, end), split among threads only where that pays.
template <typename F>
void parallel_rows(int64_t rows, int64_t row_work, F&& f) {
  parallel_for(0, rows, std::max<int64_t>(1, kSerialWork / std::max<int64_t>(1, row_work)), f);
}

// Gives tensors that threads will write to storage of their own, where it is copy-on-write: ATen refuses to within
// threads.
inline void own_storage(at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) tensor.mutable_data_ptr();
}

// Calls f(layer) for every layer of a net: side by side for those that `parallel_rows` would not split, one after
// another for the others. sizes[layer]: the elements that one pass over the layer touches; `passes` over each are made.
template <typename F>
void parallel_layers(const std::vector<int64_t>& sizes, int64_t passes, F&& f) {
  std::vector<int64_t> small;
  int64_t work = 0;
  for (size_t layer = 0; layer < sizes.size(); ++layer) {
    if (sizes[layer] > kSerialWork) {
      f(layer);
    } else {
      small.push_back(layer);
      work += passes * sizes[layer];
    }
  }
  std::stable_sort(small.begin(), small.end(), [&](int64_t a, int64_t b) { return sizes[a] > sizes[b]; });
  parallel_items(small.size(), work, [&](int64_t, int64_t item) { f(small[item]); });
}

}  // namespace secondorder::cpu
