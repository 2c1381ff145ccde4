// Dense algebra of one pair of factors: rows of length k in the dtype of the computation, and r x r matrices in double.
//
// All sums run in a fixed order that depends on the shape alone, so that results repeat to the bit for any number of
// threads and any batch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

namespace {

using Index = std::int64_t;

// ---- memory of one thread ----

// Hands out memory that lasts until the mark is restored; keeps its blocks for the next pair.
class Arena {
  public:
    template <class T> T* take(Index count) {
        const Index bytes = (count * Index(sizeof(T)) + 63) / 64 * 64;
        while (current_ < blocks_.size() && used_ + bytes > blocks_[current_].second) {
            ++current_;
            used_ = 0;
        }
        if (current_ == blocks_.size()) {
            const Index size = std::max(bytes, Index(1) << 20);
            blocks_.emplace_back(std::unique_ptr<char[]>(new char[size]), size);
        }
        T* taken = reinterpret_cast<T*>(blocks_[current_].first.get() + used_);
        used_ += bytes;
        return taken;
    }

    void reset() { current_ = 0, used_ = 0; }

  private:
    std::vector<std::pair<std::unique_ptr<char[]>, Index>> blocks_;
    std::size_t current_ = 0;
    Index used_ = 0;
};

// ---- small matrices ----

// A row-major matrix of doubles in an arena.
struct Matrix {
    Index rows, columns;
    double* data;

    Matrix(Arena& arena, Index rows, Index columns)
        : rows(rows), columns(columns), data(arena.take<double>(rows * columns)) {}
    double& operator()(Index i, Index j) const { return data[i * columns + j]; }
    Index size() const { return rows * columns; }
};

Matrix product(Arena& arena, const Matrix& left, const Matrix& right) {
    Matrix out(arena, left.rows, right.columns);
    std::fill_n(out.data, out.size(), 0.0);
    for (Index i = 0; i < left.rows; ++i)
        for (Index l = 0; l < left.columns; ++l)
            for (Index j = 0; j < right.columns; ++j) out(i, j) += left(i, l) * right(l, j);
    return out;
}

Matrix transposed(Arena& arena, const Matrix& matrix) {
    Matrix out(arena, matrix.columns, matrix.rows);
    for (Index i = 0; i < matrix.rows; ++i)
        for (Index j = 0; j < matrix.columns; ++j) out(j, i) = matrix(i, j);
    return out;
}

Matrix scaled(Arena& arena, const Matrix& matrix, double factor) {
    Matrix out(arena, matrix.rows, matrix.columns);
    for (Index i = 0; i < out.size(); ++i) out.data[i] = factor * matrix.data[i];
    return out;
}

Matrix difference(Arena& arena, const Matrix& left, const Matrix& right) {
    Matrix out(arena, left.rows, left.columns);
    for (Index i = 0; i < out.size(); ++i) out.data[i] = left.data[i] - right.data[i];
    return out;
}

// Each column times a number.
Matrix columns_times(Arena& arena, const Matrix& matrix, const double* factors) {
    Matrix out(arena, matrix.rows, matrix.columns);
    for (Index i = 0; i < out.rows; ++i)
        for (Index j = 0; j < out.columns; ++j) out(i, j) = matrix(i, j) * factors[j];
    return out;
}

double inner(const Matrix& left, const Matrix& right) {
    double sum = 0;
    for (Index i = 0; i < left.size(); ++i) sum += left.data[i] * right.data[i];
    return sum;
}

// ---- eigenvalues ----

// Reduces a symmetric matrix to a tridiagonal one by Householder reflections; `vectors` gets the transpose of their
// product. `matrix` is overwritten.
void tridiagonalise(Matrix& matrix, Matrix& vectors, double* diagonal, double* beside, double* scratch) {
    const Index n = matrix.rows;
    double* weights = scratch;  // of each reflection I - weight v v^T, whose v lies below the diagonal of its column
    double* p = scratch + n;
    for (Index k = 0; k + 2 < n; ++k) {
        double largest = 0, square = 0;
        for (Index i = k + 1; i < n; ++i) largest = std::max(largest, std::abs(matrix(i, k)));
        for (Index i = k + 1; i < n && largest > 0; ++i) {
            matrix(i, k) /= largest;
            square += matrix(i, k) * matrix(i, k);
        }
        const double length = std::sqrt(square), first = matrix(k + 1, k);
        const double moved = first > 0 ? first + length : first - length;
        const double of_v = square - first * first + moved * moved;
        weights[k] = of_v > 0 ? 2 / of_v : 0;
        beside[k] = (first > 0 ? -length : length) * largest;
        matrix(k + 1, k) = moved;
        if (weights[k] == 0) continue;
        double along = 0;
        for (Index i = k + 1; i < n; ++i) {
            double sum = 0;
            for (Index j = k + 1; j <= i; ++j) sum += matrix(i, j) * matrix(j, k);
            for (Index j = i + 1; j < n; ++j) sum += matrix(j, i) * matrix(j, k);
            p[i] = weights[k] * sum;
            along += p[i] * matrix(i, k);
        }
        for (Index i = k + 1; i < n; ++i) p[i] -= weights[k] / 2 * along * matrix(i, k);
        for (Index i = k + 1; i < n; ++i)
            for (Index j = k + 1; j <= i; ++j) matrix(i, j) -= matrix(i, k) * p[j] + p[i] * matrix(j, k);
    }
    if (n > 1) beside[n - 2] = matrix(n - 1, n - 2);
    for (Index i = 0; i < n; ++i) diagonal[i] = matrix(i, i);
    std::fill_n(vectors.data, n * n, 0.0);
    for (Index i = 0; i < n; ++i) vectors(i, i) = 1;
    for (Index k = n - 3; k >= 0; --k)
        for (Index row = k + 1; row < n; ++row) {
            double sum = 0;
            for (Index i = k + 1; i < n; ++i) sum += vectors(row, i) * matrix(i, k);
            for (Index i = k + 1; i < n; ++i) vectors(row, i) -= weights[k] * sum * matrix(i, k);
        }
}

// Eigenvalues, unordered, and eigenvectors, as rows, by implicit QL; see Golub and Van Loan, Matrix Computations, 8.3.
void diagonalise(Matrix& vectors, double* diagonal, double* beside) {
    const Index n = vectors.rows;
    const double eps = std::numeric_limits<double>::epsilon();
    beside[n - 1] = 0;
    for (Index first = 0; first < n; ++first)
        for (int turn = 0; turn < 60; ++turn) {
            Index last = first;
            while (last + 1 < n && std::abs(beside[last]) > eps * (std::abs(diagonal[last]) + std::abs(diagonal[last + 1])))
                ++last;
            if (last == first) break;
            const double half = (diagonal[first + 1] - diagonal[first]) / (2 * beside[first]);
            double g = diagonal[last] - diagonal[first] + beside[first] / (half + std::copysign(std::hypot(half, 1), half));
            double sine = 1, cosine = 1, shift = 0;
            bool split = false;
            for (Index i = last - 1; i >= first; --i) {
                const double f = sine * beside[i], b = cosine * beside[i], length = std::hypot(f, g);
                beside[i + 1] = length;
                if (length == 0) {
                    diagonal[i + 1] -= shift;
                    beside[last] = 0;
                    split = true;
                    break;
                }
                sine = f / length, cosine = g / length;
                g = diagonal[i + 1] - shift;
                const double rest = (diagonal[i] - g) * sine + 2 * cosine * b;
                shift = sine * rest;
                diagonal[i + 1] = g + shift;
                g = cosine * rest - b;
                double *low = &vectors(i, 0), *high = &vectors(i + 1, 0);
                for (Index j = 0; j < n; ++j) {
                    const double of_high = high[j];
                    high[j] = sine * low[j] + cosine * of_high;
                    low[j] = cosine * low[j] - sine * of_high;
                }
            }
            if (split) continue;
            diagonal[first] -= shift, beside[first] = g, beside[last] = 0;
        }
}

// Eigenvalues of a symmetric matrix, unordered, and its eigenvectors as rows; NaN if it holds NaN or Inf.
void eigen(Arena& arena, const Matrix& symmetric, double* values, Matrix& vectors) {
    const Index n = symmetric.rows;
    double sum = 0;
    for (Index i = 0; i < n * n; ++i) sum += symmetric.data[i] * 0;
    if (sum != 0) {
        std::fill_n(values, n, sum), std::fill_n(vectors.data, n * n, sum);
        return;
    }
    Matrix copy(arena, n, n);
    std::copy_n(symmetric.data, n * n, copy.data);
    double *beside = arena.take<double>(n), *scratch = arena.take<double>(2 * n);
    tridiagonalise(copy, vectors, values, beside, scratch);
    diagonalise(vectors, values, beside);
}

// ---- rows ----

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
