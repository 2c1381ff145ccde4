// Memory of a thread, r x r matrices in double, and their eigenvalues.
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

}  // namespace
