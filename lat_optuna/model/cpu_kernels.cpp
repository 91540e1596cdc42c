// Attention on a CPU. Of a layer that drops: votes, the choice of rows without a sort, and the context of these rows.
// Vectors are GCC's and Clang's own; how wide they are, the processor says.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <omp.h>
#include <optional>
#include <tuple>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define TILES
#endif

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, ROWS = 6, COLUMNS = 4, LINES = 12;
#else
constexpr int LANES = 8, ROWS = 4, COLUMNS = 2, LINES = 4;
#endif
constexpr int STEP = 32;  // keys are filled up to a multiple of it
constexpr int64_t MOST = 1 << 24;  // bytes of weights that are kept, for each thread
constexpr float LOWEST = -std::numeric_limits<float>::max(), NOTHING = -std::numeric_limits<float>::infinity();
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t bf16;

struct Strides {
    int64_t example, head, row, column;
};

// Numbers from the start of a line of the cache on: what crosses lines takes twice as long, tiles above all.
template <typename Number> struct Buffer {
    Number *const start;
    explicit Buffer(int64_t many)
        : start(static_cast<Number *>(std::aligned_alloc(64, (many * sizeof(Number) / 64 + 1) * 64))) {
        if (!start) throw std::bad_alloc();
    }
    Buffer(int64_t many, Number value) : Buffer(many) { std::fill_n(start, many, value); }
    Buffer(const Buffer &) = delete;
    ~Buffer() { std::free(start); }
    operator Number *() const { return start; }
};

// Room for so many numbers, the same from call to call of a thread: to get pages anew, and jemalloc gets new ones for
// every 8 MB, takes longer than to fill them.
template <typename Number> Number *room(int64_t many) {
    static thread_local std::unique_ptr<Buffer<Number>> kept;
    static thread_local int64_t size = 0;
    if (many > size) {
        kept.reset();
        kept = std::make_unique<Buffer<Number>>(many);
        size = many;
    }
    return *kept;
}

// Vectors from and to anywhere.
inline floats at(const float *from) {
    floats values;
    std::memcpy(&values, from, sizeof(values));
    return values;
}
inline void put(float *to, floats values) { std::memcpy(to, &values, sizeof(values)); }
inline floats larger(floats a, floats b) { return a > b ? a : b; }
inline float number(float value) { return value; }
inline float number(bf16 bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// A column of a matrix: 4 bytes of as many rows as there are, which lie `apart` bytes.
inline ints column(const void *from, int64_t apart, int64_t rows) {
    ints found{};
#ifdef __AVX512F__
    const ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, at = lanes * static_cast<int32_t>(apart);
    const __mmask16 there = rows < LANES ? (1 << rows) - 1 : 0xffff;
    found = reinterpret_cast<ints>(_mm512_mask_i32gather_epi32(reinterpret_cast<__m512i>(found), there,
                                                              reinterpret_cast<__m512i>(at), from, 1));
#else
    for (int row = 0; row < std::min<int64_t>(rows, LANES); row++) {
        int32_t number;
        std::memcpy(&number, static_cast<const char *>(from) + row * apart, 4);
        found[row] = number;
    }
#endif
    return found;
}

inline float highest(floats of) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps(reinterpret_cast<__m512>(of));
#else
    float most = of[0];
    for (int lane = 1; lane < LANES; lane++) most = std::max(most, of[lane]);
    return most;
#endif
}
inline float sum_of(floats of) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps(reinterpret_cast<__m512>(of));
#else
    float sum = 0.0f;
    for (int lane = 0; lane < LANES; lane++) sum += of[lane];
    return sum;
#endif
}

inline void put(bf16 *to, floats values) {  // rounds to the nearest, and to the even one of two
#ifdef __AVX512BF16__
    const __m256bh narrow = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(values));
    std::memcpy(to, &narrow, sizeof(narrow));
#else
    for (int lane = 0; lane < LANES; lane++) {
        const float value = values[lane];
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        to[lane] = value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
    }
#endif
}
// The first numbers of a row.
template <typename Value> inline void put(Value *to, const float *from, int64_t many, float share) {
    int64_t d = 0;
    for (; d + LANES <= many; d += LANES) put(to + d, at(from + d) * share);
    if (d == many) return;
    float last[LANES] = {};
    Value narrow[LANES];
    std::copy(from + d, from + many, last);
    put(narrow, at(last) * share);
    std::copy(narrow, narrow + many - d, to + d);
}

// 2 to the power of x <= 0 with a relative error of 2e-7; a power below the smallest normal number is zero.
inline floats power_of_two(floats x) {
    const float round = 12582912.0f + 127.0f;  // 1.5 * 2^23 leaves whole numbers, in the lowest bits; 127 is 2^0
    x = larger(x, floats{} - 127.0f);
    const floats whole = x + round, rest = x - (whole - round);
    floats value = rest * 0.0013266970f + 0.0096754599f;  // a polynomial fitted to 2^rest on -0.5 to 0.5
    value = value * rest + 0.0555074252f;
    value = value * rest + 0.2402212173f;
    value = value * rest + 0.6931469440f;
    value = value * rest + 1.0000001f;
    return value * reinterpret_cast<floats>(reinterpret_cast<ints>(whole) << 23);
}

// Numbers one by one, and in pairs: how many an instruction multiplies for every sum, and how it does.
struct Singles {
    typedef float Number;
    static constexpr int MANY = 1;
    static floats add(floats sum, const float *one, const float *others) { return sum + *one * at(others); }
};
#ifdef __AVX512BF16__
struct Twos {
    typedef bf16 Number;
    static constexpr int MANY = 2;
    static floats add(floats sum, const bf16 *one, const bf16 *others) {
        int32_t both;
        std::memcpy(&both, one, 4);
        const __m512bh pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(both)),
                       pairs = reinterpret_cast<__m512bh>(_mm512_loadu_si512(others));
        return reinterpret_cast<floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), pair, pairs));
    }
};
#endif

// Products of a group of queries with all keys, and of a group of weights with all values, by vectors.
template <typename Unit, typename Number = typename Unit::Number> struct Vectors {
    static constexpr int GROUP = ROWS, TAKEN = LINES;

    static void multiply(const Number *const *rows, int many, int64_t size, const Number *keys, int64_t wide,
                         float *scores) {
        int64_t j = 0;
        for (; j + LANES * COLUMNS <= wide; j += LANES * COLUMNS)
            block<GROUP, COLUMNS>(rows, many, size, keys + j * Unit::MANY, wide, scores + j);
        if (j < wide) block<GROUP, COLUMNS / 2>(rows, many, size, keys + j * Unit::MANY, wide, scores + j);
    }

    static void weigh(const Number *const *rows, int many, int64_t n, const Number *values, int64_t padded,
                      float *sums) {
        for (int64_t d = 0; d < padded; d += 2 * LANES)
            block<TAKEN, 2>(rows, many, n, values + d * Unit::MANY, padded, sums + d);
    }

    // Of so many rows by so many vectors, which stays in registers; rows that there are not are the first one.
    template <int HIGH, int BROAD>
    static void block(const Number *const *rows, int many, int64_t length, const Number *others, int64_t apart,
                      float *to) {
        const Number *row[HIGH];
        for (int r = 0; r < HIGH; r++) row[r] = rows[r < many ? r : 0];
        floats sum[HIGH][BROAD] = {};
        for (int64_t i = 0; i < length; i += Unit::MANY, others += Unit::MANY * apart)
            for (int r = 0; r < HIGH; r++)
                for (int c = 0; c < BROAD; c++)
                    sum[r][c] = Unit::add(sum[r][c], row[r] + i, others + c * LANES * Unit::MANY);
        for (int r = 0; r < HIGH; r++)
            for (int c = 0; c < BROAD; c++) put(to + r * apart + c * LANES, sum[r][c]);
    }
};

// The products in fp32.
template <typename Number> struct ByVectors : Vectors<Singles> {
    typedef Number Value;
    typedef float Weight;
    const int64_t size, wide, padded;
    Buffer<float> keys, queries, values, sums;

    ByVectors(int64_t size, int64_t wide)
        : size(size), wide(wide), padded((size + 2 * LANES - 1) / (2 * LANES) * 2 * LANES), keys(size * wide, 0),
          queries(GROUP * size, 0), values(wide * padded, 0), sums(TAKEN * padded) {}

    void lay_out(const Number *key, int64_t apart, int64_t n) {
        for (int64_t j = 0; j < n; j += LANES)
            for (int64_t d = 0; d < size; d++)
                if constexpr (std::is_same_v<Number, float>)
                    put(&keys[d * wide + j], reinterpret_cast<floats>(column(key + j * apart + d, apart * 4, n - j)));
                else
                    for (int64_t i = j; i < std::min(n, j + LANES); i++)
                        keys[d * wide + i] = number(key[i * apart + d]);
    }

    void forget(int64_t j) {
        for (int64_t d = 0; d < size; d++) keys[d * wide + j] = 0.0f;
    }

    void multiply(const Number *const *rows, int many, int64_t, float *scores) {
        const float *group[GROUP];
        for (int r = 0; r < many; r++)
            if constexpr (std::is_same_v<Number, float>)
                group[r] = rows[r];
            else {
                group[r] = &queries[r * size];
                for (int64_t d = 0; d < size; d++) queries[r * size + d] = number(rows[r][d]);
            }
        Vectors::multiply(group, many, size, keys, wide, scores);
    }

    void lay_out_values(const Number *value, int64_t apart, int64_t n) {
        for (int64_t j = 0; j < n; j++)
            for (int64_t d = 0; d < size; d++) values[j * padded + d] = number(value[j * apart + d]);
    }

    // Rows of `sums`, of as many keys.
    void weigh(const float *const *rows, int many, int64_t n) {
        Vectors::weigh(rows, many, n, values, padded, sums);
    }
};

#ifdef __AVX512BF16__
// Keys and values in bf16: two numbers that are multiplied by one instruction lie together.
struct Pairs {
    typedef bf16 Value;
    typedef bf16 Weight;
    const int64_t size, wide, padded;
    Buffer<bf16> keys, values;
    Buffer<float> sums;

    Pairs(int64_t size, int64_t wide, int taken)
        : size(size), wide(wide), padded((size + 31) / 32 * 32), keys(padded * wide, 0), values(wide * padded, 0),
          sums(taken * padded) {}

    void lay_out(const bf16 *key, int64_t apart, int64_t n) {
        for (int64_t j = 0; j < n; j += LANES)
            for (int64_t d = 0; d < size; d += 2) {
                const ints pairs = column(key + j * apart + d, apart * 2, n - j);
                std::memcpy(&keys[d * wide + j * 2], &pairs, 64);
            }
    }

    void forget(int64_t j) {
        for (int64_t d = 0; d < size; d += 2) std::memset(&keys[d * wide + j * 2], 0, 4);
    }

    void lay_out_values(const bf16 *value, int64_t apart, int64_t n) {
        const Buffer<bf16> none(size, 0);
        for (int64_t j = 0; j < n; j += 2) {
            const bf16 *even = value + j * apart, *odd = j + 1 < n ? even + apart : none;
            uint32_t *pairs = reinterpret_cast<uint32_t *>(&values[j * padded]);
            for (int64_t d = 0; d < size; d++) pairs[d] = even[d] | static_cast<uint32_t>(odd[d]) << 16;
        }
    }
};

// The products of bf16 by vectors of pairs.
struct ByPairs : Pairs, Vectors<Twos> {
    ByPairs(int64_t size, int64_t wide) : Pairs(size, wide, TAKEN) {}

    void multiply(const bf16 *const *rows, int many, int64_t, float *scores) {
        Vectors::multiply(rows, many, size, keys, wide, scores);
    }

    void weigh(const bf16 *const *rows, int many, int64_t n) { Vectors::weigh(rows, many, n, values, padded, sums); }
};
#endif

#ifdef TILES
// The same by AMX: 16 x 16 scores of 32 numbers an instruction.
struct ByTiles : Pairs {
    static constexpr int GROUP = 16, TAKEN = 32;
    struct alignas(64) Shapes {
        uint8_t palette = 1, start = 0, unused[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } before;
    Buffer<bf16> queries, lines;

    ByTiles(int64_t size, int64_t wide)
        : Pairs(size, wide, TAKEN), queries(GROUP * padded, 0), lines(TAKEN * wide, 0) {
        // Not the compiler's functions: GCC's say that they read and write 8 of the 64 bytes.
        const Shapes ours;
        asm volatile("sttilecfg %0" : "=m"(before));
        asm volatile("ldtilecfg %0" : : "m"(ours));
    }
    ~ByTiles() {
        if (before.palette) asm volatile("ldtilecfg %0" : : "m"(before));
        else _tile_release();
    }

    // Linux wants to be asked once whether a process may use tiles.
    static bool allowed() {
        static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
        return granted;
    }

    // A group of rows that lie `apart`, if that is not 0, is read where it is.
    void multiply(const bf16 *const *rows, int many, int64_t apart, float *scores) {
        const bf16 *group = rows[0];
        if (!apart || many < GROUP || size < padded) {
            for (int r = 0; r < many; r++) std::copy(rows[r], rows[r] + size, &queries[r * padded]);
            group = queries;
            apart = padded;
        }
        for (int64_t j = 0; j < wide; j += 32) {
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t d = 0; d < padded; d += 32) {
                const bf16 *block = &keys[d * wide + j * 2];
                _tile_loadd(4, group + d, apart * 2);
                _tile_loadd(5, block, wide * 4);
                _tile_dpbf16ps(0, 4, 5);
                _tile_loadd(6, block + 32, wide * 4);
                _tile_dpbf16ps(1, 4, 6);
            }
            _tile_stored(0, scores + j, wide * 4);
            _tile_stored(1, scores + j + 16, wide * 4);
        }
    }

    void weigh(const bf16 *const *rows, int many, int64_t) {
        for (int r = 0; r < many; r++)
            for (int64_t j = 0; j < wide; j += 32) std::memcpy(&lines[r * wide + j], rows[r] + j, 64);
        for (int64_t d = 0; d < padded; d += 32) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t j = 0; j < wide; j += 32) {
                const bf16 *block = &values[j * padded + d * 2];
                _tile_loadd(6, block, padded * 4);
                _tile_loadd(7, block + 32, padded * 4);
                _tile_loadd(4, &lines[j], wide * 2);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, &lines[16 * wide + j], wide * 2);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, &sums[d], padded * 4);
            _tile_stored(1, &sums[d + 16], padded * 4);
            _tile_stored(2, &sums[16 * padded + d], padded * 4);
            _tile_stored(3, &sums[16 * padded + d + 16], padded * 4);
        }
    }
};
#endif

// A layer's projections; see kernels.py. Numbers of a query, of a key and of a value lie side by side.
template <typename Value> struct Layer {
    const Value *query, *key, *value;
    const uint8_t *allowed, *real;
    int64_t batch, heads, n, size;
    float scale;  // in units of log 2
    Strides of_query, of_key, of_value, of_allowed;
};

// What one head of one example computes.
template <typename Product> struct Head {
    typedef typename Product::Value Value;
    typedef typename Product::Weight Weight;
    static constexpr int GROUP = Product::GROUP, TAKEN = Product::TAKEN;
    static_assert(TAKEN % GROUP == 0);
    const Layer<Value> &of;
    const int64_t n, wide;
    Product product;
    Buffer<float> scratch, start;
    Buffer<Weight> again;
    const Value *queries = nullptr;
    const uint8_t *may = nullptr;
    bool by_query = false;

    Head(const Layer<Value> &of, int64_t wide)
        : of(of), n(of.n), wide(wide), product(of.size, wide), scratch(GROUP * wide), start(wide, NOTHING),
          again(TAKEN * wide) {}

    // Keys of a head, and which of them may be looked at.
    void look_at(int64_t example, int64_t head) {
        queries = of.query + example * of.of_query.example + head * of.of_query.head;
        may = of.allowed ? of.allowed + example * of.of_allowed.example + head * of.of_allowed.head : nullptr;
        by_query = may && of.of_allowed.row;
        product.lay_out(of.key + example * of.of_key.example + head * of.of_key.head, of.of_key.row, n);
        for (int64_t j = 0; j < n; j++) {
            const bool refused = may && !by_query && !may[j * of.of_allowed.column];
            start[j] = refused ? LOWEST : 0.0f;
            if (refused) product.forget(j);
        }
    }

    // Powers of two of the scores of a group of queries, and one over their sums. Returns where the powers are, in rows
    // of `wide`; in the type of weights they are in `weights`, too, unless it is null.
    const float *powers(const int64_t *lines, int many, Weight *weights, float *share) {
        const bool neighbours = lines[many - 1] - lines[0] == many - 1;
        const Value *rows[GROUP];
        for (int r = 0; r < many; r++) rows[r] = queries + lines[r] * of.of_query.row;
        float *scores = scratch;
        if constexpr (std::is_same_v<Weight, float>) scores = weights ? weights : scores;
        product.multiply(rows, many, neighbours ? of.of_query.row : 0, scores);

        // Two passes, each over all rows: one row's would wait for what its lanes have in common.
        const float scale = of.scale;
        float top[GROUP];
        for (int r = 0; r < many; r++) {
            float *row = scores + r * wide;
            if (by_query)
                for (int64_t j = 0; j < n; j++) {
                    const bool seen = may[lines[r] * of.of_allowed.row + j * of.of_allowed.column];
                    start[j] = seen ? 0.0f : LOWEST;
                    row[j] = seen ? row[j] : 0.0f;
                }
            floats most = floats{} + NOTHING;
            for (int64_t j = 0; j < wide; j += LANES) {
                const floats score = at(row + j) * scale + at(&start[j]);
                put(row + j, score);
                most = larger(most, score);
            }
            top[r] = highest(most);
        }
        for (int r = 0; r < many; r++) {
            float *row = scores + r * wide;
            floats total{};
            for (int64_t j = 0; j < wide; j += LANES) {
                const floats power = power_of_two(at(row + j) - top[r]);
                put(row + j, power);
                total += power;
                if constexpr (!std::is_same_v<Weight, float>)
                    if (weights) put(weights + r * wide + j, power);
            }
            share[r] = 1.0f / sum_of(total);
        }
        return scores;
    }

    // What every key receives from the queries that vote. Of these, in their order, `powers` are kept in `weights`
    // (rows for as many as keys and GROUP more) and `shares`, unless they are null.
    void vote(int64_t example, int64_t head, float *votes, Weight *weights, float *shares) {
        const uint8_t *voting = of.real ? of.real + example * n : nullptr;
        look_at(example, head);
        std::fill(votes, votes + wide, 0.0f);
        for (int64_t next = 0;;) {
            int64_t lines[GROUP];
            int many = 0;
            for (; next < n && many < GROUP; next++)
                if (!voting || voting[next]) lines[many++] = next;
            if (!many) break;
            float share[GROUP];
            const float *found = powers(lines, many, weights, share);
            for (int64_t j = 0; j < wide; j += LANES) {
                floats more = at(votes + j);
                for (int r = 0; r < many; r++) more += share[r] * at(found + r * wide + j);
                put(votes + j, more);
            }
            if (weights) {
                std::copy(share, share + many, shares);
                weights += many * wide;
                shares += many;
            }
        }
    }

    // The context of the rows that stay: of those that voted. `places` tells the how manieth to vote each was, and is
    // below zero for the others. Without `weights` from the vote, these are found again.
    void attend(int64_t example, int64_t head, const int64_t *kept, const int64_t *places, int64_t width,
                const Weight *weights, const float *shares, Value *context, int64_t stride) {
        if (!weights) look_at(example, head);
        product.lay_out_values(of.value + example * of.of_value.example + head * of.of_value.head, of.of_value.row, n);
        for (int64_t next = 0; next < width;) {
            int64_t taken[TAKEN], lines[TAKEN];
            const Weight *rows[TAKEN];
            float share[TAKEN];
            int many = 0;
            for (; next < width && many < TAKEN; next++) {
                if (places[next] < 0) {
                    std::fill_n(context + next * stride, of.size, Value{});
                    continue;
                }
                rows[many] = weights ? weights + places[next] * wide : again + many * wide;
                if (weights) share[many] = shares[places[next]];
                lines[many] = kept[next];
                taken[many++] = next;
            }
            if (!weights)
                for (int r = 0; r < many; r += GROUP)
                    powers(lines + r, std::min(GROUP, many - r), again + r * wide, share + r);
            if (many) product.weigh(rows, many, n);
            for (int r = 0; r < many; r++)
                put(context + taken[r] * stride, product.sums + r * product.padded, of.size, share[r]);
        }
    }
};

int64_t filled(int64_t n) { return (n + STEP - 1) / STEP * STEP; }

// All heads of all examples: what every key receives. `out`: (batch, heads, n).
template <typename Product>
void receive(const Layer<typename Product::Value> &of, float *out) {
    const int64_t wide = filled(of.n);
    // As many threads as torch has: another number would end threads and begin them again.
#pragma omp parallel
    {
        Head<Product> own(of, wide);
        Buffer<float> votes(wide);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < of.batch * of.heads; task++) {
            own.vote(task / of.heads, task % of.heads, votes, nullptr, nullptr);
            std::copy(votes.start, votes.start + of.n, out + task * of.n);
        }
    }
}

// The rows that stay, example by example, in their order; see kernels.choose.
struct Chooser {
    const uint8_t *real;
    const int64_t *counts, *positions;
    int64_t *to_rows, *to_positions;
    uint8_t *to_real;
    int64_t *to_flat, n, width, guarded, tokens;

    void operator()(int64_t example, const float *votes, int32_t *order) const {
        int64_t seen = 0;
        for (int64_t j = 0; j < n; j++) {
            // Integers in the order of the votes. As in a sort, zeros are equal, and what is no number comes first.
            const bool counted = !real || real[example * n + j];
            float vote = counted ? votes[j] : NOTHING;
            if (counted && seen++ < guarded) vote = -NOTHING;
            vote += 0.0f;
            int32_t bits;
            std::memcpy(&bits, &vote, 4);
            order[j] = std::isnan(vote) ? 0x7fffffff : bits ^ ((bits >> 31) & 0x7fffffff);
        }
        const int64_t count = counts ? std::clamp<int64_t>(counts[example], 1, width) : width;
        // The vote of the last row that stays, bit by bit, by counting those that are no lower.
        const auto at_least = [&](int32_t vote) {
            int32_t found = 0;
            for (int64_t j = 0; j < n; j++) found += order[j] >= vote;
            return found;
        };
        int32_t cut = at_least(0) >= count ? 0 : std::numeric_limits<int32_t>::min();
        for (int32_t bit = 1 << 30; bit; bit >>= 1)
            if (at_least(cut + bit) >= count) cut += bit;
        int64_t level = count;  // of the votes that are as high as it, so many stay, the first ones
        for (int64_t j = 0; j < n; j++) level -= order[j] > cut;
        int64_t place = example * width;
        const auto write = [&](int64_t row, int64_t position, bool is_real) {
            to_rows[place] = row;
            to_positions[place] = position;
            to_real[place] = is_real;
            to_flat[place++] = example * n + row;
        };
        for (int64_t j = 0; j < n; j++)
            if (order[j] > cut || (order[j] == cut && level-- > 0))
                write(j, positions ? positions[example * n + j] : j, true);
        while (place < (example + 1) * width) write(n - 1, tokens, false);
    }
};

// Votes, choice and context, of so many examples at a time that no thread is idle for long. What votes were made of is
// kept for the context while it stays in a core's own cache; more of it is faster made again.
template <typename Product>
void attend(const Layer<typename Product::Value> &of, const Chooser &choose, typename Product::Value *context) {
    typedef typename Product::Weight Weight;
    const int64_t n = of.n, heads = of.heads, width = choose.width, wide = filled(n), threads = omp_get_max_threads(),
                  together = std::min(of.batch, (4 * threads + heads - 1) / heads),
                  of_head = (n + Product::GROUP) * wide;
    const bool keeps = together * heads * of_head * int64_t{sizeof(Weight)} <= threads * MOST;
    Weight *const weights = keeps ? room<Weight>(together * heads * of_head) : nullptr;
    Buffer<float> votes(together * heads * wide), shares(together * heads * n);
    Buffer<int64_t> places(together * width);
#pragma omp parallel
    {
        Head<Product> own(of, wide);
        Buffer<int32_t> order(n);
        Buffer<int64_t> place_of(n);
        for (int64_t first = 0; first < of.batch; first += together) {
            const int64_t examples = std::min(together, of.batch - first);
            const auto weights_of = [&](int64_t task) { return keeps ? weights + task * of_head : nullptr; };
#pragma omp for schedule(static)
            for (int64_t task = 0; task < examples * heads; task++)
                own.vote(first + task / heads, task % heads, votes + task * wide, weights_of(task), shares + task * n);
#pragma omp for schedule(static)
            for (int64_t one = 0; one < examples; one++) {
                const int64_t example = first + one;
                float *all = votes + one * heads * wide;
                for (int64_t head = 1; head < heads; head++)
                    for (int64_t j = 0; j < wide; j += LANES) put(all + j, at(all + j) + at(all + head * wide + j));
                choose(example, all, order);
                for (int64_t j = 0, place = 0; j < n; j++)
                    place_of[j] = !of.real || of.real[example * n + j] ? place++ : -1;
                for (int64_t i = 0; i < width; i++) {
                    const int64_t at = example * width + i;
                    places[one * width + i] = choose.to_real[at] ? place_of[choose.to_rows[at]] : -1;
                }
            }
#pragma omp for schedule(static)
            for (int64_t task = 0; task < examples * heads; task++) {
                const int64_t one = task / heads, head = task % heads, example = first + one;
                own.attend(example, head, choose.to_rows + example * width, places + one * width, width,
                           weights_of(task), shares + task * n,
                           context + (example * width * heads + head) * of.size, heads * of.size);
            }
        }
    }
}

// Context alone, of the queries that there are.
template <typename Product>
void attend(const Layer<typename Product::Value> &of, int64_t queries, typename Product::Value *context) {
    Buffer<int64_t> lines(queries);
    std::iota(lines.start, lines.start + queries, 0);
#pragma omp parallel
    {
        Head<Product> own(of, filled(of.n));
#pragma omp for schedule(static)
        for (int64_t task = 0; task < of.batch * of.heads; task++) {
            const int64_t example = task / of.heads, head = task % of.heads;
            own.attend(example, head, lines, lines, queries, nullptr, nullptr,
                       context + (example * queries * of.heads + head) * of.size, of.heads * of.size);
        }
    }
}

// ---------------------------------------------------------------------------- what torch calls; see kernels.py

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
typedef std::optional<Tensor> Perhaps;
typedef std::tuple<Tensor, Tensor, Tensor, Tensor> Chosen;

template <typename Number> Number *numbers(const Tensor &of) { return static_cast<Number *>(of.data_ptr()); }
template <typename Number> const Number *numbers(const Perhaps &of) {
    return of ? numbers<const Number>(*of) : nullptr;
}
Perhaps contiguous(const Perhaps &of) {
    return of && !of->is_contiguous() ? torch::stable::contiguous(*of) : of;
}
// In fp32 or bf16, and the numbers of a query, of a key and of a value lie side by side.
Tensor readable(const Tensor &of) {
    const Tensor known = of.scalar_type() == ScalarType::Half ? torch::stable::to(of, ScalarType::Float) : of;
    return known.stride(3) == 1 ? known : torch::stable::contiguous(known);
}
// The inverse for what was made: in the type of the queries.
Tensor as_given(const Tensor &made, const Tensor &query) {
    const auto type = query.scalar_type();
    return made.scalar_type() == type ? made : torch::stable::to(made, type);
}

Strides strides(const Tensor &of) { return {of.stride(0), of.stride(1), of.stride(2), of.stride(3)}; }
// As if it had been expanded to (example, head, row, column).
Strides strides(const Perhaps &of) {
    int64_t found[4] = {};
    for (int64_t d = 0, missing = of ? 4 - of->dim() : 0; of && d < of->dim(); d++)
        if (of->size(d) > 1) found[missing + d] = of->stride(d);
    return {found[0], found[1], found[2], found[3]};
}

// Calls with a Product for a kind of numbers. Pairs want heads of an even size.
template <typename Call> void with_product(const Tensor &query, const Call &call) {
    if (query.scalar_type() == ScalarType::Float) return call(static_cast<ByVectors<float> *>(nullptr));
#ifdef __AVX512BF16__
    if (query.size(3) % 2 == 0) {
#ifdef TILES
        if (ByTiles::allowed()) return call(static_cast<ByTiles *>(nullptr));
#endif
        return call(static_cast<ByPairs *>(nullptr));
    }
#endif
    call(static_cast<ByVectors<bf16> *>(nullptr));
}

template <typename Value>
Layer<Value> layer(const Tensor &query, const Tensor &key, const Tensor &value, const Perhaps &allowed,
                   const Perhaps &real) {
    const int64_t size = query.size(3);
    return {numbers<const Value>(query),
            numbers<const Value>(key),
            numbers<const Value>(value),
            numbers<uint8_t>(allowed),
            numbers<uint8_t>(real),
            query.size(0),
            query.size(1),
            key.size(2),
            size,
            static_cast<float>(std::log2(std::exp(1.0)) / std::sqrt(size)),  // powers of two are what is cheap
            strides(query),
            strides(key),
            strides(value),
            strides(allowed)};
}

Chosen empty(const Tensor &like, int64_t batch, int64_t width) {
    const Tensor rows = torch::stable::new_empty(like, {batch, width}, ScalarType::Long);
    return {rows, torch::stable::new_empty(like, {batch, width}, ScalarType::Long),
            torch::stable::new_empty(like, {batch, width}, ScalarType::Bool),
            torch::stable::new_empty(like, {batch * width}, ScalarType::Long)};
}

Chooser chooser(const Chosen &to, const Perhaps &real, const Perhaps &counts, const Perhaps &positions, int64_t n,
                int64_t width, int64_t guarded, int64_t tokens) {
    const auto &[rows, to_positions, to_real, flat] = to;
    return {numbers<uint8_t>(real), numbers<int64_t>(counts), numbers<int64_t>(positions), numbers<int64_t>(rows),
            numbers<int64_t>(to_positions), numbers<uint8_t>(to_real), numbers<int64_t>(flat), n, width, guarded,
            tokens};
}

Tensor received(const Tensor query, const Tensor key, const Perhaps allowed, const Perhaps real) {
    const Tensor queries = readable(query), keys = readable(key);
    const Perhaps voting = contiguous(real);
    const int64_t batch = query.size(0), heads = query.size(1), n = query.size(2);
    const Tensor made = torch::stable::new_empty(query, {batch, n}, ScalarType::Float);
    Buffer<float> by_head(batch * heads * n);
    with_product(queries, [&]<typename Product>(const Product *) {
        receive<Product>(layer<typename Product::Value>(queries, keys, keys, allowed, voting), by_head);
    });
    float *to = numbers<float>(made);
    std::fill_n(to, batch * n, 0.0f);
    for (int64_t task = 0; task < batch * heads; task++)
        for (int64_t j = 0; j < n; j++) to[task / heads * n + j] += by_head[task * n + j];
    return made;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>
attend_and_choose(const Tensor query, const Tensor key, const Tensor value, const Perhaps allowed, const Perhaps real,
                  const Perhaps counts, const Perhaps positions, int64_t width, int64_t guarded, int64_t tokens) {
    const Tensor queries = readable(query), keys = readable(key), values = readable(value);
    const Perhaps voting = contiguous(real), many = contiguous(counts), places = contiguous(positions);
    const int64_t batch = query.size(0), heads = query.size(1), n = query.size(2), size = query.size(3);
    const Chosen to = empty(query, batch, width);
    const Chooser choose = chooser(to, voting, many, places, n, width, guarded, tokens);
    const Tensor made = torch::stable::new_empty(queries, {batch, width, heads * size});
    with_product(queries, [&]<typename Product>(const Product *) {
        typedef typename Product::Value Value;
        attend<Product>(layer<Value>(queries, keys, values, allowed, voting), choose, numbers<Value>(made));
    });
    return std::tuple_cat(std::make_tuple(as_given(made, query)), to);
}

Tensor context(const Tensor query, const Tensor key, const Tensor value, const Perhaps allowed) {
    const Tensor queries = readable(query), keys = readable(key), values = readable(value);
    const int64_t heads = query.size(1), rows = query.size(2), size = query.size(3);
    const Tensor made = torch::stable::new_empty(queries, {query.size(0), rows, heads * size});
    with_product(queries, [&]<typename Product>(const Product *) {
        typedef typename Product::Value Value;
        attend<Product>(layer<Value>(queries, keys, values, allowed, std::nullopt), rows, numbers<Value>(made));
    });
    return as_given(made, query);
}

Chosen choose(const Tensor votes, const Perhaps real, const Perhaps counts, const Perhaps positions, int64_t width,
              int64_t guarded, int64_t tokens) {
    const Tensor given = *contiguous(Perhaps(votes));
    const Perhaps counted = contiguous(real), many = contiguous(counts), places = contiguous(positions);
    const int64_t batch = votes.size(0), n = votes.size(1);
    const Chosen to = empty(votes, batch, width);
    const Chooser choose = chooser(to, counted, many, places, n, width, guarded, tokens);
    const float *received = numbers<const float>(given);
#pragma omp parallel if (batch * n > 32768)
    {
        Buffer<int32_t> order(n);
#pragma omp for schedule(static)
        for (int64_t example = 0; example < batch; example++) choose(example, received + example * n, order);
    }
    return to;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lat_optuna, CPU, library) {
    library.impl("received", TORCH_BOX(&received));
    library.impl("context", TORCH_BOX(&context));
    library.impl("choose", TORCH_BOX(&choose));
    library.impl("attend_and_choose", TORCH_BOX(&attend_and_choose));
}
