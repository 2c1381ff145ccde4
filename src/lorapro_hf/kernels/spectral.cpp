// Mode spectral; see `functional.spectral`.
#include "tangent.hpp"

namespace {

constexpr double LENGTH = 0.2;  // as in `functional.spectral`

// `u = B^ (X A^ + Y) + b A^`; see `SpectralDirection`.
template <class T> struct SpectralDirection {
    Matrix X;
    T *Y, *b;
};

template <class T> SpectralDirection<T> spectral_direction(Pair<T>& pair, T* a, const T* b, const Options& o) {
    const Index r = pair.r, m = pair.m, n = pair.n;
    Arena& arena = pair.arena;
    double rtol = pair.stack.rtol;
    if (rtol < 0)
        rtol = std::max(std::pow(2 * r * double(std::numeric_limits<T>::epsilon()), 2),
                        2 * r * std::numeric_limits<double>::epsilon());
    const Matrix core = cross(arena, a, r, pair.rows_A, r, n);
    combine(arena, a, scaled(arena, core, -1), pair.rows_A, n, true);
    const Basis of_a = basis_of(arena, a, r, n, rtol), of_b = basis_of(arena, b, r, m, rtol);
    Matrix N(arena, 2 * r, 2 * r);
    for (Index i = 0; i < r; ++i)
        for (Index j = 0; j < r; ++j) {
            N(i, j) = core(i, j), N(r + i, r + j) = 0;
            N(i, r + j) = of_a.vectors(i, j) * of_a.singular[j], N(r + i, j) = of_b.vectors(j, i) * of_b.singular[i];
        }
    for (Index turn = 0; turn < o.iterations; ++turn) {
        const Matrix square = product(arena, N, transposed(arena, N));
        const Basis polar = basis_of_gram<T>(arena, square, 2 * r, rtol);
        const Matrix inverse_root = product(arena, polar.vectors, transposed(arena, polar.whitening));
        N = product(arena, inverse_root, N);
        for (Index i = 0; i < r; ++i) std::fill_n(&N(r + i, r), r, 0.0);
    }
    const double length = LENGTH * std::sqrt(double(std::max(m, n)));
    Matrix X(arena, r, r), of_Y(arena, r, r), of_new_b(arena, r, r);
    for (Index i = 0; i < r; ++i)
        for (Index j = 0; j < r; ++j) {
            X(i, j) = length * N(i, j), of_Y(i, j) = length * N(i, r + j), of_new_b(i, j) = length * N(r + j, i);
        }
    // Both bases are whitened rows.
    return {X, combined(arena, product(arena, of_Y, transposed(arena, of_a.whitening)), a, n),
            combined(arena, product(arena, of_new_b, transposed(arena, of_b.whitening)), b, m)};
}

// Nesterov's momentum `gradient + beta * (moment - gradient)`.
template <class T> T* lerp(Arena& arena, const T* gradient, const T* moment, double beta, Index count) {
    T* out = arena.take<T>(count);
    for (Index i = 0; i < count; ++i) out[i] = gradient[i] + T(beta) * (moment[i] - gradient[i]);
    return out;
}

template <class T> void spectral(const Stack& stack, const LoraproState& state, const Options& o) {
    const Index r = stack.r, m = stack.m, n = stack.n;
    for_each_pair<T>(stack, state, [&](Pair<T>& pair, Index entry) {
        Arena& arena = pair.arena;
        T *M_a = static_cast<T*>(state.first_A) + entry * r * n, *M_b = static_cast<T*>(state.first_B) + entry * r * m;
        const T* of_A = copy_of(arena, pair.a, r * n);
        const T* of_B = copy_of(arena, pair.b, r * m);
        blend(arena, pair.a, pair.of_B, M_a, o.beta1, n);
        blend(arena, pair.b, pair.of_A, M_b, o.beta1, m);
        T *ahead_a = lerp(arena, of_A, pair.a, o.beta1, r * n), *ahead_b = lerp(arena, of_B, pair.b, o.beta1, r * m);
        const SpectralDirection<T> u = spectral_direction(pair, ahead_a, ahead_b, o);
        Factors<T> after{};
        if (o.sequential) {
            const auto through_A = [&](const Matrix& weights) {
                T* rows = combined(arena, weights, u.b, m);
                combine(arena, rows, product(arena, weights, transposed(arena, u.X)), pair.rows_B, m, true);
                return rows;
            };
            const auto rest_through_B = [&](const Matrix& weights, const Basis&, const T* rows) {
                return combined(arena, product(arena, weights, cross(arena, rows, r, pair.rows_B, r, m)), u.Y, n);
            };
            after = spend_direction(pair, through_A, rest_through_B, o);
        } else {
            combine(arena, u.Y, u.X, pair.rows_A, n, true);
            after = linear_step(pair, factor_gradients(pair, u.Y, u.b, o.x_mode), o);
        }
        transport(pair, NewBases<T>(pair, after), M_a, M_b);
        store(pair, after);
    });
}

}  // namespace

LORAPRO_EXPORT(spectral)
