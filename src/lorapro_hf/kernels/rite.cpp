// Mode rite; see `functional.rite`.
#include "pairs.hpp"

namespace {

double bias_corrected(double beta, double t) {
    const double rate = std::log(beta);
    return beta > 0 && t > 1 ? beta * std::expm1((t - 1) * rate) / std::expm1(t * rate) : 0;
}

Matrix symmetric(Arena& arena, const Matrix& matrix) {
    Matrix out(arena, matrix.rows, matrix.rows);
    for (Index i = 0; i < out.rows; ++i)
        for (Index j = 0; j < out.rows; ++j) out(i, j) = (matrix(i, j) + matrix(j, i)) / 2;
    return out;
}

// `(V + rho)^(-1/2)` with the guards of the reference; see `_inverse_root`.
Matrix inverse_root(Arena& arena, const Matrix& V, double escape, double eps) {
    const Index r = V.rows;
    Matrix rows(arena, r, r);
    double* values = arena.take<double>(r);
    eigen(arena, symmetric(arena, V), values, rows);
    const Matrix vectors = transposed(arena, rows);
    for (Index i = 0; i < r; ++i) values[i] = 1 / (std::sqrt(std::max(values[i], 0.0) + eps * eps + escape) + eps);
    return product(arena, columns_times(arena, vectors, values), rows);
}

double* sorted_eigenvalues(Arena& arena, const Matrix& V) {
    Matrix rows(arena, V.rows, V.rows);
    double* values = arena.take<double>(V.rows);
    eigen(arena, symmetric(arena, V), values, rows);
    std::sort(values, values + V.rows);
    return values;
}

// The second moment that a change of the bases has lost; see `_lost`.
double lost(Arena& arena, const Matrix& before, const Matrix& after) {
    const double *of_before = sorted_eigenvalues(arena, before), *of_after = sorted_eigenvalues(arena, after);
    double of_eigenvalue = 0, of_trace = 0;
    for (Index i = 0; i < before.rows; ++i) {
        of_eigenvalue = std::max(of_eigenvalue, of_before[i] - of_after[i]);
        of_trace += before(i, i) - after(i, i);
    }
    return std::min(of_eigenvalue, std::max(of_trace, 0.0));
}

// The moments of one factor in the polar coordinates of the basis of the other.
template <class T> struct Side {
    Arena& arena;
    Index r, k;
    T* M;        // (r, k)
    double *V, *escape;  // null without an escape
    Matrix new_V;

    // Counts a gradient without magnitude in.
    void update(const T* g, double steps, const Options& o) {
        const double beta1 = bias_corrected(o.beta1, steps), beta2 = bias_corrected(o.beta2, steps);
        const Matrix square = gram(arena, g, r, k);
        for (Index i = 0; i < r * r; ++i) new_V.data[i] = square.data[i] / k + beta2 * (V[i] - square.data[i] / k);
        if (escape != nullptr) *escape *= beta2;
        scale(M, r * k, beta1);
        const Matrix root = inverse_root(arena, new_V, escape != nullptr ? *escape : 0, o.eps);
        combine(arena, M, scaled(arena, root, 1 - beta1), g, k, true);
    }

    T* magnified(const Basis& basis) {
        return combined(arena, product(arena, basis.whitening, transposed(arena, basis.vectors)), M, k);
    }

    // Carries the moments to a new basis; `seen` holds the products of its rows with those of the old one.
    void carry(const Basis& old, const Basis& now, const Matrix& seen) {
        const Matrix P = product(arena, product(arena, now.vectors, seen), transposed(arena, old.vectors));
        const Matrix moved = product(arena, product(arena, P, new_V), transposed(arena, P));
        if (escape != nullptr) *escape += lost(arena, new_V, moved);
        std::copy_n(moved.data, r * r, V);
        const T* before = copy_of(arena, M, r * k);
        combine(arena, M, P, before, k);
    }
};

template <class T> void rite(const Stack& stack, const LoraproState& state, const Options& o) {
    const Index r = stack.r, m = stack.m, n = stack.n;
    for_each_pair<T>(stack, state, [&](Pair<T>& pair, Index entry) {
        Arena& arena = pair.arena;
        const double *norms = stack.norms + 3 * entry, s = std::abs(pair.s);
        const auto weight = [&](double norm, Index k) {
            const bool skipped = o.skip > 0 && norm > o.skip * std::sqrt(double(r * k));
            return norm > 0 && !skipped ? pair.s * o.clipped : 0;
        };
        const double weight_A = weight(s * norms[0], n), weight_B = weight(s * std::hypot(norms[1], norms[2]), m);
        combine(arena, pair.b, transposed(arena, pair.core()), pair.rows_B, m, true);
        const T* g_A = combined(arena, scaled(arena, pair.of_B.vectors, weight_A), pair.a, n);
        const T* g_B = combined(arena, scaled(arena, pair.of_A.vectors, weight_B), pair.b, m);
        const auto escape = [&](void* all) { return all == nullptr ? nullptr : static_cast<double*>(all) + entry; };
        const auto second = [&](void* all) { return static_cast<double*>(all) + entry * r * r; };
        Side<T> A{arena, r, n, static_cast<T*>(state.first_A) + entry * r * n, second(state.second_A),
                  escape(state.escape_A), Matrix(arena, r, r)};
        Side<T> B{arena, r, m, static_cast<T*>(state.first_B) + entry * r * m, second(state.second_B),
                  escape(state.escape_B), Matrix(arena, r, r)};
        A.update(g_A, state.steps[entry], o), B.update(g_B, state.steps[entry], o);
        const Factors<T> after = linear_step(pair, Factors<T>{A.magnified(pair.of_B), B.magnified(pair.of_A)}, o);
        const NewBases<T> bases(pair, after);
        A.carry(pair.of_B, bases.of_B, cross(arena, bases.rows_B, r, pair.rows_B, r, m));
        B.carry(pair.of_A, bases.of_A, cross(arena, bases.rows_A, r, pair.rows_A, r, n));
        store(pair, after);
    });
}

}  // namespace

LORAPRO_EXPORT(rite)
