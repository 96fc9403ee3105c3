// A stack that can be left and come back to. On x86-64 a switch is 14 instructions, elsewhere
// ucontext (which asks the kernel for the signal mask each time, seven times slower).
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fastconv {
namespace emulator {

class Fiber {
 public:
  using Entry = void (*)(void* argument);

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  Fiber(Fiber&& other) noexcept { (void)other; }  // only before it has started
  ~Fiber();

  // From outside: runs entry(argument), at first, or goes on with it, until it leaves or returns.
  // Entry must not let an exception out.
  void enter(Entry entry, void* argument);
  // From inside: back to where enter() was called.
  void leave();
  bool under_way() const { return stack_ != nullptr; }

 private:
  static void begin(Fiber* self);
  void switch_in();
  void switch_out(bool for_good);

  void* stack_ = nullptr;  // lent by a pool while the fiber is under way
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  bool ended_ = false;
#if defined(__x86_64__)
  void* inside_ = nullptr;  // stack pointers while the other side runs
  void* outside_ = nullptr;
#else
  ucontext_t inside_, outside_;
#endif
  // AddressSanitizer is told of every switch.
  void* fake_inside_ = nullptr;
  void* fake_outside_ = nullptr;
  const void* outside_bottom_ = nullptr;
  size_t outside_size_ = 0;
};

}  // namespace emulator
}  // namespace fastconv
