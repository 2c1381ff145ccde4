// Mode factored; see `functional.factored`.
#include "tangent.hpp"

namespace {

// `sums[j] += sum_i X[i, j] Y[i, j]`.
template <class T> void add_column_products(T* sums, const T* X, const T* Y, Index r, Index k) {
    for (Index i = 0; i < r; ++i)
        for (Index j = 0; j < k; ++j) sums[j] += X[i * k + j] * Y[i * k + j];
}

// Counts the means of the squares of the equivalent gradient, by columns and by rows, into the second moments; see
// `mean_squares`.
template <class T> void update_second_moments(Pair<T>& pair, T* column, T* row, double beta2) {
    const Index r = pair.r, m = pair.m, n = pair.n;
    Arena& arena = pair.arena;
    T *of_column = arena.take<T>(n), *of_row = arena.take<T>(m);
    std::fill_n(of_column, n, T(0)), std::fill_n(of_row, m, T(0));
    add_column_products(of_column, pair.a, pair.a, r, n);
    const Matrix square_b = cross(arena, pair.b, r, pair.b, r, m);
    add_column_products(of_column, combined(arena, square_b, pair.rows_A, n), pair.rows_A, r, n);
    const Matrix core = pair.core();
    T* through_A = copy_of(arena, pair.b, r * m);
    combine(arena, through_A, transposed(arena, core), pair.rows_B, m, true);
    add_column_products(of_row, through_A, through_A, r, m);
    Matrix outside = cross(arena, pair.a, r, pair.a, r, n);
    const Matrix inside = product(arena, core, transposed(arena, core));
    for (Index i = 0; i < r * r; ++i) outside.data[i] -= inside.data[i];
    add_column_products(of_row, combined(arena, outside, pair.rows_B, m), pair.rows_B, r, m);
    for (Index j = 0; j < n; ++j) column[j] += T(1 - beta2) * (std::max(of_column[j], T(0)) / T(m) - column[j]);
    for (Index i = 0; i < m; ++i) row[i] += T(1 - beta2) * (std::max(of_row[i], T(0)) / T(n) - row[i]);
}

double bias_correction(double beta, double steps) { return -std::expm1(std::max(steps, 1.0) * std::log(beta)); }

// Adam's direction `u = diag(by_row) left^T right diag(by_column)`; see `adam_direction`.
template <class T> struct AdamDirection {
    Pair<T>& pair;
    T *by_row, *by_column;
    Matrix inner;  // (r, 2r)

    AdamDirection(Pair<T>& pair, const T* column, const T* row, double steps, const Options& o)
        : pair(pair), by_row(pair.arena.template take<T>(pair.m)), by_column(pair.arena.template take<T>(pair.n)),
          inner(pair.arena, pair.r, 2 * pair.r) {
        const Index r = pair.r, m = pair.m, n = pair.n;
        const double grown_1 = bias_correction(o.beta1, steps), grown_2 = bias_correction(o.beta2, steps);
        const T grown = T(grown_2), eps = T(o.eps);
        double mean = 0;
        for (Index j = 0; j < n; ++j) mean += double(column[j] / grown);
        const T overall = T((std::sqrt(mean / n) + o.eps) / grown_1);
        for (Index j = 0; j < n; ++j) {
            const T root = std::sqrt(column[j] / grown) + eps;
            by_column[j] = root > 0 ? overall / root : T(0);
        }
        for (Index i = 0; i < m; ++i) {
            const T root = std::sqrt(row[i] / grown) + eps;
            by_row[i] = root > 0 ? 1 / root : T(0);
        }
        T* weighted = copy_of(pair.arena, pair.rows_A, r * n);
        times(weighted, by_column, n);
        inner = cross(pair.arena, weighted, r, pair.right, 2 * r, n);
    }

    T* through_A(const Matrix& weights) {
        T* rows = combined(pair.arena, product(pair.arena, weights, inner), pair.left, pair.m);
        times(rows, by_row, pair.m);
        return rows;
    }

    T* rest_through_B(const Matrix& weights, const T* rows_B) {
        const Matrix through = product(pair.arena, weights, through_B(rows_B));
        T* rows = combined(pair.arena, through, pair.right, pair.n);
        times(rows, by_column, pair.n);
        const Matrix inside = product(pair.arena, through, transposed(pair.arena, inner));
        combine(pair.arena, rows, scaled(pair.arena, inside, -1), pair.rows_A, pair.n, true);
        return rows;
    }

    Factors<T> coordinates() {
        T* a = combined(pair.arena, through_B(pair.rows_B), pair.right, pair.n);
        times(a, by_column, pair.n);
        T* b = combined(pair.arena, inner, pair.left, pair.m);
        times(b, by_row, pair.m);
        pair.leave_columns_of_B(b);
        return {a, b};
    }

  private:
    Matrix through_B(const T* rows_B) {
        T* weighted = copy_of(pair.arena, rows_B, pair.r * pair.m);
        times(weighted, by_row, pair.m);
        return cross(pair.arena, weighted, pair.r, pair.left, 2 * pair.r, pair.m);
    }

    void times(T* rows, const T* factors, Index k) {
        for (Index i = 0; i < pair.r; ++i)
            for (Index j = 0; j < k; ++j) rows[i * k + j] *= factors[j];
    }
};

template <class T> void factored(const Stack& stack, const LoraproState& state, const Options& o) {
    const Index r = stack.r, m = stack.m, n = stack.n;
    for_each_pair<T>(stack, state, [&](Pair<T>& pair, Index entry) {
        T *M_a = static_cast<T*>(state.first_A) + entry * r * n, *M_b = static_cast<T*>(state.first_B) + entry * r * m;
        T *column = static_cast<T*>(state.second_A) + entry * n, *row = static_cast<T*>(state.second_B) + entry * m;
        update_second_moments(pair, column, row, o.beta2);
        blend(pair.arena, pair.a, pair.of_B, M_a, o.beta1, n);
        blend(pair.arena, pair.b, pair.of_A, M_b, o.beta1, m);
        AdamDirection<T> u(pair, column, row, state.steps[entry], o);
        Factors<T> after{};
        if (o.sequential) {
            after = spend_direction(
                pair, [&](const Matrix& weights) { return u.through_A(weights); },
                [&](const Matrix& weights, const Basis&, const T* rows) { return u.rest_through_B(weights, rows); }, o);
        } else {
            const Factors<T> of_u = u.coordinates();
            after = linear_step(pair, factor_gradients(pair, of_u.A, of_u.Bt, o.x_mode), o);
        }
        transport(pair, NewBases<T>(pair, after), M_a, M_b);
        store(pair, after);
    });
}

}  // namespace

LORAPRO_EXPORT(factored)
