#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

// Present where some part of the program was built with AddressSanitizer.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom,
                                                          size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom,
                                                           size_t* size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* at, size_t bytes);
}

namespace fastconv {
namespace emulator {
namespace {

constexpr size_t kStackBytes = 256 * 1024;

size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

// Stacks that ended fibers gave back; the lowest page of each is a guard. A kernel without barriers
// needs one stack however many threads it has.
class StackPool {
 public:
  ~StackPool() {
    for (void* stack : free_) munmap(stack, kStackBytes);
  }
  void* take() {
    if (!free_.empty()) {
      void* stack = free_.back();
      free_.pop_back();
      return stack;
    }
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack, page_bytes(), PROT_NONE);
    return stack;
  }
  void give_back(void* stack) {
    // The frames of the ended fiber left their red zones behind.
    if (__asan_unpoison_memory_region != nullptr) {
      __asan_unpoison_memory_region(static_cast<char*>(stack) + page_bytes(),
                                    kStackBytes - page_bytes());
    }
    free_.push_back(stack);
  }

 private:
  std::vector<void*> free_;
};

StackPool& pool() {
  thread_local StackPool stacks;
  return stacks;
}

thread_local Fiber* starting = nullptr;

}  // namespace

#if defined(__x86_64__)
// Pushes what the System V ABI says a callee preserves, exchanges stack pointers, pops the same.
extern "C" void fastconv_emulator_switch(void** save_stack, void* load_stack);
asm(R"(
.text
.hidden fastconv_emulator_switch
.globl fastconv_emulator_switch
.type fastconv_emulator_switch, @function
fastconv_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastconv_emulator_switch, . - fastconv_emulator_switch
)");
#endif

Fiber::~Fiber() {
  if (stack_ != nullptr) pool().give_back(stack_);
}

void Fiber::begin(Fiber* self) {
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(nullptr, &self->outside_bottom_, &self->outside_size_);
  }
  self->entry_(self->argument_);
  self->ended_ = true;
  self->switch_out(/*for_good=*/true);
}

void Fiber::switch_in() {
  if (__sanitizer_start_switch_fiber != nullptr) {
    __sanitizer_start_switch_fiber(&fake_outside_, static_cast<char*>(stack_) + page_bytes(),
                                   kStackBytes - page_bytes());
  }
#if defined(__x86_64__)
  fastconv_emulator_switch(&outside_, inside_);
#else
  swapcontext(&outside_, &inside_);
#endif
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(fake_outside_, nullptr, nullptr);
  }
}

void Fiber::switch_out(bool for_good) {
  if (__sanitizer_start_switch_fiber != nullptr) {
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_inside_, outside_bottom_,
                                   outside_size_);
  }
#if defined(__x86_64__)
  fastconv_emulator_switch(&inside_, outside_);
#else
  swapcontext(&inside_, &outside_);
#endif
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(fake_inside_, &outside_bottom_, &outside_size_);
  }
}

void Fiber::enter(Entry entry, void* argument) {
  if (stack_ == nullptr) {
    stack_ = pool().take();
    entry_ = entry;
    argument_ = argument;
    ended_ = false;
    starting = this;
#if defined(__x86_64__)
    // As if begin() had been called: six registers, the address that the switch returns to, and a
    // null return address for debuggers, 8 bytes off a multiple of 16.
    auto* top = reinterpret_cast<uint64_t*>(static_cast<char*>(stack_) + kStackBytes);
    uint64_t* frame = top - 8;
    static_assert(kStackBytes % 16 == 0, "the top of a stack is 16-byte aligned");
    std::memset(frame, 0, 8 * sizeof(uint64_t));
    void (*trampoline)() = [] { begin(starting); };
    frame[6] = reinterpret_cast<uint64_t>(trampoline);
    inside_ = frame;
#else
    getcontext(&inside_);
    inside_.uc_stack.ss_sp = static_cast<char*>(stack_) + page_bytes();
    inside_.uc_stack.ss_size = kStackBytes - page_bytes();
    inside_.uc_link = nullptr;
    makecontext(&inside_, static_cast<void (*)()>([] { begin(starting); }), 0);
#endif
  }
  switch_in();
  if (ended_) {
    pool().give_back(stack_);
    stack_ = nullptr;
  }
}

void Fiber::leave() { switch_out(/*for_good=*/false); }

}  // namespace emulator
}  // namespace fastconv
