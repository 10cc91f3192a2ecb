// Memory that is lent for large tensors and taken back, instead of being asked from the system and
// given back to it at every step: the first touch of fresh pages costs as much as a sparse product.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <cstdlib>
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
// What was not wanted again while so many others were lent is freed.
constexpr std::uint64_t kPatience = 64;

struct Block {
  void* memory;
  std::size_t size;
  std::uint64_t returned;  // how many had been lent when it was
};

class Lender {
 public:
  Block lend(std::size_t bytes) {
    const std::size_t size = (bytes + kPage - 1) / kPage * kPage;
    const std::lock_guard<std::mutex> lock(mutex_);
    ++lent_;
    for (auto block = idle_.begin(); block != idle_.end();) {
      if (block->size == size) {
        const Block found = *block;
        idle_.erase(block);
        return found;
      }
      if (lent_ - block->returned > kPatience) {
        std::free(block->memory);
        block = idle_.erase(block);
      } else {
        ++block;
      }
    }
    void* memory = std::aligned_alloc(kPage, size);
    if (!memory) throw std::bad_alloc();
#if defined(__linux__)
    madvise(memory, size, MADV_HUGEPAGE);
#endif
    return {memory, size, 0};
  }

  void take_back(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    block.returned = lent_;
    idle_.push_front(block);
  }

 private:
  std::mutex mutex_;
  std::list<Block> idle_;
  std::uint64_t lent_ = 0;
};

// Never destroyed: tensors may outlive everything else.
Lender& lender() {
  static Lender& lender = *new Lender;
  return lender;
}

// A float32 vector whose memory goes back to the lender when the tensor is gone.
nb::ndarray<nb::pytorch, float, nb::ndim<1>> lend(std::size_t count) {
  auto* block = new Block(lender().lend(4 * count));
  nb::capsule owner(block, [](void* p) noexcept {
    auto* block = static_cast<Block*>(p);
    lender().take_back(*block);
    delete block;
  });
  return {static_cast<float*>(block->memory), {count}, owner};
}

}  // namespace

void bind_buffers(nb::module_& m) { m.def("lend", &lend); }

}  // namespace spartan
