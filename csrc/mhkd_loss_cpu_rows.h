// One row of the loss and of its gradients on the CPU. mhkd_loss_cpu.cpp includes this file once for each
// instruction set, with
//     MHKD_ISA           the namespace to define everything in
//     MHKD_VECTOR_BYTES  the size of its registers
// and the compiler told which instructions it may use. Everything is written with the vector extensions of GCC and
// Clang: the same text becomes AVX-512, AVX2, SSE2 or Neon. Nothing here may be defined outside the namespace and no
// header may be included here: an inline function compiled for AVX-512 could be the copy that the linker keeps.

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
  static constexpr float kLowest = -127;                 // 2^x is 0 from here down: there are no denormals
  static constexpr float kRound = 12582912.f + 127;      // 1.5 * 2^23: x + kRound - kRound is x rounded
  static constexpr int kDegree = 6;
  // 2^f / sum c_k f^(k+1) is 1 to 2e-9 (float) and 4e-18 (double) for |f| <= 1/2, with the constant term 1 exact.
  static constexpr float kPolynomial[] = {0.693147182f,   0.240226477f,   0.0555033237f,
                                          0.00961843785f, 0.00133988762f, 0.000153533576f};
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
  static constexpr double kPolynomial[] = {
      0.69314718055994529,    0.2402265069591013,     0.055504108664820077,   0.0096181291075940704,
      0.0013333558146775451,  0.00015403530457166255, 1.525273349254206e-05,  1.3215435258230248e-06,
      1.0178199760274141e-07, 7.073787012174465e-09,  4.4347485181534646e-10};
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

// The register that ends with class n - 1, where the whole registers before it leave `rest` classes over. The lanes
// that they have had, or that lie before the row, are -inf: masked classes, which add nothing to any sum.
template <class T>
MHKD_INLINE typename Simd<T>::V load_rest(const T* from, int64_t n, int rest) {
  using S = Simd<T>;
  constexpr T kMasked = -std::numeric_limits<T>::infinity();
  if (n >= S::kWidth) {
    typename S::I lane;
    for (int i = 0; i < S::kWidth; ++i) lane[i] = i;
    return lane < S::kWidth - rest ? typename S::V{} + kMasked : load(from + n - S::kWidth);
  }
  T padded[S::kWidth];
  for (int i = 0; i < S::kWidth; ++i) padded[i] = i < S::kWidth - rest ? kMasked : from[i - (S::kWidth - rest)];
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

// e = 2^(d * scale) for d <= 0, kCount registers side by side, as each is a chain of dependent steps. What limits it is
// the number of instructions: d * scale is contracted into the two steps that use it, and Estrin's scheme, which has a
// shorter chain but one more product, is slower. The comparison is written so that NaN stays NaN; -inf gives 0.
template <class T, int kCount>
MHKD_INLINE void exp2_scaled(const typename Simd<T>::V* d, T scale, typename Simd<T>::V* e) {
  using S = Simd<T>;
  using V = typename S::V;
  const V lowest = V{} + S::kLowest / scale;
  V shifted[kCount], f[kCount];
  for (int j = 0; j < kCount; ++j) {
    const V x = lowest > d[j] ? lowest : d[j];
    shifted[j] = x * scale + S::kRound;  // its low bits hold the whole part of x * scale, plus the bias of an exponent
    f[j] = x * scale - (shifted[j] - S::kRound);
  }
  for (int j = 0; j < kCount; ++j) e[j] = S::kPolynomial[S::kDegree - 1] * f[j] + S::kPolynomial[S::kDegree - 2];
  for (int k = S::kDegree - 3; k >= 0; --k) {
    for (int j = 0; j < kCount; ++j) e[j] = e[j] * f[j] + S::kPolynomial[k];
  }
  for (int j = 0; j < kCount; ++j) {
    // A product and not an addition to the exponent's bits, which would make a number of NaN.
    e[j] = (e[j] * f[j] + T(1)) * (V)((typename S::I)shifted[j] << S::kMantissa);
  }
}

template <class T>
MHKD_INLINE double sum_lanes(typename Simd<T>::V v) {
  constexpr int W = Simd<T>::kWidth, kParts = W < 4 ? W : 4;
  T lanes[W];
  store(lanes, v);
  double parts[kParts] = {};
  for (int i = 0; i < W; i += kParts) {
    for (int j = 0; j < kParts; ++j) parts[j] += double(lanes[i + j]);
  }
  for (int j = 1; j < kParts; ++j) parts[0] += parts[j];
  return parts[0];
}

template <class T>
MHKD_INLINE T largest_lane(typename Simd<T>::V v) {
  T largest = v[0];
  for (int i = 1; i < Simd<T>::kWidth; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

template <class T>
MHKD_INLINE T largest(const T* z, int64_t n, T so_far) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::kWidth;
  V a = V{} + so_far, b = a, c = a, d = a;  // four chains hide the latency of the comparison
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    a = larger<T>(load(z + i), a);
    b = larger<T>(load(z + i + W), b);
    c = larger<T>(load(z + i + 2 * W), c);
    d = larger<T>(load(z + i + 3 * W), d);
  }
  for (; i + W <= n; i += W) a = larger<T>(load(z + i), a);
  if (i < n) b = larger<T>(load_rest(z, n, int(n - i)), b);
  return largest_lane<T>(larger<T>(larger<T>(a, b), larger<T>(c, d)));
}

// The exponentials of kCount registers of logits at both temperatures: exp(d / tau), and exp(d) from it or anew.
template <class T, int kPower>
struct Exponentials {
  using V = typename Simd<T>::V;
  T tau_scale, one_scale;  // log2(e) / tau, log2(e)
  explicit Exponentials(double tau) : tau_scale(T(kLog2E / tau)), one_scale(T(kLog2E)) {}
  static constexpr double kLog2E = 1.4426950408889634;

  template <int kCount>
  MHKD_INLINE void at_tau(const V* d, V* e) const {
    exp2_scaled<T, kCount>(d, tau_scale, e);
  }

  template <int kCount>
  MHKD_INLINE void at_one(const V* d, const V* at_tau, V* e) const {
    if constexpr (kPower == 0) {
      exp2_scaled<T, kCount>(d, one_scale, e);
    } else {
      for (int j = 0; j < kCount; ++j) {
        e[j] = at_tau[j];
        raise<kPower>(e[j]);
      }
    }
  }
};

// The sums of add_classes over some registers of classes, one for each lane.
template <class T, int kPower, bool kMarked>
struct LaneSums {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  V tau_s{}, one_s{}, tau_t{}, one_t{}, cross{}, excess{};

  MHKD_INLINE void add(V d_s, V d_t, V zero, const Exponentials<T, kPower>& exponentials) {
    const V d[] = {d_s, d_t};
    V at_tau[2], at_one[2];
    exponentials.template at_tau<2>(d, at_tau);
    exponentials.template at_one<kMarked ? 2 : 1>(d, at_tau, at_one);
    tau_s += at_tau[0];
    one_s += at_one[0];
    tau_t += at_tau[1];
    excess += at_tau[0] - at_tau[1];
    if constexpr (kMarked) one_t += at_one[1];
    // Where the teacher's probability is 0 the difference may be infinite or NaN: its bits are cleared.
    cross += at_tau[1] * (V)((I)(d_t - d_s) & (I)(at_tau[1] > zero));
  }

  MHKD_INLINE void add(const LaneSums& other) {
    tau_s += other.tau_s;
    one_s += other.one_s;
    tau_t += other.tau_t;
    one_t += other.one_t;
    cross += other.cross;
    excess += other.excess;
  }
};

// Asks for the next block of a row while a run of the current one is computed: the search for the next block's largest
// logit would wait for memory with nothing else to do. Behind the last row this asks for nothing real: harmless.
template <class T>
MHKD_INLINE void prefetch_run(const T* run) {
  constexpr int kLine = 64;
  const char* bytes = reinterpret_cast<const char*>(run + kBlock);
  for (int i = 0; i < kRun * MHKD_VECTOR_BYTES; i += kLine) __builtin_prefetch(bytes + i);
}

// Adds n classes to the sums of their row. sums.max_* are already no smaller than any of these logits. Each lane adds
// up a run of kRun registers, then the runs: tau^2 multiplies what long chains of float32 additions would round off.
template <class T, int kPower, bool kMarked>
void add_classes(const T* s, const T* t, int64_t n, const Settings& settings, RowSums<double>& sums) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::kWidth;
  const Exponentials<T, kPower> exponentials(settings.tau);
  const T max_s = T(sums.max_s), max_t = T(sums.max_t);
  // Nothing between 0 and the smallest normal number is left of an exponential in float32, and a comparison with a
  // denormal number may be slow.
  const V zero = V{} + (sizeof(T) == sizeof(double) ? T(settings.zero) : T(0));
  const int rest = int(n % W);
  const int64_t whole = n - rest;
  LaneSums<T, kPower, kMarked> lanes;
  for (int64_t i = 0; i < whole;) {
    const int64_t end = std::min(whole, i + kRun * W);
    prefetch_run(s + i);
    prefetch_run(t + i);
    LaneSums<T, kPower, kMarked> run;
    for (; i < end; i += W) run.add(load(s + i) - max_s, load(t + i) - max_t, zero, exponentials);
    lanes.add(run);
  }
  if (rest != 0) lanes.add(load_rest(s, n, rest) - max_s, load_rest(t, n, rest) - max_t, zero, exponentials);
  // Of log(tau_s / tau_t) little is left where the student is close to its teacher. There tau_s is written as tau_t
  // plus the sum of the differences, so that the rounding errors of both sums are the same and cancel.
  const double tau_t = sum_lanes<T>(lanes.tau_t), excess = sum_lanes<T>(lanes.excess);
  sums.tau_s += std::abs(excess) < tau_t / 2 ? tau_t + excess : sum_lanes<T>(lanes.tau_s);
  sums.tau_t += tau_t;
  sums.one_s += sum_lanes<T>(lanes.one_s);
  if (kMarked) sums.one_t += sum_lanes<T>(lanes.one_t);
  sums.cross += sum_lanes<T>(lanes.cross);
}

// The gradients of one register of classes. A template argument says what is asked for.
template <class T, int kPower, bool kStudent, bool kKl, bool kTeacher>
MHKD_INLINE void grad_register(typename Simd<T>::V d_s, typename Simd<T>::V d_t, const GradCoefficients<T>& c,
                               const Exponentials<T, kPower>& exponentials, typename Simd<T>::V& grad_s,
                               typename Simd<T>::V& grad_t) {
  using V = typename Simd<T>::V;
  // What is not asked for comes last and is left out.
  constexpr int kT = kStudent ? 1 : 0, kTau = kT + (kKl || kTeacher), kOne = kT + kTeacher;
  const V d[] = {kStudent ? d_s : d_t, d_t};
  V at_tau[2], at_one[2];
  exponentials.template at_tau<kTau>(d, at_tau);
  exponentials.template at_one<kOne>(d, at_tau, at_one);
  if constexpr (kTeacher) grad_t = at_one[kT] * c.one_t;
  if constexpr (kStudent) grad_s = at_one[0] * c.one_s;
  if constexpr (kStudent && kKl) grad_s += at_tau[0] * c.tau_s - at_tau[kT] * c.tau_t;
}

// n gradients of a row; grad_s and grad_t may be where s and t are.
template <class T, int kPower, bool kStudent, bool kKl, bool kTeacher>
void grad_classes(const T* s, const T* t, int64_t n, double tau, const T* stats, const GradCoefficients<T>& of_row,
                  T* grad_s, T* grad_t) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::kWidth;
  constexpr bool kReadsTeacher = kKl || kTeacher;
  const Exponentials<T, kPower> exponentials(tau);
  const GradCoefficients<T> c = of_row;  // a copy of its own: what is written cannot change it
  const T max_s = stats[kMaxS], max_t = stats[kMaxT];
  const int rest = int(n % W);
  // The last register overlaps the one before it. It is read first, as the gradients may overwrite the logits.
  V last_s{}, last_t{}, d_s{}, d_t{}, g_s{}, g_t{};
  if (rest != 0) {
    if constexpr (kStudent) last_s = load_rest(s, n, rest) - max_s;
    if constexpr (kReadsTeacher) last_t = load_rest(t, n, rest) - max_t;
  }
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    if constexpr (kStudent) d_s = load(s + i) - max_s;
    if constexpr (kReadsTeacher) d_t = load(t + i) - max_t;
    grad_register<T, kPower, kStudent, kKl, kTeacher>(d_s, d_t, c, exponentials, g_s, g_t);
    if constexpr (kStudent) store(grad_s + i, g_s);
    if constexpr (kTeacher) store(grad_t + i, g_t);
  }
  if (rest == 0) return;
  grad_register<T, kPower, kStudent, kKl, kTeacher>(last_s, last_t, c, exponentials, g_s, g_t);
  if constexpr (kStudent) store_rest<T>(grad_s + i, g_s, rest);
  if constexpr (kTeacher) store_rest<T>(grad_t + i, g_t, rest);
}

// A block of a row as T: where it lies if it is T already, else converted into the buffer.
template <class T>
const T* as_arithmetic(const Row& row, int64_t start, int64_t n, T* buffer) {
  const auto convert = [&](auto* z) -> const T* {
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(z[start + i]);
    return buffer;
  };
  if (row.dtype == c10::CppTypeToScalarType<T>::value) return static_cast<const T*>(row.data) + start;
  switch (row.dtype) {
    case at::kDouble: return convert(static_cast<const double*>(row.data));
    case at::kFloat: return convert(static_cast<const float*>(row.data));
    case at::kHalf: return convert(static_cast<const c10::Half*>(row.data));
    default: return convert(static_cast<const c10::BFloat16*>(row.data));
  }
}

// Where a block of gradients is computed: in place if the gradient's dtype is T, else in the buffer.
template <class T>
T* gradient_block(const Row& row, int64_t start, T* buffer) {
  return row.dtype == c10::CppTypeToScalarType<T>::value ? static_cast<T*>(row.data) + start : buffer;
}

template <class T>
void write_gradient(const Row& row, int64_t start, int64_t n, const T* block) {
  const auto convert = [&](auto* grad) {
    using To = std::remove_reference_t<decltype(*grad)>;
    for (int64_t i = 0; i < n; ++i) grad[start + i] = static_cast<To>(block[i]);
  };
  if (row.dtype == c10::CppTypeToScalarType<T>::value) return;
  switch (row.dtype) {
    case at::kDouble: return convert(static_cast<double*>(row.data));
    case at::kFloat: return convert(static_cast<float*>(row.data));
    case at::kHalf: return convert(static_cast<c10::Half*>(row.data));
    default: return convert(static_cast<c10::BFloat16*>(row.data));
  }
}

template <class T, int kPower>
RowSums<double> sum_row(const Row& s, const Row& t, const Settings& settings, bool marked) {
  T buffer_s[kBlock], buffer_t[kBlock];
  constexpr double lowest = std::numeric_limits<T>::lowest();
  RowSums<double> sums{lowest, lowest};
  for (int64_t start = 0; start < settings.classes; start += kBlock) {
    const int64_t n = std::min(kBlock, settings.classes - start);
    const T* block_s = as_arithmetic(s, start, n, buffer_s);
    const T* block_t = as_arithmetic(t, start, n, buffer_t);
    const T max_s = largest(block_s, n, T(sums.max_s)), max_t = largest(block_t, n, T(sums.max_t));
    if (start == 0) {
      sums = {max_s, max_t};  // nothing to rescale: most rows are one block and save the four exponentials
    } else if (max_s > sums.max_s || max_t > sums.max_t) {
      rebase<double>(sums, max_s, max_t, settings.tau, settings.zero);
    }
    (marked ? add_classes<T, kPower, true> : add_classes<T, kPower, false>)(block_s, block_t, n, settings, sums);
  }
  return sums;
}

template <class T, int kPower>
void forward_row(const Row& s, const Row& t, const Settings& settings, int64_t label, bool marked, void* stats,
                 double* terms) {
  double logit_s, logit_t;
  logit_s = *as_arithmetic(s, label, 1, &logit_s);
  logit_t = *as_arithmetic(t, label, 1, &logit_t);
  const RowSums<double> sums = sum_row<T, kPower>(s, t, settings, marked);
  finish_row(sums, logit_s, logit_t, settings.tau, marked, static_cast<T*>(stats), terms);
  if (sizeof(T) < sizeof(double) && terms[kKl] < kClose * settings.tau * settings.tau) {
    const RowSums<double> exact = sum_row<double, 0>(s, t, settings, marked);
    finish_row(exact, logit_s, logit_t, settings.tau, marked, static_cast<T*>(stats), terms);
  }
}

template <class T, int kPower>
void backward_row(const Row& s, const Row& t, const Settings& settings, int64_t label, const void* row_stats,
                  const HeadGradient& head, const Row& grad_s, const Row& grad_t) {
  T buffer_s[kBlock], buffer_t[kBlock];
  const T* stats = static_cast<const T*>(row_stats);
  const GradCoefficients<T> c = grad_coefficients(stats, head.kl, head.ce, head.ce_teacher, settings.tau);
  const bool student = grad_s.data != nullptr, teacher = grad_t.data != nullptr;
  auto* classes = grad_classes<T, kPower, true, true, false>;
  if (student && !teacher && !c.with_kl) classes = grad_classes<T, kPower, true, false, false>;
  if (student && teacher && c.with_kl) classes = grad_classes<T, kPower, true, true, true>;
  if (student && teacher && !c.with_kl) classes = grad_classes<T, kPower, true, false, true>;
  if (!student) classes = grad_classes<T, kPower, false, false, true>;
  const bool reads_teacher = teacher || c.with_kl;
  for (int64_t start = 0; start < settings.classes; start += kBlock) {
    const int64_t n = std::min(kBlock, settings.classes - start);
    const T* block_s = student ? as_arithmetic(s, start, n, buffer_s) : nullptr;
    const T* block_t = reads_teacher ? as_arithmetic(t, start, n, buffer_t) : nullptr;
    T* out_s = student ? gradient_block(grad_s, start, buffer_s) : nullptr;
    T* out_t = teacher ? gradient_block(grad_t, start, buffer_t) : nullptr;
    classes(block_s, block_t, n, settings.tau, stats, c, out_s, out_t);
    if (label >= start && label < start + n) {
      if (student) out_s[label - start] -= c.label_s;
      if (teacher) out_t[label - start] -= c.label_t;
    }
    if (student) write_gradient(grad_s, start, n, out_s);
    if (teacher) write_gradient(grad_t, start, n, out_t);
  }
}

// Which instance computes the rows. float64 is for short rows and for checks: it takes every exponential itself.
inline RowKernels row_kernels(bool float64, double tau) {
  if (float64) return {forward_row<double, 0>, backward_row<double, 0>};
  switch (integer_power(tau)) {
    case 1: return {forward_row<float, 1>, backward_row<float, 1>};
    case 2: return {forward_row<float, 2>, backward_row<float, 2>};
    case 3: return {forward_row<float, 3>, backward_row<float, 3>};
    case 4: return {forward_row<float, 4>, backward_row<float, 4>};
    case 5: return {forward_row<float, 5>, backward_row<float, 5>};
    default: return {forward_row<float, 0>, backward_row<float, 0>};
  }
}

}  // namespace MHKD_ISA
}  // namespace MHKD_LIBRARY
