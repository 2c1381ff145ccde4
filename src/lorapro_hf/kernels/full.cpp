// Modes full and full_8bit, before and after the products of the direction; see `optim.rules.full`.
#include "pairs.hpp"

namespace {

constexpr double ALL_DIRECTIONS = 1e-14;  // as in `functional.bases`

// The directions of B that the products are taken with: a sequential step may make any of them large enough.
template <class T> Basis basis_of_products(Pair<T>& pair, const Options& o) {
    return o.sequential ? basis_of(pair.arena, pair.Bt, pair.r, pair.m, ALL_DIRECTIONS) : pair.of_B;
}

// Writes `left` (2r, m) and `right` (2r, n), whose product is the equivalent gradient, to first_B and first_A, and the
// rows of the basis of B to second_B.
template <class T> void full_before(const Stack& stack, const LoraproState& state, const Options& o) {
    const Index r = stack.r, m = stack.m, n = stack.n;
    for_each_pair<T>(stack, state, [&](Pair<T>& pair, Index entry) {
        std::copy_n(pair.left, 2 * r * m, static_cast<T*>(state.first_B) + entry * 2 * r * m);
        std::copy_n(pair.right, 2 * r * n, static_cast<T*>(state.first_A) + entry * 2 * r * n);
        const Basis basis = basis_of_products(pair, o);
        T* rows = static_cast<T*>(state.second_B) + entry * r * m;
        combine(pair.arena, rows, transposed(pair.arena, basis.whitening), pair.Bt, m);
    });
}

// Steps along a direction u whose products are given: `B^T u` (r, n) in first_A, `A u^T` (r, m) in first_B and, for a
// sequential step, `K^T u` (r, n) in second_A; see `sequential_step`. They are overwritten.
template <class T> void full_after(const Stack& stack, const LoraproState& state, const Options& o) {
    const Index r = stack.r, m = stack.m, n = stack.n;
    for_each_pair<T>(stack, state, [&](Pair<T>& pair, Index entry) {
        Arena& arena = pair.arena;
        T *B_u = static_cast<T*>(state.first_A) + entry * r * n, *u_A = static_cast<T*>(state.first_B) + entry * r * m;
        if (!o.sequential) {
            pair.leave_columns_of_B(u_A);
            return store(pair, linear_step(pair, factor_gradients(pair, B_u, u_A, o.x_mode), o));
        }
        const Basis all = basis_of_products(pair, o);
        const double kept_s = pair.s * o.keep_A, moved = kept_s != 0 ? o.lr_B / kept_s : 0;
        const Matrix weights = scaled(arena, columns_times(arena, all.vectors, all.singular), o.keep_B);
        T* through_new_B = combined(arena, weights, B_u, n);
        const T* K_u = static_cast<const T*>(state.second_A) + entry * r * n;
        combine(arena, through_new_B, scaled(arena, pair.of_A.whitening, -moved), K_u, n, true);
        const auto through_A = [&](const Matrix& on_u) { return combined(arena, on_u, u_A, m); };
        const auto rest_through_B = [&](const Matrix& on_u, const Basis& basis, const T*) {
            // From right to left: the product of the two small matrices would square the condition number of B'.
            const T* seen = combined(arena, transposed(arena, basis.whitening), through_new_B, n);
            T* through = combined(arena, on_u, seen, n);
            const Matrix inside = cross(arena, through, r, pair.rows_A, r, n);
            combine(arena, through, scaled(arena, inside, -1), pair.rows_A, n, true);
            return through;
        };
        store(pair, spend_direction(pair, through_A, rest_through_B, o));
    });
}

}  // namespace

LORAPRO_EXPORT(full_before)
LORAPRO_EXPORT(full_after)
