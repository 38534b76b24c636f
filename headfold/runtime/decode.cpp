// Attention of few query rows over long grouped keys and values: one pass over the cache, the softmax as it goes, float32 inside.
//
// A task is a stretch of the keys of one K/V head: they are read once, for all rows that share the head. The stretches of a head are
// put together at the end. Plain C++ and the vector types of GCC and clang, so it is as wide as the processor it is built for.
// `kernel.py` builds it, loads it and says what the numbers in `Problem` mean.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 16;
#else
constexpr int WIDTH = 8;
#endif
constexpr int PAIR = 2 * WIDTH;
constexpr int BLOCK = 64;  // keys at a time: with their values they fit the first caches
constexpr float LOG2_E = 1.44269504f;

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));
typedef float Eight __attribute__((vector_size(32)));
typedef int32_t EightInts __attribute__((vector_size(32)));
struct BFloat16 {
    uint16_t bits;
};

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (EightInts){__VA_ARGS__})
#endif

template <typename To, typename From>
inline To as(const From& value) {
    To out;
    static_assert(sizeof out == sizeof value, "");
    std::memcpy(&out, &value, sizeof out);
    return out;
}
template <typename To>
inline To read(const void* at) {
    To out;
    std::memcpy(&out, at, sizeof out);
    return out;
}

// PAIR numbers as two vectors. Of bfloat16 these are the ones at even and at odd places, since that costs but a shift and a mask: all of
// queries, keys, values and output pass through here, so the order cancels.
inline void load(const float* at, Vector& a, Vector& b) {
    a = read<Vector>(at);
    b = read<Vector>(at + WIDTH);
}
inline void load(const BFloat16* at, Vector& a, Vector& b) {
    const Bits both = read<Bits>(at);
    a = as<Vector>(both << 16);
    b = as<Vector>(both & 0xffff0000u);
}
inline void store(float* at, Vector a, Vector b) {
    std::memcpy(at, &a, sizeof a);
    std::memcpy(at + WIDTH, &b, sizeof b);
}
inline Bits nearest(Vector a) {
    const Bits bits = as<Bits>(a);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
}
inline void store(BFloat16* at, Vector a, Vector b) {
    const Bits both = (nearest(a) >> 16) | (nearest(b) & 0xffff0000u);
    std::memcpy(at, &both, sizeof both);
}

inline Eight folded(Vector v) {
    Eight parts[WIDTH / 8];
    std::memcpy(parts, &v, sizeof parts);
    return WIDTH == 8 ? parts[0] : parts[0] + parts[WIDTH / 8 - 1];
}
// The sum of each of eight vectors.
inline Eight sums_of(const Vector* v) {
    Eight c[4], d[2];
    for (int j = 0; j < 4; ++j) {
        const Eight x = folded(v[j]), y = folded(v[j + 4]);
        c[j] = PICK(x, y, 0, 1, 2, 3, 8, 9, 10, 11) + PICK(x, y, 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int j = 0; j < 2; ++j) {
        const Eight x = c[2 * j], y = c[2 * j + 1];
        d[j] = PICK(x, y, 0, 2, 8, 10, 4, 6, 12, 14) + PICK(x, y, 1, 3, 9, 11, 5, 7, 13, 15);
    }
    return PICK(d[0], d[1], 0, 2, 8, 10, 4, 6, 12, 14) + PICK(d[0], d[1], 1, 3, 9, 11, 5, 7, 13, 15);
}

// 2^x for x <= 0, to about 2e-7 of it; never below 2^-126, so a row that may see nothing sees all alike. NaN stays NaN.
inline Eight exp2(Eight x) {
    const Eight low = Eight{} - 126.0f;
    x = x < low ? low : x;
    const Eight shifted = x + 12582912.0f;  // 1.5 · 2^23: what is left in the last bits is the nearest integer
    const Eight f = x - (shifted - 12582912.0f);
    Eight p = 1.5403530e-4f * f + 1.3333558e-3f;  // Taylor's series of 2^f, |f| <= 1/2
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return as<Eight>(as<EightInts>(p) + (as<EightInts>(shifted) << 23));
}

template <typename T>
struct Problem {
    const T *query, *key, *value;
    const float* bias;
    T* output;
    int64_t batch, groups, rows, keys, dim, splits, threads;
    int64_t key_strides[3], value_strides[3], bias_strides[3];
    float scale;
};

// Logits of eight pairs of a key and a row, the row running fastest. Two keys at a time: more streams at once the memory does not like.
template <typename T, int ROWS>
inline Eight score(const float* query, const T* const* keys, int64_t dim) {
    constexpr int KEYS = 8 / ROWS, ONCE = std::min(KEYS, 2);
    Vector sums[8];
    for (int begin = 0; begin < KEYS; begin += ONCE) {
        Vector parts[ONCE * ROWS] = {};
        for (int64_t d = 0; d < dim; d += PAIR) {
            Vector a[ONCE], b[ONCE];
            for (int k = 0; k < ONCE; ++k) load(keys[begin + k] + d, a[k], b[k]);
            for (int r = 0; r < ROWS; ++r) {
                const Vector qa = read<Vector>(query + r * dim + d), qb = read<Vector>(query + r * dim + d + WIDTH);
                for (int k = 0; k < ONCE; ++k) {
                    parts[k * ROWS + r] += qa * a[k];
                    parts[k * ROWS + r] += qb * b[k];
                }
            }
        }
        for (int i = 0; i < ONCE * ROWS; ++i) sums[begin * ROWS + i] = parts[i];
    }
    return sums_of(sums);
}

// Adds weights · values of a block to PAIRS · PAIR columns of the output.
template <typename T, int ROWS, int PAIRS>
inline void gather(const float* weights, const T* value, int64_t stride, int64_t count, int64_t dim, float* output) {
    Vector sums[ROWS][2 * PAIRS];
    for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < 2 * PAIRS; ++i) sums[r][i] = read<Vector>(output + r * dim + i * WIDTH);
    for (int64_t k = 0; k < count; ++k) {
        Vector v[2 * PAIRS];
        for (int i = 0; i < PAIRS; ++i) load(value + k * stride + i * PAIR, v[2 * i], v[2 * i + 1]);
        for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i < 2 * PAIRS; ++i) sums[r][i] += weights[k * ROWS + r] * v[i];
    }
    for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < 2 * PAIRS; ++i) std::memcpy(output + r * dim + i * WIDTH, &sums[r][i], sizeof(Vector));
}

// Turns the logits of `count` keys into weights under the largest logit so far, and lets what came before fade accordingly.
template <int ROWS>
inline void weigh(float* scores, int64_t count, int64_t dim, float* state, float* output) {
    const int64_t end = (count * ROWS + 7) / 8 * 8;
    for (int64_t i = count * ROWS; i < end; ++i) scores[i] = -INFINITY;
    Eight tops = Eight{} - INFINITY, totals = {};
    for (int64_t i = 0; i < end; i += 8) {
        const Eight found = read<Eight>(scores + i);
        tops = tops > found ? tops : found;
    }
    float top[ROWS], fade[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        top[r] = state[2 * r];
        for (int i = r; i < 8; i += ROWS) top[r] = std::max(top[r], tops[i]);
        fade[r] = std::exp2(state[2 * r] - top[r]);
    }
    for (int i = 0; i < 8; ++i) tops[i] = top[i % ROWS];
    for (int64_t i = 0; i < end; i += 8) {
        const Eight found = exp2(read<Eight>(scores + i) - tops);
        std::memcpy(scores + i, &found, sizeof found);
    }
    for (int64_t i = count * ROWS; i < end; ++i) scores[i] = 0;
    for (int64_t i = 0; i < end; i += 8) totals += read<Eight>(scores + i);
    for (int r = 0; r < ROWS; ++r) {
        float total = 0;
        for (int i = r; i < 8; i += ROWS) total += totals[i];
        state[2 * r] = top[r];
        state[2 * r + 1] = state[2 * r + 1] * fade[r] + total;
        if (fade[r] != 1)
            for (int64_t d = 0; d < dim; ++d) output[r * dim + d] *= fade[r];
    }
}

// One block of keys for ROWS rows. `state`: largest logit and sum of weights of each row, logits in units of log 2.
template <typename T, int ROWS>
void attend(const Problem<T>& p, const float* query, const T* key, const T* value, const float* bias, int64_t count, bool first,
            float* state, float* output) {
    constexpr int KEYS = 8 / ROWS;
    const int64_t key_step = p.key_strides[2], value_step = p.value_strides[2];
    alignas(64) float scores[ROWS * BLOCK];
    for (int64_t k = 0; k < count; k += KEYS) {
        const T* keys[KEYS];
        for (int j = 0; j < KEYS; ++j) keys[j] = key + std::min(k + j, count - 1) * key_step;
        // While logits are computed the values arrive; without it the two times add up. Keys of float32 outrun the processor's guesses.
        for (int j = 0; first && j < KEYS && k + j < count; ++j)
            for (int64_t d = 0; d < p.dim; d += 64 / sizeof(T)) {
                __builtin_prefetch(value + (k + j) * value_step + d);
                if (sizeof(T) == 4) __builtin_prefetch(key + (k + j + BLOCK) * key_step + d);
            }
        const Eight found = score<T, ROWS>(query, keys, p.dim);
        std::memcpy(scores + k * ROWS, &found, sizeof found);
    }
    for (int64_t k = 0; bias && k < count; ++k)
        for (int r = 0; r < ROWS; ++r) scores[k * ROWS + r] += bias[r * p.bias_strides[2] + k] * LOG2_E;
    weigh<ROWS>(scores, count, p.dim, state, output);
    constexpr int PAIRS = 4 / ROWS;  // eight sums at once hide the latency of adding
    int64_t d = 0;
    for (; d + PAIRS * PAIR <= p.dim; d += PAIRS * PAIR)
        gather<T, ROWS, PAIRS>(scores, value + d, value_step, count, p.dim, output + d);
    for (; d < p.dim; d += PAIR) gather<T, ROWS, 1>(scores, value + d, value_step, count, p.dim, output + d);
}

template <typename T>
void stretch(const Problem<T>& p, int64_t index, float* state, float* output) {
    const int64_t head = index / p.splits, batch = head / p.groups, group = head % p.groups;
    const int64_t step = (p.keys + p.splits - 1) / p.splits, begin = index % p.splits * step;
    const int64_t end = std::min(p.keys, begin + step);
    std::vector<float> query(p.rows * p.dim);
    for (int64_t i = 0; i < p.rows * p.dim; i += PAIR) {
        Vector a, b;
        load(p.query + head * p.rows * p.dim + i, a, b);
        store(query.data() + i, a * (p.scale * LOG2_E), b * (p.scale * LOG2_E));
    }
    std::fill(output, output + p.rows * p.dim, 0.0f);
    for (int64_t r = 0; r < p.rows; ++r) {
        state[2 * r] = -1e38f;  // below every logit, and still finite when another is taken from it
        state[2 * r + 1] = 0;
    }
    for (int64_t at = begin; at < end; at += BLOCK) {
        const int64_t count = std::min<int64_t>(BLOCK, end - at);
        const T* key = p.key + batch * p.key_strides[0] + group * p.key_strides[1] + at * p.key_strides[2];
        const T* value = p.value + batch * p.value_strides[0] + group * p.value_strides[1] + at * p.value_strides[2];
        for (int64_t r = 0, width; r < p.rows; r += width) {
            const int64_t left = p.rows - r;
            const int64_t offset = batch * p.bias_strides[0] + group * p.bias_strides[1] + r * p.bias_strides[2] + at;
            const float* bias = p.bias ? p.bias + offset : nullptr;
            width = left >= 4 ? 4 : left >= 2 ? 2 : 1;
            const auto run = width == 4 ? attend<T, 4> : width == 2 ? attend<T, 2> : attend<T, 1>;
            run(p, query.data() + r * p.dim, key, value, bias, count, r == 0, state + 2 * r, output + r * p.dim);
        }
    }
}

// The output of one row from its stretches.
template <typename T>
void finish(const Problem<T>& p, int64_t head, int64_t row, const float* states, const float* outputs) {
    float top = -INFINITY, total = 0;
    const auto state = [&](int64_t s) { return states + 2 * ((head * p.splits + s) * p.rows + row); };
    for (int64_t s = 0; s < p.splits; ++s) top = std::max(top, state(s)[0]);
    for (int64_t s = 0; s < p.splits; ++s) total += state(s)[1] * std::exp2(state(s)[0] - top);
    for (int64_t d = 0; d < p.dim; d += PAIR) {
        Vector a = {}, b = {};
        for (int64_t s = 0; s < p.splits; ++s) {
            const float weight = std::exp2(state(s)[0] - top) / total;
            const float* part = outputs + ((head * p.splits + s) * p.rows + row) * p.dim + d;
            a += read<Vector>(part) * weight;
            b += read<Vector>(part + WIDTH) * weight;
        }
        store(p.output + (head * p.rows + row) * p.dim + d, a, b);
    }
}

template <typename T>
void decode(const Problem<T>& p) {
    const int64_t heads = p.batch * p.groups, tasks = heads * p.splits;
    std::vector<float> states(tasks * p.rows * 2), outputs(tasks * p.rows * p.dim);
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads)
    for (int64_t i = 0; i < tasks; ++i) stretch(p, i, states.data() + 2 * i * p.rows, outputs.data() + i * p.rows * p.dim);
    for (int64_t i = 0; i < heads * p.rows; ++i) finish(p, i / p.rows, i % p.rows, states.data(), outputs.data());
}

}  // namespace

extern "C" int headfold_width() { return PAIR; }
extern "C" void headfold_decode_bfloat16(const Problem<BFloat16>* problem) { decode(*problem); }
extern "C" void headfold_decode_float32(const Problem<float>* problem) { decode(*problem); }
