// Significance on a CPU without probabilities in memory, and the choice of rows without a sort: cuda_kernels.py's twin.
// Vectors are GCC's and Clang's own; how wide they are, the processor says.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TILES
#endif

#ifdef __AVX512F__
constexpr int LANES = 16, ROWS = 6, COLUMNS = 4;
#else
constexpr int LANES = 8, ROWS = 4, COLUMNS = 2;
#endif
constexpr int STEP = 64;  // keys are filled up to a multiple of it
constexpr float LOWEST = -std::numeric_limits<float>::max(), NOTHING = -std::numeric_limits<float>::infinity();
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t bf16;

struct Strides {
    int64_t example, head, row, column;
};

static inline floats &at(float *from) { return *reinterpret_cast<floats *>(from); }
static inline floats larger(floats a, floats b) { return a > b ? a : b; }
static inline float number(float value) { return value; }
static inline float number(bf16 bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// 2 to the power of x <= 0 with a relative error of 2e-7; a power below the smallest normal number is zero.
static inline floats power_of_two(floats x) {
    x = larger(x, floats{} - 127.0f);
    const floats whole = (x + 12582912.0f) - 12582912.0f, rest = x - whole;  // 1.5 * 2^23 rounds
    floats value = rest * 0.0013266970f + 0.0096754599f;  // a polynomial fitted to 2^rest on -0.5 to 0.5
    value = value * rest + 0.0555074252f;
    value = value * rest + 0.2402212173f;
    value = value * rest + 0.6931469440f;
    value = value * rest + 1.0000001f;
    return value * reinterpret_cast<floats>((__builtin_convertvector(whole, ints) + 127) << 23);
}

// Products of a group of queries with all keys by vectors: a block of scores stays in registers.
template <typename Number> struct ByVectors {
    typedef Number Value;
    static constexpr int GROUP = ROWS;
    const int64_t size, wide;
    std::vector<float> keys, queries;

    ByVectors(int64_t size, int64_t wide) : size(size), wide(wide), keys(size * wide), queries(GROUP * size) {}

    void lay_out(int64_t j, const Number *key) {
        for (int64_t d = 0; d < size; d++) keys[d * wide + j] = number(key[d]);
    }

    void multiply(const Number *const *rows, int many, float *scores) {
        for (int r = 0; r < many; r++)
            for (int64_t d = 0; d < size; d++) queries[r * size + d] = number(rows[r][d]);
        for (int64_t j = 0; j < wide; j += LANES * COLUMNS) {
            floats sum[GROUP][COLUMNS] = {};
            for (int64_t d = 0; d < size; d++)
                for (int r = 0; r < GROUP; r++)
                    for (int c = 0; c < COLUMNS; c++)
                        sum[r][c] += queries[r * size + d] * at(&keys[d * wide + j + c * LANES]);
            for (int r = 0; r < GROUP; r++)
                for (int c = 0; c < COLUMNS; c++) at(scores + r * wide + j + c * LANES) = sum[r][c];
        }
    }
};

#ifdef TILES
// The same for bf16 by AMX: 16 x 16 scores of 32 numbers an instruction. Pairs of numbers lie together.
struct ByTiles {
    typedef bf16 Value;
    static constexpr int GROUP = 16;
    struct alignas(64) Shapes {
        uint8_t palette = 1, start = 0, unused[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } before;
    const int64_t size, wide, padded;
    std::vector<bf16> keys, queries;

    ByTiles(int64_t size, int64_t wide)
        : size(size), wide(wide), padded((size + 31) / 32 * 32), keys(padded * wide), queries(GROUP * padded) {
        const Shapes ours;
        _tile_storeconfig(&before);
        _tile_loadconfig(&ours);
    }
    ~ByTiles() { before.palette ? _tile_loadconfig(&before) : _tile_release(); }

    // Linux wants to be asked once whether a process may use tiles.
    static bool allowed() {
        static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
        return granted;
    }

    void lay_out(int64_t j, const bf16 *key) {
        for (int64_t d = 0; d < size; d += 2)
            std::memcpy(&keys[d * wide + j * 2], key + d, std::min<int64_t>(2, size - d) * sizeof(bf16));
    }

    void multiply(const bf16 *const *rows, int many, float *scores) {
        for (int r = 0; r < many; r++) std::copy(rows[r], rows[r] + size, &queries[r * padded]);
        for (int64_t j = 0; j < wide; j += 64) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t d = 0; d < padded; d += 32) {
                const bf16 *block = &keys[d * wide + j * 2];
                _tile_loadd(4, &queries[d], padded * 2);
                _tile_loadd(5, block, wide * 4);
                _tile_dpbf16ps(0, 4, 5);
                _tile_loadd(6, block + 32, wide * 4);
                _tile_dpbf16ps(1, 4, 6);
                _tile_loadd(7, block + 64, wide * 4);
                _tile_dpbf16ps(2, 4, 7);
                _tile_loadd(5, block + 96, wide * 4);
                _tile_dpbf16ps(3, 4, 5);
            }
            _tile_stored(0, scores + j, wide * 4);
            _tile_stored(1, scores + j + 16, wide * 4);
            _tile_stored(2, scores + j + 32, wide * 4);
            _tile_stored(3, scores + j + 48, wide * 4);
        }
    }
};
#endif

// All heads of all examples: what every key receives from the queries that vote. Scores are in units of log 2.
template <typename Product>
static void receive(const typename Product::Value *query, const typename Product::Value *key, const uint8_t *allowed,
                    const uint8_t *real, float *out, int64_t batch, int64_t heads, int64_t n, int64_t size, float scale,
                    Strides of_query, Strides of_key, Strides of_allowed) {
    typedef typename Product::Value Value;
    constexpr int GROUP = Product::GROUP;
    const int64_t wide = (n + STEP - 1) / STEP * STEP;
    const bool by_query = allowed && of_allowed.row;
    // As many threads as torch has: another number would end threads and begin them again.
#pragma omp parallel
    {
        Product product(size, wide);
        std::vector<float> scores(GROUP * wide), start(wide, NOTHING), votes(wide);
        const std::vector<Value> nothing(size);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < batch * heads; task++) {
            const int64_t example = task / heads, head = task % heads;
            const Value *queries = query + example * of_query.example + head * of_query.head,
                        *keys = key + example * of_key.example + head * of_key.head;
            const uint8_t *may = allowed ? allowed + example * of_allowed.example + head * of_allowed.head : nullptr,
                          *voting = real ? real + example * n : nullptr;
            for (int64_t j = 0; j < n; j++) {
                const bool refused = may && !by_query && !may[j * of_allowed.column];
                start[j] = refused ? LOWEST : 0.0f;
                product.lay_out(j, refused ? nothing.data() : keys + j * of_key.row);
            }
            std::fill(votes.begin(), votes.end(), 0.0f);

            for (int64_t next = 0; next < n;) {
                int64_t lines[GROUP];
                const Value *rows[GROUP];
                int many = 0;
                for (; next < n && many < GROUP; next++)
                    if (!voting || voting[next]) {
                        rows[many] = queries + next * of_query.row;
                        lines[many++] = next;
                    }
                if (!many) break;
                product.multiply(rows, many, scores.data());

                float share[GROUP];
                for (int r = 0; r < many; r++) {
                    float *row = &scores[r * wide];
                    if (by_query)
                        for (int64_t j = 0; j < n; j++) {
                            const bool seen = may[lines[r] * of_allowed.row + j * of_allowed.column];
                            start[j] = seen ? 0.0f : LOWEST;
                            row[j] = seen ? row[j] : 0.0f;
                        }
                    floats most = floats{} + NOTHING, total{};
                    for (int64_t j = 0; j < wide; j += LANES)
                        most = larger(most, at(row + j) = at(row + j) * scale + at(&start[j]));
                    float top = most[0], all = 0.0f;
                    for (int lane = 1; lane < LANES; lane++) top = std::max(top, most[lane]);
                    for (int64_t j = 0; j < wide; j += LANES) total += at(row + j) = power_of_two(at(row + j) - top);
                    for (int lane = 0; lane < LANES; lane++) all += total[lane];
                    share[r] = 1.0f / all;
                }
                for (int64_t j = 0; j < wide; j += LANES) {
                    floats more = at(&votes[j]);
                    for (int r = 0; r < many; r++) more += share[r] * at(&scores[r * wide + j]);
                    at(&votes[j]) = more;
                }
            }
            std::copy(votes.begin(), votes.begin() + n, out + task * n);
        }
    }
}

// `kind`: 0 fp32, 1 bf16. Numbers of a query, and of a key, lie side by side. `out`: (batch, heads, n).
extern "C" void received(int kind, const void *query, const void *key, const uint8_t *allowed, const uint8_t *real,
                         float *out, int64_t batch, int64_t heads, int64_t n, int64_t size, float scale,
                         const Strides *of_query, const Strides *of_key, const Strides *of_allowed) {
    const auto run = [&]<typename Product>(const Product *) {
        typedef const typename Product::Value *Values;
        receive<Product>(static_cast<Values>(query), static_cast<Values>(key), allowed, real, out, batch, heads, n,
                         size, scale, *of_query, *of_key, *of_allowed);
    };
    if (kind == 0) return run(static_cast<ByVectors<float> *>(nullptr));
#ifdef TILES
    if (ByTiles::allowed()) return run(static_cast<ByTiles *>(nullptr));
#endif
    run(static_cast<ByVectors<bf16> *>(nullptr));
}

// The rows that stay, example by example, in their order; see cuda_kernels.choose.
extern "C" void choose(const float *votes, const uint8_t *real, const int64_t *counts, const int64_t *positions,
                       int64_t *to_rows, int64_t *to_positions, uint8_t *to_real, int64_t *to_flat, int64_t batch,
                       int64_t n, int64_t width, int64_t guarded, int64_t tokens) {
#pragma omp parallel if (batch * n > 32768)
    {
        std::vector<int32_t> order(n);
#pragma omp for schedule(static)
        for (int64_t example = 0; example < batch; example++) {
            int64_t seen = 0;
            for (int64_t j = 0; j < n; j++) {
                // Integers in the order of the votes. As in a sort, zeros are equal, and what is no number comes first.
                const bool counted = !real || real[example * n + j];
                float vote = counted ? votes[example * n + j] : NOTHING;
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
    }
}
