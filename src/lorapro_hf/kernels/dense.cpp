// How is one step of dense moments taken on a CPU in a single pass over memory?
//
// For each of K weights (m, n): g = leftᵀ right, Adam's moments M and V, their direction u, and the products A uᵀ
// (r, m), B u (r, n) and, for a sequential update, (A uᵀ) u (r, n). Each moment is read and written once; g and u exist
// for a tile of 16 rows and 256 columns only, which stays in the first two caches. A sequential update keeps u for 64
// rows, until their products with A are complete.
//
// The order of every sum depends on the shape alone: neither on the threads nor on the entries of a call. A thread takes
// a span of rows of one entry, and the spans of an entry are added up in their order.
//
// Panels: the columns of a tile are cut into blocks of two vectors, and what belongs to a block lies together:
// right [block][2r][columns] and u [block][16][columns]. A is [r][256].

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

#ifdef __AVX512F__
#define LORAPRO_VECTOR 64
#else
#define LORAPRO_VECTOR 32
#endif
template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(LORAPRO_VECTOR)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int LANES = LORAPRO_VECTOR / sizeof(T);
template <class T>
constexpr int COLUMNS = 2 * LANES<T>;  // of a block

using Index = std::ptrdiff_t;
constexpr int GROUP = 4;           // rows whose gradients are in registers
constexpr int TILE_ROWS = 16;      // of g and u
constexpr int BLOCK_ROWS = 64;     // for which the panels of a tile are packed once
constexpr Index TILE = 256;        // columns; also the elements of 8-bit storage that share a scale
constexpr Index SPAN = 1 << 18;    // elements of a span of rows, roughly
constexpr Index MOST_SPANS = 32;   // of one entry: each has sums of its own
constexpr Index SUMS = 1 << 23;    // elements of the sums of one entry, unless it has one span
constexpr Index THREAD_SUMS = 1 << 24;  // bytes of such sums for each thread

struct Bfloat16 {
    std::uint16_t bits;
};
using Code = std::uint8_t;

template <class To, class From>
To bits_of(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

template <class T>
Vector<T> read(const T* x) {
    Vector<T> value;
    std::memcpy(&value, x, sizeof value);
    return value;
}

template <class T>
void write(T* x, Vector<T> value) {
    std::memcpy(x, &value, sizeof value);
}

// ---- 8-bit codes ----

// Tables of storage.py: a bucket of numbers holds one border at most.
struct Encoder {
    const float* borders;  // code c holds the numbers above border c, up to and including border c + 1
    const Code* codes;     // of the lowest number of each bucket
};

void encode(const float* x, Index count, const Encoder encoder, Code* codes, float* scale) {
    constexpr std::uint32_t LOWEST = 103 << 7, BUCKETS = (24 << 7) + 1;
    std::uint32_t most = 0;
    for (Index j = 0; j < count; ++j) most = std::max(most, bits_of<std::uint32_t>(x[j]) & 0x7FFFFFFF);
    // One number that is not finite spoils the scale of its block, so that it is seen.
    const float largest = most < 0x7F800000 ? bits_of<float>(most) : std::numeric_limits<float>::quiet_NaN();
    *scale = largest;
    float scaled[TILE];
    std::uint32_t buckets[TILE];
    for (Index j = 0; j < count; ++j) {
        scaled[j] = largest > 0 ? x[j] / largest : 0;
        const std::uint32_t bits = bits_of<std::uint32_t>(scaled[j]);
        buckets[j] = std::max(bits >> 16 & 0x7FFF, LOWEST) - LOWEST + (bits >> 31) * BUCKETS;
    }
    for (Index j = 0; j < count; ++j) {
        const int code = encoder.codes[buckets[j]];
        codes[j] = static_cast<Code>(code + (scaled[j] > encoder.borders[code + 1]));
    }
}

// ---- bfloat16 ----

Bfloat16 nearest(float x) {
    const std::uint32_t bits = bits_of<std::uint32_t>(x);
    const std::uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return {static_cast<std::uint16_t>(x == x ? rounded : 0x7FC0)};
}

// Up or down at random, but repeatably; `dithered` of storage.py.
Bfloat16 dithered(float x, std::uint32_t salt) {
    const std::uint32_t bits = bits_of<std::uint32_t>(x);
    std::uint32_t hashed = (bits + salt) * 0x85EBCA6Bu;
    hashed = (hashed ^ hashed >> 13) * 0xC2B2AE35u;
    return {static_cast<std::uint16_t>(x == x ? (bits + (hashed >> 16)) >> 16 : 0x7FC0)};
}

float widened(Bfloat16 x) { return bits_of<float>(static_cast<std::uint32_t>(x.bits) << 16); }

// ---- the problem ----

struct Shape {
    Index m, n, r;
    bool sequential;
    Index tiles() const { return (n + TILE - 1) / TILE; }
    Index products() const { return sequential ? 2 * r : r; }  // with u, summed over rows
    Index spans() const {
        return std::clamp<Index>((m * n + SPAN / 2) / SPAN, 1, std::clamp<Index>(SUMS / (products() * n), 1, MOST_SPANS));
    }
    Index span_rows() const {
        const Index rows = (m + spans() - 1) / spans();
        return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS;
    }
};

template <class T>
struct Adam {
    T rate1, beta2, rate2;
    T first, second;  // u = M / (√V * first + second); both hold the bias corrections
    std::uint32_t salt;
};

// The tensors of one entry.
template <class T, class S>
struct Entry {
    S *M, *V;
    float *M_scales, *V_scales;
    const T *left, *right, *A, *B;
    T *u_A, *B_u, *K_u;
    Adam<T> adam;
};

struct Tables {
    const float* signed_map;
    Encoder signed_code;
    const float* unsigned_map;
    Encoder unsigned_code;
};

// What one thread works with.
template <class T>
struct Scratch {
    T *left, *weights, *right, *A, *row_sums, *column_sums, *M, *V, *u;

    static Index sizes(const Shape& shape, Index (&sizes)[9]) {
        const Index r = shape.r, kept_rows = shape.sequential ? shape.tiles() * BLOCK_ROWS : TILE_ROWS;
        const Index exact[9] = {BLOCK_ROWS * 2 * r,
                                BLOCK_ROWS * shape.products(),
                                TILE * 2 * r,
                                TILE * r,
                                BLOCK_ROWS * r * LANES<T>,
                                TILE * shape.products(),
                                TILE_ROWS * TILE,
                                TILE_ROWS * TILE,
                                kept_rows * TILE};
        Index total = 0;
        for (int i = 0; i < 9; ++i) total += sizes[i] = (exact[i] + 15) / 16 * 16;
        return total;
    }

    Scratch(const Shape& shape, T* memory) {
        Index of_each[9];
        sizes(shape, of_each);
        T** all[9] = {&left, &weights, &right, &A, &row_sums, &column_sums, &M, &V, &u};
        for (int i = 0; i < 9; memory += of_each[i++]) *all[i] = memory;
    }
};

// ---- a tile ----

// The gradients of R rows and one block of columns, the new moments and u.
template <class T, int R>
inline void advance_block(const T* right, const T* left, Index q, T* M, T* V, Index stride, T* u, const Adam<T>& adam) {
    constexpr int L = LANES<T>;
    Vector<T> g[R][2];
    for (int i = 0; i < R; ++i) g[i][0] = g[i][1] = Vector<T>{};
    for (Index k = 0; k < q; ++k, right += COLUMNS<T>, left += GROUP) {
        const Vector<T> x0 = read(right), x1 = read(right + L);
        for (int i = 0; i < R; ++i) {
            g[i][0] += x0 * left[i];
            g[i][1] += x1 * left[i];
        }
    }
    for (int i = 0; i < R; ++i, M += stride, V += stride, u += COLUMNS<T>) {
        alignas(64) T exact[COLUMNS<T>];
        write(exact, g[i][0]);
        write(exact + L, g[i][1]);
#pragma omp simd
        for (int j = 0; j < COLUMNS<T>; ++j) {
            const T new_M = M[j] + adam.rate1 * (exact[j] - M[j]);
            const T new_V = adam.beta2 * V[j] + adam.rate2 * (exact[j] * exact[j]);
            M[j] = new_M;
            V[j] = new_V;
            u[j] = new_M / (std::sqrt(new_V) * adam.first + adam.second);
        }
    }
}

// sums[row][a] += the products of u with A, lane by lane, for R rows and Q rows of A.
template <class T, int R, int Q>
inline void multiply_rows(const T* u, const T* A, Index blocks, Index r, T* sums) {
    constexpr int L = LANES<T>;
    Vector<T> sum[R][Q];
    for (int i = 0; i < R; ++i)
        for (int a = 0; a < Q; ++a) sum[i][a] = read(sums + (i * r + a) * L);
    for (Index b = 0; b < blocks; ++b, u += TILE_ROWS * COLUMNS<T>, A += COLUMNS<T>) {
        for (int half = 0; half < COLUMNS<T>; half += L) {
            Vector<T> x[R];
            for (int i = 0; i < R; ++i) x[i] = read(u + i * COLUMNS<T> + half);
            for (int a = 0; a < Q; ++a) {
                const Vector<T> y = read(A + a * TILE + half);
                for (int i = 0; i < R; ++i) sum[i][a] += x[i] * y;
            }
        }
    }
    for (int i = 0; i < R; ++i)
        for (int a = 0; a < Q; ++a) write(sums + (i * r + a) * L, sum[i][a]);
}

template <class T, int R>
inline void multiply_row_group(const T* u, const T* A, Index blocks, Index r, T* sums) {
    Index a = 0;
    for (; a + 2 <= r; a += 2) multiply_rows<T, R, 2>(u, A + a * TILE, blocks, r, sums + a * LANES<T>);
    if (a < r) multiply_rows<T, R, 1>(u, A + a * TILE, blocks, r, sums + a * LANES<T>);
}

// sums[a] += weights[row][a] u[row] for one block of columns and Q products.
template <class T, int Q>
inline void multiply_columns(const T* u, const T* weights, Index rows, Index products, T* sums) {
    constexpr int L = LANES<T>;
    Vector<T> sum[Q][2];
    for (int a = 0; a < Q; ++a)
        for (int half = 0; half < 2; ++half) sum[a][half] = read(sums + a * COLUMNS<T> + half * L);
    for (Index i = 0; i < rows; ++i, u += COLUMNS<T>, weights += products) {
        const Vector<T> x0 = read(u), x1 = read(u + L);
        for (int a = 0; a < Q; ++a) {
            sum[a][0] += x0 * weights[a];
            sum[a][1] += x1 * weights[a];
        }
    }
    for (int a = 0; a < Q; ++a)
        for (int half = 0; half < 2; ++half) write(sums + a * COLUMNS<T> + half * L, sum[a][half]);
}

template <class T>
void add_column_products(const T* u, const T* weights, Index rows, Index blocks, Index products, T* sums) {
    for (Index b = 0; b < blocks; ++b, u += TILE_ROWS * COLUMNS<T>) {
        Index a = 0;
        for (; a + 4 <= products; a += 4, sums += 4 * COLUMNS<T>)
            multiply_columns<T, 4>(u, weights + a, rows, products, sums);
        for (; a < products; ++a, sums += COLUMNS<T>) multiply_columns<T, 1>(u, weights + a, rows, products, sums);
    }
}

// ---- one thread: a span of rows of one entry ----

template <class T, class S>
class Span {
public:
    Span(const Shape& shape, const Entry<T, S>& entry, const Tables* tables, const Scratch<T>& scratch)
        : shape_(shape), entry_(entry), tables_(tables), scratch_(scratch) {}

    // The rows from `first` to before `last`; the products that are summed over rows go to B_u and K_u.
    void run(Index first, Index last, T* B_u, T* K_u) {
        const Index r = shape_.r, products = shape_.products(), tiles = shape_.tiles();
        for (Index row = first; row < last; row += BLOCK_ROWS) {
            const Index rows = std::min<Index>(BLOCK_ROWS, last - row);
            pack_rows(row, rows);
            std::fill_n(scratch_.row_sums, rows * r * LANES<T>, T(0));
            for (Index tile = 0; tile < tiles; ++tile) {
                pack_right(tile);
                pack_A(tile);
                advance(row, rows, tile);
                if (!shape_.sequential) add_tile(row == first, products, tile, B_u, nullptr);
            }
            finish_rows(row, rows);
            for (Index tile = 0; shape_.sequential && tile < tiles; ++tile) {
                std::fill_n(scratch_.column_sums, TILE * products, T(0));
                for (Index top = 0; top < rows; top += TILE_ROWS)
                    multiply_tile(direction(tile, top), top, std::min<Index>(TILE_ROWS, rows - top), tile);
                add_tile(row == first, products, tile, B_u, K_u);
            }
        }
    }

private:
    static constexpr bool DIRECT = std::is_same_v<T, S>;  // stored as computed
    const Shape& shape_;
    const Entry<T, S>& entry_;
    const Tables* tables_;
    const Scratch<T>& scratch_;

    Index width(Index tile) const { return std::min(TILE, shape_.n - tile * TILE); }
    Index blocks(Index tile) const { return (width(tile) + COLUMNS<T> - 1) / COLUMNS<T>; }

    T* direction(Index tile, Index top) const {
        return shape_.sequential ? scratch_.u + (tile * BLOCK_ROWS + top) * TILE : scratch_.u;
    }

    // left as [group][2r][4], and B as weights [row][products].
    void pack_rows(Index row, Index rows) {
        const Index m = shape_.m, q = 2 * shape_.r, r = shape_.r, products = shape_.products();
        for (Index i = 0; i < rows; i += GROUP) {
            const Index here = std::min<Index>(GROUP, rows - i);
            for (Index k = 0; k < q; ++k)
                std::copy_n(entry_.left + k * m + row + i, here, scratch_.left + i * q + k * GROUP);
            for (Index a = 0; a < r; ++a)
                for (Index j = i; j < i + here; ++j) scratch_.weights[j * products + a] = entry_.B[a * m + row + j];
        }
    }

    // Zero outside, as A is.
    void pack_right(Index tile) {
        const Index q = 2 * shape_.r, n = shape_.n;
        for (Index b = 0; b < blocks(tile); ++b) {
            const Index column = b * COLUMNS<T>, here = std::min<Index>(COLUMNS<T>, width(tile) - column);
            const T* from = entry_.right + tile * TILE + column;
            T* to = scratch_.right + b * q * COLUMNS<T>;
            for (Index k = 0; k < q; ++k, from += n, to += COLUMNS<T>) {
                if (here == COLUMNS<T>) {
                    std::memcpy(to, from, sizeof(T) * COLUMNS<T>);
                } else {
                    std::copy_n(from, here, to);
                    std::fill_n(to + here, COLUMNS<T> - here, T(0));
                }
            }
        }
    }

    void pack_A(Index tile) {
        for (Index a = 0; a < shape_.r; ++a) {
            std::copy_n(entry_.A + a * shape_.n + tile * TILE, width(tile), scratch_.A + a * TILE);
            std::fill_n(scratch_.A + a * TILE + width(tile), TILE - width(tile), T(0));
        }
    }

    // All rows of a block in one tile of columns: the moments, u, and its products.
    void advance(Index row, Index rows, Index tile) {
        const Index r = shape_.r;
        if (!shape_.sequential) std::fill_n(scratch_.column_sums, TILE * r, T(0));
        for (Index top = 0; top < rows; top += TILE_ROWS) {
            const Index here = std::min<Index>(TILE_ROWS, rows - top);
            T* u = direction(tile, top);
            const T* left = scratch_.left + top * 2 * r;
            const bool more = top + here < rows;
            // Where the next tile begins: its moments are fetched while this one is computed.
            const Index next = more ? (row + top + here) * shape_.n + tile * TILE : row * shape_.n + (tile + 1) * TILE;
            const bool fetch = more || tile + 1 < shape_.tiles();
            Index done = 0;
            if constexpr (DIRECT) {
                done = width(tile) / COLUMNS<T>;
                const Index start = (row + top) * shape_.n + tile * TILE;
                advance_blocks(0, done, here, left, entry_.M + start, entry_.V + start, shape_.n, COLUMNS<T>, u,
                               fetch ? next - start : 0);
            }
            if (done < blocks(tile)) {
                load(row + top, here, tile, done, fetch ? next : -1);
                advance_blocks(done, blocks(tile), here, left, scratch_.M, scratch_.V, COLUMNS<T>,
                               TILE_ROWS * COLUMNS<T>, u, 0);
                store(row + top, here, tile, done);
                clear_outside(u, tile);
            }
            Index i = 0;
            T* sums = scratch_.row_sums + top * r * LANES<T>;
            for (; i + GROUP <= here; i += GROUP)
                multiply_row_group<T, GROUP>(u + i * COLUMNS<T>, scratch_.A, blocks(tile), r, sums + i * r * LANES<T>);
            for (; i < here; ++i)
                multiply_row_group<T, 1>(u + i * COLUMNS<T>, scratch_.A, blocks(tile), r, sums + i * r * LANES<T>);
            if (!shape_.sequential) multiply_tile(u, top, here, tile);
        }
    }

    void advance_blocks(Index first, Index last, Index rows, const T* left, T* M, T* V, Index stride, Index block_stride,
                        T* u, Index fetch) {
        const Index q = 2 * shape_.r, height = TILE_ROWS * COLUMNS<T>;
        for (Index i = 0; i < rows; i += GROUP) {
            const bool whole = i + GROUP <= rows;
            // The rows that come next, in this tile or in the next one.
            const Index ahead = !fetch ? 0 : i + GROUP < rows ? GROUP * stride : fetch - i * stride;
            const T* group = left + i * q;
            for (Index b = first; b < last; ++b) {
                const T* right = scratch_.right + b * q * COLUMNS<T>;
                T *m = M + b * block_stride + i * stride, *v = V + b * block_stride + i * stride;
                T* d = u + b * height + i * COLUMNS<T>;
                for (int k = 0; ahead && k < GROUP; ++k) {
                    prefetch(m + k * stride + ahead, sizeof(T) * COLUMNS<T>);
                    prefetch(v + k * stride + ahead, sizeof(T) * COLUMNS<T>);
                }
                if (whole) {
                    advance_block<T, GROUP>(right, group, q, m, v, stride, d, entry_.adam);
                } else {
                    for (Index k = 0; i + k < rows; ++k)
                        advance_block<T, 1>(right, group + k, q, m + k * stride, v + k * stride, stride,
                                            d + k * COLUMNS<T>, entry_.adam);
                }
            }
        }
    }

    static void prefetch(const void* from, Index bytes) {
        for (Index at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at, 1, 3);
    }

    void multiply_tile(const T* u, Index top, Index rows, Index tile) {
        const Index products = shape_.products();
        add_column_products(u, scratch_.weights + top * products, rows, blocks(tile), products, scratch_.column_sums);
    }

    // With eps = 0 the directions beside the weight would be 0 / 0.
    void clear_outside(T* u, Index tile) {
        const Index outside = blocks(tile) * COLUMNS<T> - width(tile);
        u += ((blocks(tile) - 1) * TILE_ROWS + 1) * COLUMNS<T> - outside;
        for (Index i = 0; outside && i < TILE_ROWS; ++i) std::fill_n(u + i * COLUMNS<T>, outside, T(0));
    }

    void add_tile(bool first, Index products, Index tile, T* B_u, T* K_u) {
        const T* sums = scratch_.column_sums;
        const Index n = shape_.n, r = shape_.r, cols = width(tile);
        for (Index column = 0; column < cols; column += COLUMNS<T>) {
            const Index here = std::min<Index>(COLUMNS<T>, cols - column);
            for (Index a = 0; a < products; ++a, sums += COLUMNS<T>) {
                T* to = (a < r ? B_u + a * n : K_u + (a - r) * n) + tile * TILE + column;
                for (Index j = 0; j < here; ++j) to[j] = first ? sums[j] : to[j] + sums[j];
            }
        }
    }

    void finish_rows(Index row, Index rows) {
        const Index r = shape_.r, products = shape_.products();
        for (Index i = 0; i < rows; ++i) {
            for (Index a = 0; a < r; ++a) {
                const T* lanes = scratch_.row_sums + (i * r + a) * LANES<T>;
                T sum = 0;
                for (int lane = 0; lane < LANES<T>; ++lane) sum += lanes[lane];
                entry_.u_A[a * shape_.m + row + i] = sum;
                if (shape_.sequential) scratch_.weights[i * products + r + a] = sum;
            }
        }
    }

    // Moments of a tile, from block `first` on, as [block][16][columns] numbers; zero outside.
    void load(Index row, Index rows, Index tile, Index first, Index next) {
        for (Index i = 0; i < rows; ++i) {
            const Index start = (row + i) * shape_.n + tile * TILE, scale = (row + i) * shape_.tiles() + tile;
            if constexpr (!DIRECT) {
                if (next >= 0) {
                    prefetch(entry_.M + next + i * shape_.n, TILE * sizeof(S));
                    prefetch(entry_.V + next + i * shape_.n, TILE * sizeof(S));
                }
            }
            for (Index b = first; b < blocks(tile); ++b) {
                const Index at = (b * TILE_ROWS + i) * COLUMNS<T>, here = width(tile) - b * COLUMNS<T>;
                T *M = scratch_.M + at, *V = scratch_.V + at;
                const S *from_M = entry_.M + start + b * COLUMNS<T>, *from_V = entry_.V + start + b * COLUMNS<T>;
                if (here >= COLUMNS<T>) {
                    widen(from_M, from_V, scale, COLUMNS<T>, M, V);
                } else {
                    widen(from_M, from_V, scale, here, M, V);
                    std::fill(M + here, M + COLUMNS<T>, T(0));
                    std::fill(V + here, V + COLUMNS<T>, T(0));
                }
            }
        }
    }

    __attribute__((always_inline)) void widen(const S* from_M, const S* from_V, Index scale, Index count, T* M, T* V) {
        if constexpr (DIRECT) {
            std::copy_n(from_M, count, M);
            std::copy_n(from_V, count, V);
        } else if constexpr (std::is_same_v<S, Bfloat16>) {
#pragma omp simd
            for (Index j = 0; j < count; ++j) M[j] = widened(from_M[j]);
#pragma omp simd
            for (Index j = 0; j < count; ++j) V[j] = widened(from_V[j]);
        } else {
            const float M_scale = entry_.M_scales[scale], V_scale = entry_.V_scales[scale];
            for (Index j = 0; j < count; ++j) M[j] = tables_->signed_map[from_M[j]] * M_scale;
            for (Index j = 0; j < count; ++j) {
                const float root = tables_->unsigned_map[from_V[j]] * V_scale;
                V[j] = root * root;
            }
        }
    }

    void store(Index row, Index rows, Index tile, Index first) {
        for (Index i = 0; i < rows; ++i) {
            const Index start = (row + i) * shape_.n + tile * TILE, scale = (row + i) * shape_.tiles() + tile;
            S *to_M = entry_.M + start, *to_V = entry_.V + start;
            float numbers[2][TILE];
            for (Index b = first; b < blocks(tile); ++b) {
                const Index column = b * COLUMNS<T>, here = std::min<Index>(COLUMNS<T>, width(tile) - column);
                const T *M = scratch_.M + (b * TILE_ROWS + i) * COLUMNS<T>;
                const T *V = scratch_.V + (b * TILE_ROWS + i) * COLUMNS<T>;
                if constexpr (std::is_same_v<S, Code>) {
                    for (int j = 0; j < COLUMNS<T>; ++j) numbers[0][column + j] = M[j];
#pragma omp simd
                    for (int j = 0; j < COLUMNS<T>; ++j) numbers[1][column + j] = std::sqrt(static_cast<float>(V[j]));
                } else if (here == COLUMNS<T>) {
                    narrow(M, V, COLUMNS<T>, to_M + column, to_V + column);
                } else {
                    narrow(M, V, here, to_M + column, to_V + column);
                }
            }
            if constexpr (std::is_same_v<S, Code>) {
                encode(numbers[0], width(tile), tables_->signed_code, to_M, entry_.M_scales + scale);
                encode(numbers[1], width(tile), tables_->unsigned_code, to_V, entry_.V_scales + scale);
            }
        }
    }

    __attribute__((always_inline)) void narrow(const T* M, const T* V, Index count, S* to_M, S* to_V) {
        if constexpr (DIRECT) {
            std::copy_n(M, count, to_M);
            std::copy_n(V, count, to_V);
        } else {
#pragma omp simd
            for (Index j = 0; j < count; ++j) to_M[j] = nearest(M[j]);
#pragma omp simd
            for (Index j = 0; j < count; ++j) to_V[j] = dithered(V[j], entry_.adam.salt);
        }
    }
};

// ---- all entries ----

struct Call {
    void* const* tensors;  // M, V, their scales, left, right, A, B, u_A, B_u, K_u
    const void* const* tables;  // map, borders and buckets with a sign, then without
    const std::int64_t* entries;
    const float* steps;
    double beta1, beta2, eps;
    int threads;
};

template <class T>
T* aligned(Index count) {
    return static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
}

template <class T, class S>
Entry<T, S> entry_of(const Call& call, const Shape& shape, std::int64_t e) {
    const Index m = shape.m, n = shape.n, r = shape.r, scales = e * m * shape.tiles();
    const auto of = [&](int i, Index size) { return static_cast<T*>(call.tensors[i]) + e * size; };
    const double correction1 = 1 - std::pow(call.beta1, call.steps[e]);
    const double correction2 = 1 - std::pow(call.beta2, call.steps[e]);
    const Adam<T> adam = {static_cast<T>(1 - call.beta1),
                          static_cast<T>(call.beta2),
                          static_cast<T>(1 - call.beta2),
                          static_cast<T>(correction1 / std::sqrt(correction2)),
                          static_cast<T>(correction1 * call.eps),
                          static_cast<std::uint32_t>(static_cast<std::int64_t>(call.steps[e])) * 0x9E3779B1u};
    return {static_cast<S*>(call.tensors[0]) + e * m * n,
            static_cast<S*>(call.tensors[1]) + e * m * n,
            static_cast<float*>(call.tensors[2]) + scales,
            static_cast<float*>(call.tensors[3]) + scales,
            of(4, 2 * r * m),
            of(5, 2 * r * n),
            of(6, r * n),
            of(7, r * m),
            of(8, r * m),
            of(9, r * n),
            of(10, r * n),
            adam};
}

// 0, or 1 if there is no memory.
template <class T, class S>
int update(const Call& call, const Shape& shape, Index count) {
    Index unused[9];
    const Index of_thread = Scratch<T>::sizes(shape, unused), spans = shape.spans(), rows = shape.span_rows();
    const Index sums = shape.products() * shape.n;
    // As many entries at a time as keep the sums of their spans small.
    const Index together = std::max<Index>(1, call.threads * THREAD_SUMS / (spans * sums * Index(sizeof(T))));
    const Index batch = spans == 1 ? count : std::min(count, together);
    std::unique_ptr<T, decltype(&std::free)> scratch(aligned<T>(call.threads * of_thread), &std::free);
    std::unique_ptr<T, decltype(&std::free)> partial(aligned<T>(spans == 1 ? 1 : batch * spans * sums), &std::free);
    const auto numbers = [&](int i) { return static_cast<const float*>(call.tables[i]); };
    const auto codes = [&](int i) { return static_cast<const Code*>(call.tables[i]); };
    const Tables tables = {numbers(0), {numbers(1), codes(2)}, numbers(3), {numbers(4), codes(5)}};
    if (!scratch || !partial) return 1;
    for (Index first = 0; first < count; first += batch) {
        const Index here = std::min(batch, count - first);
#pragma omp parallel num_threads(call.threads)
        {
            int thread = 0;
#ifdef _OPENMP
            thread = omp_get_thread_num();
#endif
            const Scratch<T> own(shape, scratch.get() + thread * of_thread);
#pragma omp for schedule(dynamic)
            for (Index unit = 0; unit < here * spans; ++unit) {
                const Entry<T, S> entry = entry_of<T, S>(call, shape, call.entries[first + unit / spans]);
                const Index top = unit % spans * rows, bottom = std::min(top + rows, shape.m);
                T* to = partial.get() + unit * sums;
                if (spans == 1) {
                    Span<T, S>(shape, entry, &tables, own).run(top, bottom, entry.B_u, entry.K_u);
                } else if (top < bottom) {
                    Span<T, S>(shape, entry, &tables, own).run(top, bottom, to, to + shape.r * shape.n);
                }
            }
            const Index filled = (shape.m + rows - 1) / rows;  // spans that have rows
#pragma omp for
            for (Index part = 0; part < (spans == 1 ? 0 : here * shape.products()); ++part) {
                const Index a = part % shape.products(), i = part / shape.products(), n = shape.n;
                const Entry<T, S> entry = entry_of<T, S>(call, shape, call.entries[first + i]);
                T* to = a < shape.r ? entry.B_u + a * n : entry.K_u + (a - shape.r) * n;
                const T* from = partial.get() + i * spans * sums + a * n;
                std::copy_n(from, n, to);
                for (Index span = 1; span < filled; ++span)
                    for (Index j = 0; j < n; ++j) to[j] += from[span * sums + j];
            }
        }
    }
    return 0;
}

}  // namespace

// `storage`: 0 for moments in the dtype of the factors; 1 for bfloat16 and 2 for 8-bit codes beside float32 factors.
// Products of entries that are not in `entries`, and all where `found_inf` is 1, are left alone. Returns 0, or 1 if
// there is no memory.
extern "C" int lorapro_dense_update(void* const* tensors, const void* const* tables, const std::int64_t* entries,
                                    std::int64_t count, const float* steps, const float* found_inf, std::int64_t m,
                                    std::int64_t n, std::int64_t r, int sequential, double beta1, double beta2,
                                    double eps, int is_double, int storage, int threads) {
    if (*found_inf > 0) return 0;
    const Call call = {tensors, tables, entries, steps, beta1, beta2, eps, threads};
    const Shape shape = {m, n, r, sequential != 0};
    if (storage == 0) {
        return is_double ? update<double, double>(call, shape, count) : update<float, float>(call, shape, count);
    }
    return storage == 1 ? update<float, Bfloat16>(call, shape, count) : update<float, Code>(call, shape, count);
}
