// Recycling allocator of large float32 tensors: memory of freed ones serves the next step.
//
// The first touch of fresh pages costs as much as a sparse product.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <list>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "instruction_sets.h"

namespace nb = nanobind;

namespace spartan {
namespace {

constexpr std::size_t kPage = 1 << 21;
// What lay idle while so many others were lent is given back to the system.
constexpr std::uint64_t kPatience = 64;

struct Block {
  void* memory;
  std::size_t size;
  std::uint64_t returned;  // how many had been lent when it was
};

// Of one block, so that blocks move from list to list without an allocation.
using Blocks = std::list<Block>;

// Memory is in use, idle, or freed. What is idle never makes the total larger than the most that
// was in use at a time, and is freed once kPatience blocks were lent without it.
class Lender {
 public:
  Blocks lend(std::size_t bytes) {
    const std::size_t size = (bytes + kPage - 1) / kPage * kPage;
    const std::lock_guard<std::mutex> lock(mutex_);
    ++lent_;
    while (!idle_.empty() && lent_ - idle_.back().returned > kPatience)
      release(std::prev(idle_.end()));
    Blocks found;
    for (auto block = idle_.begin(); block != idle_.end(); ++block)
      if (block->size >= size && block->size <= size + size / 4) {
        idle_bytes_ -= block->size;
        found.splice(found.begin(), idle_, block);
        break;
      }
    if (found.empty()) found.push_back({allocate(size), size, 0});
    used_bytes_ += found.front().size;
    most_used_ = std::max(most_used_, used_bytes_);
    return found;
  }

  void take_back(Blocks& block) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    block.front().returned = lent_;
    used_bytes_ -= block.front().size;
    idle_bytes_ += block.front().size;
    idle_.splice(idle_.begin(), block);
    // Never more than was in use at a time.
    while (idle_bytes_ + used_bytes_ > most_used_) release(std::prev(idle_.end()));
  }

 private:
  static void* allocate(std::size_t size) {
    void* memory = std::aligned_alloc(kPage, size);
    if (!memory) throw std::bad_alloc();
#if defined(__linux__)
    madvise(memory, size, MADV_HUGEPAGE);
#endif
    return memory;
  }

  void release(Blocks::iterator block) {
    idle_bytes_ -= block->size;
    std::free(block->memory);
    idle_.erase(block);
  }

  std::mutex mutex_;
  Blocks idle_;  // last returned first
  std::size_t idle_bytes_ = 0, used_bytes_ = 0, most_used_ = 0;
  std::uint64_t lent_ = 0;
};

// Never destroyed: tensors may outlive everything else.
Lender& lender() {
  static Lender& lender = *new Lender;
  return lender;
}

// A float32 vector whose memory goes back to the lender when the tensor is gone.
nb::ndarray<nb::pytorch, float, nb::ndim<1>> lend(std::size_t count) {
  auto* block = new Blocks(lender().lend(4 * count));
  nb::capsule owner(block, [](void* p) noexcept {
    auto* block = static_cast<Blocks*>(p);
    lender().take_back(*block);
    delete block;
  });
  return {static_cast<float*>(block->front().memory), {count}, owner};
}

}  // namespace

void bind_buffers(nb::class_<Kernels>& kernels) {
  kernels.def_static("lend", &lend, nb::arg("count"));
}

}  // namespace spartan
