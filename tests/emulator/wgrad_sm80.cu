// Every tile of the tensor cores' filter gradient, in every mode, on problems for which the choice
// would take the smallest: against plain loops. Includes the kernel's file, whose plans it makes.
#include "cuda/conv2d_igemm_sm80_wgrad.cu"

#include "cases.h"

namespace fastconv {
namespace testing {
namespace {

template <class T>
constexpr DType kDType = std::is_same_v<T, float>    ? DType::kFloat32
                         : std::is_same_v<T, __half> ? DType::kFloat16
                                                     : DType::kBFloat16;

Conv2dProblem problem(int N, int C, int H, int W, int K, int R, int S, int G, int stride) {
  Conv2dProblem p;
  p.N = N, p.C = C, p.H = H, p.W = W, p.K = K, p.R = R, p.S = S, p.G = G;
  p.stride_h = p.stride_w = stride;
  p.pad_h = R / 2, p.pad_w = S / 2;
  p.layout = p.filter_layout = Layout::kNHWC;
  return p;
}

// NHWC, KRSC.
template <class T>
std::vector<T> reference(const Conv2dProblem& p, const std::vector<T>& x,
                         const std::vector<T>& dy) {
  const int64_t c_each = p.C / p.G, k_each = p.K / p.G;
  std::vector<T> dw;
  for (int64_t k = 0; k < p.K; ++k) {
    for (int64_t tap = 0; tap < p.R * p.S; ++tap) {
      for (int64_t c = 0; c < c_each; ++c) {
        float sum = 0;
        for (int64_t i = 0; i < p.N * p.P() * p.Q(); ++i) {
          const int64_t h = i / p.Q() % p.P() * p.stride_h + tap / p.S * p.dil_h - p.pad_h;
          const int64_t w = i % p.Q() * p.stride_w + tap % p.S * p.dil_w - p.pad_w;
          if (h < 0 || h >= p.H || w < 0 || w >= p.W) continue;
          const int64_t n = i / (p.P() * p.Q());
          sum += static_cast<float>(dy[i * p.K + k]) *
                 static_cast<float>(x[((n * p.H + h) * p.W + w) * p.C + k / k_each * c_each + c]);
        }
        dw.push_back(T(sum));
      }
    }
  }
  return dw;
}

template <class T>
std::vector<T> computed(const cuda::Plan& plan, const Conv2dProblem& p, const std::vector<T>& x,
                        const std::vector<T>& dy) {
  Array<T> input(x), grad(dy), out(static_cast<size_t>(p.filter_elements()));
  Array<unsigned char> workspace(cuda::Workspace(plan, p, nullptr).bytes + 1);
  Conv2dArgs args;
  args.input = input.get();
  args.grad = grad.get();
  args.out = out.get();
  args.workspace = workspace.get();
  cuda::launch_plan(plan, p, args, Context{});
  return out.read();
}

template <class T>
void tiles_case(uint64_t seed, bool tf32) {
  // Filters and columns a little more than a tile's; one split and several; groups.
  const Conv2dProblem problems[] = {
      problem(2, 16, 7, 9, 136, 3, 3, 1, 2), problem(3, 40, 14, 15, 72, 1, 1, 1, 1),
      problem(1, 48, 6, 5, 80, 1, 3, 2, 1), problem(2, 3, 15, 14, 24, 5, 5, 1, 2),
      problem(2, 18, 7, 9, 32, 3, 3, 2, 1)};
  for (Conv2dProblem p : problems) {
    p.dtype = kDType<T>;
    p.tf32 = tf32;
    const auto x = small_integers<T>(static_cast<size_t>(p.input_elements()), seed);
    const auto dy = small_integers<T>(static_cast<size_t>(p.output_elements()), seed + 1);
    const auto want = reference(p, x, dy);
    for (const cuda::TileSize& tile : cuda::kTiles) {
      const std::string what = "C = " + std::to_string(p.C) + ", tile " + std::to_string(tile.m) +
                               " x " + std::to_string(tile.n);
      expect_equal(computed(cuda::plan_with(p, tile, false), p, x, dy), want, what);
    }
    expect_equal(computed(cuda::plan_with(p, cuda::kPatches, true), p, x, dy), want,
                 "C = " + std::to_string(p.C) + ", patches");
  }
}

const Register tf32("wgrad_sm80_tf32", [](uint64_t seed) { tiles_case<float>(seed, true); });
const Register f32("wgrad_sm80_3xtf32", [](uint64_t seed) { tiles_case<float>(seed, false); });
const Register f16("wgrad_sm80_f16", [](uint64_t seed) { tiles_case<__half>(seed, false); });
const Register bf16("wgrad_sm80_bf16",
                    [](uint64_t seed) { tiles_case<__nv_bfloat16>(seed, false); });

}  // namespace
}  // namespace testing
}  // namespace fastconv
