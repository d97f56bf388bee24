// One row of the loss and of its gradients on the CPU. mhkd_loss_cpu.cpp includes this file once
// for each instruction set, with
//     MHKD_ISA           the namespace to define everything in
//     MHKD_VECTOR_BYTES  the size of its registers
// and the compiler told which instructions it may use. Everything is written with the vector
// extensions of GCC and Clang: the same text becomes AVX-512, AVX2, SSE2 or Neon. Nothing here may
// be defined outside the namespace and no header may be included here: an inline function compiled
// for AVX-512 could be the copy that the linker keeps.

namespace MHKD_LIBRARY {
namespace MHKD_ISA {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(MHKD_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(MHKD_VECTOR_BYTES)));
  static constexpr int kWidth = MHKD_VECTOR_BYTES / sizeof(float);
  static constexpr int kMantissa = 23;
  static constexpr float kLowest = -127;  // 2^x is 0 from here down: there are no denormals
  static constexpr float kRound = 12582912.f + 127;  // 1.5 * 2^23: x + kRound - kRound is x rounded
  static constexpr int kDegree = 6;
  // 2^f / sum c_k f^(k+1) is 1 to 2e-9 (float) and 4e-18 (double) for |f| <= 1/2, with the constant
  // term 1 exact.
  static constexpr float kPolynomial[] = {
      0.693147182f, 0.240226477f, 0.0555033237f, 0.00961843785f, 0.00133988762f, 0.000153533576f};
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(MHKD_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(MHKD_VECTOR_BYTES)));
  static constexpr int kWidth = MHKD_VECTOR_BYTES / sizeof(double);
  static constexpr int kMantissa = 52;
  static constexpr double kLowest = -1023;
  static constexpr double kRound = 6755399441055744. + 1023;  // 1.5 * 2^52
  static constexpr int kDegree = 11;
  static constexpr double kPolynomial[] = {0.69314718055994529, 0.2402265069591013,
      0.055504108664820077, 0.0096181291075940704, 0.0013333558146775451, 0.00015403530457166255,
      1.525273349254206e-05, 1.3215435258230248e-06, 1.0178199760274141e-07, 7.073787012174465e-09,
      4.4347485181534646e-10};
};

#define MHKD_INLINE inline __attribute__((always_inline))

template <class T>
MHKD_INLINE typename Simd<T>::V load(const T* from) {
  typename Simd<T>::V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
MHKD_INLINE void store(T* to, typename Simd<T>::V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// The register that ends with class n - 1, where the whole registers before it leave `rest` classes
// over. The lanes that they have had, or that lie before the row, are -inf: masked classes, which
// add nothing to any sum.
template <class T>
MHKD_INLINE typename Simd<T>::V load_rest(const T* from, int n, int rest) {
  using S = Simd<T>;
  constexpr T kMasked = -std::numeric_limits<T>::infinity();
  if (n >= S::kWidth) {
    typename S::I lane;
    for (int i = 0; i < S::kWidth; ++i) lane[i] = i;
    return lane < S::kWidth - rest ? typename S::V{} + kMasked : load(from + n - S::kWidth);
  }
  T padded[S::kWidth];
  for (int i = 0; i < S::kWidth; ++i)
    padded[i] = i < S::kWidth - rest ? kMasked : from[i - (S::kWidth - rest)];
  return load(padded);
}

// Stores the last `rest` lanes.
template <class T>
MHKD_INLINE void store_rest(T* to, typename Simd<T>::V v, int rest) {
  constexpr int W = Simd<T>::kWidth;
  T lanes[W];
  store(lanes, v);
  for (int i = 0; i < rest; ++i) to[i] = lanes[W - rest + i];
}

// A NaN in x loses: the sums carry it on, the largest logit need not.
template <class T>
MHKD_INLINE typename Simd<T>::V larger(typename Simd<T>::V x, typename Simd<T>::V y) {
  return x > y ? x : y;
}

template <class T>
MHKD_INLINE T largest(const T* z, int n, T so_far) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::kWidth;
  V a = V{} + so_far, b = a, c = a, d = a;  // four chains hide the latency of the comparison
  int i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    a = larger<T>(load(z + i), a);
    b = larger<T>(load(z + i + W), b);
    c = larger<T>(load(z + i + 2 * W), c);
    d = larger<T>(load(z + i + 3 * W), d);
  }
  for (; i + W <= n; i += W) a = larger<T>(load(z + i), a);
  if (i < n) b = larger<T>(load_rest(z, n, n - i), b);
  a = larger<T>(larger<T>(a, b), larger<T>(c, d));
  T found = a[0];
  for (int j = 1; j < W; ++j) found = a[j] > found ? a[j] : found;
  return found;
}

// e = 2^(d * scale) for d <= 0, kCount registers side by side, as each is a chain of dependent
// steps. What limits it is the number of instructions: d * scale is contracted into the two steps
// that use it, and Estrin's scheme, which has a shorter chain but one more product, is slower. The
// comparison is written so that NaN stays NaN; -inf gives 0.
template <class T, int kCount>
MHKD_INLINE void exp2_scaled(const typename Simd<T>::V* d, T scale, typename Simd<T>::V* e) {
  using S = Simd<T>;
  using V = typename S::V;
  const V lowest = V{} + S::kLowest / scale;
  V shifted[kCount], f[kCount];
  for (int j = 0; j < kCount; ++j) {
    const V x = lowest > d[j] ? lowest : d[j];
    // Its low bits hold the whole part of x * scale, plus the bias of an exponent.
    shifted[j] = x * scale + S::kRound;
    f[j] = x * scale - (shifted[j] - S::kRound);
  }
  for (int j = 0; j < kCount; ++j)
    e[j] = S::kPolynomial[S::kDegree - 1] * f[j] + S::kPolynomial[S::kDegree - 2];
  for (int k = S::kDegree - 3; k >= 0; --k) {
    for (int j = 0; j < kCount; ++j) e[j] = e[j] * f[j] + S::kPolynomial[k];
  }
  for (int j = 0; j < kCount; ++j) {
    // A product and not an addition to the exponent's bits, which would make a number of NaN.
    e[j] = (e[j] * f[j] + T(1)) * (V)((typename S::I)shifted[j] << S::kMantissa);
  }
}

// exp(d) of kCount registers, from their exp(d / tau) or anew.
template <class T, int kSquarings, int kCount>
MHKD_INLINE void at_one(
    const typename Simd<T>::V* d, const typename Simd<T>::V* at_tau, typename Simd<T>::V* e) {
  if constexpr (kSquarings == kNoSquarings) return exp2_scaled<T, kCount>(d, T(kLog2E), e);
  for (int j = 0; j < kCount; ++j) {
    e[j] = at_tau[j];
    for (int k = 0; k < kSquarings; ++k) e[j] *= e[j];
  }
}

// A block of a row for the arithmetic: half types are converted into the buffer, where their
// gradients are computed, too. Here, so that it is compiled for each instruction set.
template <class In, class T>
MHKD_INLINE const T* converted(const In* z, int n, T* buffer) {
  if constexpr (std::is_same_v<In, T>) return z;
  for (int i = 0; i < n; ++i) buffer[i] = static_cast<T>(z[i]);
  return buffer;
}

template <class In>
constexpr int kBuffer = std::is_same_v<In, Arithmetic<In>> ? 1 : kBlock;

// ---- Forward ----
// The sums over some registers of classes, one for each lane.
template <class T, int kSquarings, bool kMarked>
struct LaneSums {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  V tau_s{}, one_s{}, tau_t{}, one_t{}, cross{};

  MHKD_INLINE void add(V d_s, V d_t, T scale) {
    const V d[] = {d_s, d_t};
    V e[2], e_one[2];
    exp2_scaled<T, 2>(d, scale, e);
    at_one<T, kSquarings, kMarked ? 2 : 1>(d, e, e_one);
    tau_s += e[0];
    one_s += e_one[0];
    tau_t += e[1];
    if constexpr (kMarked) one_t += e_one[1];
    // Where the teacher's probability is 0 the difference may be infinite or NaN: its bits go.
    cross += e[1] * (V)((I)(d_t - d_s) & (I)(e[1] > T(0)));
  }

  MHKD_INLINE void add(const LaneSums& other) {
    tau_s += other.tau_s;
    one_s += other.one_s;
    tau_t += other.tau_t;
    one_t += other.one_t;
    cross += other.cross;
  }
};

template <class T>
MHKD_INLINE double sum_lanes(typename Simd<T>::V v) {
  constexpr int W = Simd<T>::kWidth, kParts = W < 4 ? W : 4;
  double parts[kParts] = {};
  for (int i = 0; i < W; i += kParts) {
    for (int j = 0; j < kParts; ++j) parts[j] += double(v[i + j]);
  }
  for (int j = 1; j < kParts; ++j) parts[0] += parts[j];
  return parts[0];
}

// Asks for the next block of a row while a run of the current one is computed: the search for the
// next block's largest logit would wait for memory with nothing else to do. Behind the last row
// this asks for nothing real: harmless.
template <class T>
MHKD_INLINE void prefetch_run(const T* run) {
  constexpr int kLine = 64;
  const char* bytes = reinterpret_cast<const char*>(run + kBlock);
  for (int i = 0; i < kRun * MHKD_VECTOR_BYTES; i += kLine) __builtin_prefetch(bytes + i);
}

// Adds n classes to the sums of their row, whose maxima are already no smaller than these logits. A
// lane adds up a run of kRun registers, then the runs: long chains of float32 additions round more.
template <class T, int kSquarings, bool kMarked>
void add_classes(const T* s, const T* t, int n, double tau, RowSums<double>& sums) {
  constexpr int W = Simd<T>::kWidth;
  const T max_s = T(sums.max_s), max_t = T(sums.max_t), scale_z = T(scale(tau));
  const int rest = n % W, whole = n - rest;
  LaneSums<T, kSquarings, kMarked> lanes;
  for (int i = 0; i < whole;) {
    const int end = std::min(whole, i + kRun * W);
    prefetch_run(s + i);
    prefetch_run(t + i);
    LaneSums<T, kSquarings, kMarked> run;
    for (; i < end; i += W) run.add(load(s + i) - max_s, load(t + i) - max_t, scale_z);
    lanes.add(run);
  }
  if (rest) lanes.add(load_rest(s, n, rest) - max_s, load_rest(t, n, rest) - max_t, scale_z);
  sums.tau_s += sum_lanes<T>(lanes.tau_s);
  sums.tau_t += sum_lanes<T>(lanes.tau_t);
  sums.one_s += sum_lanes<T>(lanes.one_s);
  if (kMarked) sums.one_t += sum_lanes<T>(lanes.one_t);
  sums.cross += sum_lanes<T>(lanes.cross);
}

template <class In, int kSquarings, bool kMarked>
RowSums<double> sum_row(const In* s, const In* t, int classes, double tau) {
  using T = Arithmetic<In>;
  alignas(MHKD_VECTOR_BYTES) T buffer_s[kBuffer<In>], buffer_t[kBuffer<In>];
  constexpr double lowest = std::numeric_limits<T>::lowest();
  RowSums<double> sums{lowest, lowest};
  for (int start = 0; start < classes; start += kBlock) {
    const int n = std::min(kBlock, classes - start);
    const T* block_s = converted(s + start, n, buffer_s);
    const T* block_t = converted(t + start, n, buffer_t);
    const T max_s = largest(block_s, n, T(sums.max_s)), max_t = largest(block_t, n, T(sums.max_t));
    if (start == 0) {
      sums = {max_s, max_t};  // nothing to rescale: most rows are one block and save the work
    } else if (max_s > sums.max_s || max_t > sums.max_t) {
      rebase<double>(sums, max_s, max_t, tau, scale(tau));
    }
    add_classes<T, kSquarings, kMarked>(block_s, block_t, n, tau, sums);
  }
  return sums;
}

// ---- Backward ----
// The gradients of n classes, the label's counted from the first of them.
template <class T, int kSquarings, Part kPart>
void grad_block(GradRow<T> s, GradRow<T> t, int n, double tau, int64_t label) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::kWidth;
  const T scale_z = T(scale(tau));
  V grad[2];
  const auto compute = [&](V z_s, V z_t) __attribute__((always_inline)) {
    const V d[] = {z_s - s.c.max, z_t - t.c.max};
    V e[2], e_one[2];
    exp2_scaled<T, kPart == kAlone ? 1 : 2>(d, scale_z, e);
    at_one<T, kSquarings, kPart == kBoth ? 2 : 1>(d, e, e_one);
    grad[0] = e_one[0] * s.c.one;
    if constexpr (kPart != kAlone) grad[0] += e[0] * s.c.tau - e[1] * s.c.tau_t;
    if constexpr (kPart == kBoth) grad[1] = e_one[1] * t.c.one;
  };
  int i = 0;
  for (; i + W <= n; i += W) {
    compute(load(s.z + i), load(t.z + i));
    store(s.grad + i, grad[0]);
    if constexpr (kPart == kBoth) store(t.grad + i, grad[1]);
  }
  if (const int rest = n - i) {
    compute(load_rest(s.z, n, rest), load_rest(t.z, n, rest));
    store_rest<T>(s.grad + i, grad[0], rest);
    if constexpr (kPart == kBoth) store_rest<T>(t.grad + i, grad[1], rest);
  }
  if (label < 0 || label >= n) return;
  s.grad[label] -= s.c.label;
  if constexpr (kPart == kBoth) t.grad[label] -= t.c.label;
}

template <class In, class T>
MHKD_INLINE GradRow<T> block_of(const GradRow<In>& row, int start, int n, T* buffer) {
  T* grad = buffer;
  if constexpr (std::is_same_v<In, T>) grad = row.grad + start;
  return {converted(row.z + start, n, buffer), grad, row.c};
}

template <class In, int kSquarings, Part kPart>
void grad_row(const GradRow<In>& s, const GradRow<In>& t, int classes, double tau, int64_t label) {
  using T = Arithmetic<In>;
  alignas(MHKD_VECTOR_BYTES) T buffer_s[kBuffer<In>], buffer_t[kBuffer<In>];
  for (int start = 0; start < classes; start += kBlock) {
    const int n = std::min(kBlock, classes - start);
    const GradRow<T> block_s = block_of(s, start, n, buffer_s);
    const GradRow<T> block_t = kPart == kAlone ? block_s : block_of(t, start, n, buffer_t);
    grad_block<T, kSquarings, kPart>(block_s, block_t, n, tau, label - start);
    if constexpr (std::is_same_v<In, T>) continue;
    for (int i = 0; i < n; ++i) s.grad[start + i] = static_cast<In>(buffer_s[i]);
    for (int i = 0; kPart == kBoth && i < n; ++i) t.grad[start + i] = static_cast<In>(buffer_t[i]);
  }
}

template <class In, int kSquarings>
constexpr RowKernels<In> kKernels{{sum_row<In, kSquarings, false>, sum_row<In, kSquarings, true>},
    {grad_row<In, kSquarings, kStudent>, grad_row<In, kSquarings, kBoth>,
        grad_row<In, kSquarings, kAlone>}};

// Which instance computes the rows. float64 is for checks: it takes every exponential itself.
template <class In>
RowKernels<In> row_kernels(double tau) {
  if constexpr (!std::is_same_v<In, double>) {
    switch (squarings(tau)) {
      case 0: return kKernels<In, 0>;
      case 1: return kKernels<In, 1>;
      case 2: return kKernels<In, 2>;
    }
  }
  return kKernels<In, kNoSquarings>;
}

}  // namespace MHKD_ISA
}  // namespace MHKD_LIBRARY

#undef MHKD_INLINE
#undef MHKD_ISA
#undef MHKD_VECTOR_BYTES
