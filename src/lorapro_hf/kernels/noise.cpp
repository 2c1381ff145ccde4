// How are normal numbers drawn from their position in a matrix, and added to it? See `noise.py`.
//
// Philox4x32-10 turns a key and a counter into four words, and Box-Muller turns these into four numbers. Sixteen
// counters fill 64 columns of a row, so that every loop is one of vectors. No number depends on the threads.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

using Index = std::int64_t;
using Word = std::uint32_t;
constexpr int LANES = 16, WIDTH = 4 * LANES;

struct Noise {
    Index rows, columns, first_row, threads, seed, layer, window;
    const Index* ids;      // of the rows in the matrix; null for those from `first_row` on
    const float* weight;   // null for the noise alone
    Index stride;          // between rows of the weight
    const float* scale;    // of each row or of each column
    Index is_of_columns;
    float* out;
};

float as_float(Word bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

Word as_word(float value) {
    Word bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Four words of each of sixteen counters; a loop over an array of known size stays in registers.
constexpr int PARTS = 2;
typedef Word Lanes __attribute__((vector_size(4 * LANES / PARTS)));

// The lower and the upper halves of the products with one number.
inline void multiply(Lanes x, Word by, Lanes& low, Lanes& high) {
#ifdef __AVX2__
    const __m256i factor = _mm256_set1_epi32(int(by)), even = __m256i(x);
    const __m256i p = _mm256_mul_epu32(even, factor), q = _mm256_mul_epu32(_mm256_srli_epi64(even, 32), factor);
    low = Lanes(_mm256_blend_epi32(p, _mm256_slli_epi64(q, 32), 0xAA));
    high = Lanes(_mm256_blend_epi32(_mm256_srli_epi64(p, 32), q, 0xAA));
#else
    for (int l = 0; l < LANES / PARTS; ++l) {
        const std::uint64_t p = std::uint64_t(by) * x[l];
        low[l] = Word(p), high[l] = Word(p >> 32);
    }
#endif
}

inline void philox(Lanes (&a)[PARTS], Lanes (&b)[PARTS], Lanes (&c)[PARTS], Lanes (&d)[PARTS], Word key0, Word key1) {
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < PARTS; ++i) {
            Lanes low, high, other_low, other_high;
            multiply(a[i], 0xD2511F53u, low, high);
            multiply(c[i], 0xCD9E8D57u, other_low, other_high);
            a[i] = other_high ^ b[i] ^ key0, b[i] = other_low;
            c[i] = high ^ d[i] ^ key1, d[i] = low;
        }
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
}

// The logarithm of numbers from 2^-24 to 1, exact to about one unit in the last place; the polynomial is Cephes'.
inline float logarithm(float u) {
    const Word bits = as_word(u);
    float e = float(int(bits >> 23) - 126), x = as_float((bits & 0x007FFFFF) | 0x3F000000);
    const Word is_low = -Word(x < 0.707106781f);
    e -= as_float(is_low & 0x3F800000);
    x += as_float(is_low & as_word(x)) - 1.0f;
    const float square = x * x;
    float y = 7.0376836292e-2f;
    y = y * x - 1.1514610310e-1f;
    y = y * x + 1.1676998740e-1f;
    y = y * x - 1.2420140846e-1f;
    y = y * x + 1.4249322787e-1f;
    y = y * x - 1.6668057665e-1f;
    y = y * x + 2.0000714765e-1f;
    y = y * x - 2.4999993993e-1f;
    y = y * x + 3.3333331174e-1f;
    y = y * x * square - 2.12194440e-4f * e - 0.5f * square;
    return x + y + 0.693359375f * e;
}

inline void box_muller(const Word* __restrict length, const Word* __restrict angle, float* __restrict z, float* __restrict w) {
#pragma omp simd
    for (int l = 0; l < LANES; ++l) {
        const float u = (float(int(length[l] >> 9)) + 0.5f) * 0x1p-23f;
        const float r = std::sqrt(-2.0f * logarithm(u));
        const Word quarter = (angle[l] + 0x20000000u) >> 30;
        const float x = float(int(angle[l] - (quarter << 30))) * 1.46291807926715968e-9f;  // pi / 2^31
        const float square = x * x;
        const float sine = ((-1.9515295891e-4f * square + 8.3321608736e-3f) * square - 1.6666654611e-1f) * square * x + x;
        const float cosine =
            ((2.443315711809948e-5f * square - 1.388731625493765e-3f) * square + 4.166664568298827e-2f) * square * square
            - 0.5f * square + 1.0f;
        const Word swapped = (as_word(sine) ^ as_word(cosine)) & -(quarter & 1);
        z[l] = r * as_float(as_word(cosine) ^ swapped ^ ((quarter + 1) & 2) << 30);
        w[l] = r * as_float(as_word(sine) ^ swapped ^ (quarter & 2) << 30);
    }
}

inline void draw(const Noise& noise, Word row, Index block, float* z) {
    Lanes words[4][PARTS];
    for (int l = 0; l < LANES; ++l) words[0][l * PARTS / LANES][l % (LANES / PARTS)] = Word(block * LANES + l);
    for (int i = 0; i < PARTS; ++i) {
        words[1][i] = row - Lanes{}, words[2][i] = Word(noise.layer) - Lanes{}, words[3][i] = Word(noise.window) - Lanes{};
    }
    philox(words[0], words[1], words[2], words[3], Word(noise.seed), Word(std::uint64_t(noise.seed) >> 32));
    Word flat[4][LANES];
    std::memcpy(flat, words, sizeof flat);
    box_muller(flat[0], flat[1], z, z + LANES);
    box_muller(flat[2], flat[3], z + 2 * LANES, z + 3 * LANES);
}

void fill(const Noise& noise, Index i) {
    const Word row = Word(noise.ids == nullptr ? noise.first_row + i : noise.ids[i]);
    const float* weight = noise.weight == nullptr ? nullptr : noise.weight + i * noise.stride;
    float* out = noise.out + i * noise.columns;
    for (Index start = 0; start < noise.columns; start += WIDTH) {
        float z[WIDTH];
        draw(noise, row, start / WIDTH, z);
        const Index width = std::min<Index>(WIDTH, noise.columns - start);
        if (noise.is_of_columns) {
#pragma omp simd
            for (Index j = 0; j < width; ++j) z[j] *= noise.scale[start + j];
        } else {
            const float scale = noise.scale[i];
#pragma omp simd
            for (Index j = 0; j < width; ++j) z[j] *= scale;
        }
        if (weight == nullptr) {
            std::copy_n(z, width, out + start);
        } else {
#pragma omp simd
            for (Index j = 0; j < width; ++j) out[start + j] = weight[start + j] + z[j];
        }
    }
}

}  // namespace

extern "C" void lorapro_noise(const Noise* noise) {
#pragma omp parallel for num_threads(noise->threads) if (noise->rows * noise->columns > 16384)
    for (Index i = 0; i < noise->rows; ++i) fill(*noise, i);
}
