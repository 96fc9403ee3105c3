// The activations and their derivatives, a vector at a time: one copy for each instruction set, for
// the convolutions' epilogue and for BatchNorm. Included after conv2d_simd.inl or lanes.inl, which
// define FASTCONV_INLINE.

namespace fastconv::FASTCONV_ISA {

typedef float FloatLanes __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
typedef uint32_t FloatLanesBits __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
typedef double DoubleLanes __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));

// exp for vectors: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial of degree 6 for exp(r) (its
// error is below 2^-24 there) and an exponent of n. Arguments are clamped to where 2^n is a normal
// number; NaN stays NaN.
FASTCONV_INLINE FloatLanes exponential(FloatLanes x) {
  const FloatLanes zeros = {};
  x = x > 88.0f ? zeros + 88.0f : x;
  x = x < -87.0f ? zeros - 87.0f : x;
  const float kRound = 0x1.8p23f;  // adding it leaves n in the lowest mantissa bits
  const FloatLanes shifted = x * 0x1.715476p0f + kRound;
  const FloatLanes n = shifted - kRound;
  FloatLanes r = x - n * 0x1.62e400p-1f;  // ln 2 in two parts: n times the first one is exact
  r = r - n * 0x1.7f7d1cp-20f;
  FloatLanes p = zeros + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (FloatLanes)(((FloatLanesBits)shifted + 127u) << 23);
}
FASTCONV_INLINE DoubleLanes exponential(DoubleLanes x) {
  for (size_t i = 0; i < sizeof(x) / sizeof(double); ++i) x[i] = std::exp(x[i]);
  return x;
}

// core/epilogue.h's activate, a vector at a time.
template <class V, class A>
FASTCONV_INLINE V activate_vector(V z, Activation activation, A slope) {
  const V zeros = {};
  switch (activation) {
    case Activation::kNone:
      return z;
    case Activation::kReLU:
      return z < zeros ? zeros : z;
    case Activation::kReLU6:
      z = z < zeros ? zeros : z;
      return z > 6 ? zeros + 6 : z;
    case Activation::kLeakyReLU:
      return z < zeros ? z * slope : z;
    case Activation::kSiLU:
      return z / (1 + exponential(-z));
    case Activation::kHardSwish: {
      V gate = z + 3;
      gate = gate < zeros ? zeros : gate;
      gate = gate > 6 ? zeros + 6 : gate;
      return z * gate / 6;
    }
    case Activation::kSigmoid:
      return 1 / (1 + exponential(-z));
  }
  return z;
}

// grad * core/epilogue.h's activation_derivative(z). Where that is 0 an infinite gradient gives 0
// too, as torch's does.
template <class V, class A>
FASTCONV_INLINE V gradient_vector(V grad, V z, Activation activation, A slope) {
  const V zeros = {};
  switch (activation) {
    case Activation::kNone:
      return grad;
    case Activation::kReLU:
      return z <= zeros ? zeros : grad;
    case Activation::kReLU6:
      grad = z <= zeros ? zeros : grad;
      return z >= 6 ? zeros : grad;
    case Activation::kLeakyReLU:
      return z > zeros ? grad : grad * slope;
    case Activation::kSiLU: {
      const V s = 1 / (1 + exponential(-z));
      return grad * (s * (1 + z * (1 - s)));
    }
    case Activation::kHardSwish: {
      const V inner = grad * (z / 3 + A(0.5));
      const V upper = z >= 3 ? grad : inner;
      return z <= -3 ? zeros : upper;
    }
    case Activation::kSigmoid: {
      const V s = 1 / (1 + exponential(-z));
      return grad * (s * (1 - s));
    }
  }
  return grad;
}

}  // namespace fastconv::FASTCONV_ISA
