// Dense algebra of one pair of factors: rows of length k in the dtype of the computation, and r x r matrices in double.
//
// All sums run in a fixed order that depends on the shape alone, so that results repeat to the bit for any number of
// threads and any batch.
#pragma once

#include "matrices.hpp"

namespace {

template <class T> using Vector [[gnu::vector_size(32)]] = T;
template <class T> constexpr Index LANES = 32 / sizeof(T);

template <class T> Vector<T> load(const T* source) {
    Vector<T> out;
    std::memcpy(&out, source, sizeof(out));
    return out;
}

template <class T> void save(T* target, Vector<T> values) { std::memcpy(target, &values, sizeof(values)); }

// Four numbers as doubles.
inline Vector<double> doubles(const double* source) { return load(source); }
inline Vector<double> doubles(const float* source) {
    typedef float Four __attribute__((vector_size(16)));
    Four out;
    std::memcpy(&out, source, sizeof(out));
    return __builtin_convertvector(out, Vector<double>);
}

// The dtype of sums: that of the rows, or double.
template <class T, bool exact> struct Sums {
    using V = Vector<T>;
    static constexpr Index width = LANES<T>;
    static V load(const T* source) { return ::load(source); }
};
template <class T> struct Sums<T, true> {
    using V = Vector<double>;
    static constexpr Index width = 4;
    static V load(const T* source) { return doubles(source); }
};

// `X Y^T` of rows X (p, k) and Y (q, k), a block of P x Q at a time; `exact` sums in double.
template <class T, bool exact, Index P, Index Q>
void block_of_products(const T* X, const T* Y, Index k, double* out, Index stride) {
    using S = Sums<T, exact>;
    using V = typename S::V;
    constexpr Index width = S::width;
    V sums[P][Q] = {};
    Index at = 0;
    for (; at + width <= k; at += width) {
        V of_Y[Q];
        for (Index j = 0; j < Q; ++j) of_Y[j] = S::load(Y + j * k + at);
        for (Index i = 0; i < P; ++i) {
            const V of_X = S::load(X + i * k + at);
            for (Index j = 0; j < Q; ++j) sums[i][j] += of_X * of_Y[j];
        }
    }
    for (Index i = 0; i < P; ++i)
        for (Index j = 0; j < Q; ++j) {
            double sum = 0;
            for (Index lane = 0; lane < width; ++lane) sum += sums[i][j][lane];
            for (Index rest = at; rest < k; ++rest) sum += double(X[i * k + rest]) * double(Y[j * k + rest]);
            out[i * stride + j] = sum;
        }
}

template <class T, bool exact> void products(const T* X, Index p, const T* Y, Index q, Index k, double* out) {
    Index i = 0;
    for (; i + 2 <= p; i += 2) {
        Index j = 0;
        for (; j + 4 <= q; j += 4) block_of_products<T, exact, 2, 4>(X + i * k, Y + j * k, k, out + i * q + j, q);
        for (; j < q; ++j) block_of_products<T, exact, 2, 1>(X + i * k, Y + j * k, k, out + i * q + j, q);
    }
    for (; i < p; ++i)
        for (Index j = 0; j < q; ++j) block_of_products<T, exact, 1, 1>(X + i * k, Y + j * k, k, out + i * q + j, q);
}

// `X Y^T` of rows X (p, k) and Y (q, k), with sums in the dtype of the rows.
template <class T> Matrix cross(Arena& arena, const T* X, Index p, const T* Y, Index q, Index k) {
    Matrix out(arena, p, q);
    products<T, false>(X, p, Y, q, k, out.data);
    return out;
}

// The same with sums in double.
template <class T> Matrix exact_cross(Arena& arena, const T* X, Index p, const T* Y, Index q, Index k) {
    Matrix out(arena, p, q);
    products<T, true>(X, p, Y, q, k, out.data);
    return out;
}

// `X X^T` (p, p) with sums in double.
template <class T> Matrix gram(Arena& arena, const T* X, Index p, Index k) {
    Matrix out(arena, p, p);
    Index i = 0;
    for (; i + 4 <= p; i += 4)
        for (Index j = 0; j < i + 4; j += 2)
            block_of_products<T, true, 4, 2>(X + i * k, X + j * k, k, out.data + i * p + j, p);
    for (; i < p; ++i)
        for (Index j = 0; j <= i; ++j) block_of_products<T, true, 1, 1>(X + i * k, X + j * k, k, out.data + i * p + j, p);
    for (Index row = 0; row < p; ++row)
        for (Index column = row + 1; column < p; ++column) out(row, column) = out(column, row);
    return out;
}

template <class T, Index P, Index N>
void block_of_sums(T* out, const T* weights, const T* X, Index p, Index k, bool add) {
    constexpr Index width = LANES<T>;
    Vector<T> sums[P][N];
    for (Index i = 0; i < P; ++i)
        for (Index n = 0; n < N; ++n) sums[i][n] = add ? load(out + i * k + n * width) : Vector<T>{};
    for (Index j = 0; j < p; ++j)
        for (Index n = 0; n < N; ++n) {
            const Vector<T> of_X = load(X + j * k + n * width);
            for (Index i = 0; i < P; ++i) sums[i][n] += of_X * weights[i * p + j];
        }
    for (Index i = 0; i < P; ++i)
        for (Index n = 0; n < N; ++n) save<T>(out + i * k + n * width, sums[i][n]);
}

template <class T, Index P> void row_sums(T* out, const T* weights, const T* X, Index p, Index k, bool add) {
    constexpr Index width = LANES<T>;
    Index at = 0;
    for (; at + 2 * width <= k; at += 2 * width) block_of_sums<T, P, 2>(out + at, weights, X + at, p, k, add);
    for (; at + width <= k; at += width) block_of_sums<T, P, 1>(out + at, weights, X + at, p, k, add);
    for (; at < k; ++at)
        for (Index i = 0; i < P; ++i) {
            T sum = add ? out[i * k + at] : T(0);
            for (Index j = 0; j < p; ++j) sum += weights[i * p + j] * X[j * k + at];
            out[i * k + at] = sum;
        }
}

// `out (q, k) = W X`, or `out += W X`, of weights W (q, p) and rows X (p, k); `out` must not overlap X.
template <class T> void combine(Arena& arena, T* out, const Matrix& W, const T* X, Index k, bool add = false) {
    const Index q = W.rows, p = W.columns;
    T* weights = arena.take<T>(q * p);
    for (Index i = 0; i < q * p; ++i) weights[i] = T(W.data[i]);
    Index i = 0;
    for (; i + 4 <= q; i += 4) row_sums<T, 4>(out + i * k, weights + i * p, X, p, k, add);
    for (; i < q; ++i) row_sums<T, 1>(out + i * k, weights + i * p, X, p, k, add);
}

template <class T> T* combined(Arena& arena, const Matrix& W, const T* X, Index k) {
    T* out = arena.take<T>(W.rows * k);
    combine(arena, out, W, X, k);
    return out;
}

template <class T> T* copy_of(Arena& arena, const T* values, Index count) {
    T* out = arena.take<T>(count);
    std::copy_n(values, count, out);
    return out;
}

// The transpose of a matrix (rows, columns).
template <class T> void transpose(T* out, const T* source, Index rows, Index columns) {
    const Index height = columns < 64 ? 1 : 64;  // narrow matrices are read in order, others block by block
    for (Index block = 0; block < rows; block += height)
        for (Index j = 0; j < columns; ++j)
            for (Index i = block; i < std::min(block + height, rows); ++i) out[j * rows + i] = source[i * columns + j];
}

// ---- bases ----

// The r rows of a factor `F = vectors diag(singular) F^`, whose rows F^ are orthonormal; zeros for absent directions.
struct Basis {
    Matrix vectors;  // (r, r), eigenvectors as columns
    double* singular;
    double* inverse;
    Matrix whitening;  // `vectors diag(inverse)`: its transpose times the factor gives F^

    Basis(Arena& arena, Index r)
        : vectors(arena, r, r), singular(arena.take<double>(r)), inverse(arena.take<double>(r)), whitening(arena, r, r) {}

    void fill() {
        const Index r = vectors.rows;
        for (Index i = 0; i < r; ++i) inverse[i] = singular[i] != 0 ? 1 / singular[i] : 0;
        for (Index i = 0; i < r; ++i)
            for (Index j = 0; j < r; ++j) whitening(i, j) = vectors(i, j) * inverse[j];
    }
};

// `F F^T` of the rows of a basis, without absent directions.
Matrix gram_of(Arena& arena, const Basis& basis) {
    const Index r = basis.vectors.rows;
    double* squares = arena.take<double>(r);
    for (Index i = 0; i < r; ++i) squares[i] = basis.singular[i] * basis.singular[i];
    return product(arena, columns_times(arena, basis.vectors, squares), transposed(arena, basis.vectors));
}

// The basis of rows whose Gram matrix is given; `rtol` as in `lorapro_hf.functional.bases`, negative for the default.
template <class T> Basis basis_of_gram(Arena& arena, const Matrix& gram, Index k, double rtol) {
    const Index r = gram.rows;
    Basis basis(arena, r);
    Matrix as_rows(arena, r, r);
    double* values = arena.take<double>(r);
    eigen(arena, gram, values, as_rows);
    if (rtol < 0)
        rtol = std::max(r * double(std::numeric_limits<T>::epsilon()),
                        std::max(r, k) * std::numeric_limits<double>::epsilon());
    const double smallest = std::pow(1 / double(std::numeric_limits<T>::max()), 2);
    const double limit = std::max(rtol * *std::max_element(values, values + r), smallest);
    for (Index i = 0; i < r; ++i) {
        basis.singular[i] = values[i] <= limit ? 0 : std::sqrt(values[i]);
        for (Index j = 0; j < r; ++j) basis.vectors(j, i) = as_rows(i, j);
    }
    basis.fill();
    return basis;
}

template <class T> Basis basis_of(Arena& arena, const T* rows, Index r, Index k, double rtol) {
    return basis_of_gram<T>(arena, gram(arena, rows, r, k), k, rtol);
}

}  // namespace
