// One pair of factors in the caches of a thread: its equivalent gradient, and the ways from a direction to new factors.
//
// The formulas are those of `lorapro_hf.functional`, where they are derived; the names are the same.
#pragma once

#include "rows.hpp"

extern "C" {

// Pairs of one shape; `native_steps.py` has the same fields in the same order.
struct LoraproStack {
    Index entries, r, m, n, threads;
    const Index *A, *B, *grad_A, *grad_B;  // addresses of each pair's matrices (r, n) and (m, r); 0 without gradients
    const double* scaling;
    double rtol;    // negative for the default
    double* bases;   // (entries, 2, r + 1, r): eigenvectors and singular values of A and of B
    double* across;  // (entries, 2, r, r): the products of the gradients with the factors
    double* norms;   // (entries, 3): of a, of b, and of the core of the equivalent gradient
};

struct LoraproOptions {
    double lr_A, lr_B, keep_A, keep_B;
    double beta1, beta2, eps;
    Index sequential, x_mode, iterations;
    double clipped, skip, reach;  // a reach of 0: projected gradients in mode efficient
};

// The state of all pairs of a stack, and which of them step.
struct LoraproState {
    void *first_A, *first_B, *second_A, *second_B, *escape_A, *escape_B;
    const float* steps;  // this step included
    const bool* active;
    const double* longest;  // null for no limit
};

}  // extern "C"

// Makes a step `name<T>(stack, state, options)` a function of the library for both dtypes.
#define LORAPRO_EXPORT(name)                                                                                           \
    extern "C" void lorapro_##name##_float32(const LoraproStack* s, const LoraproState* state, const LoraproOptions* o) { \
        name<float>(*s, *state, *o);                                                                                   \
    }                                                                                                                  \
    extern "C" void lorapro_##name##_float64(const LoraproStack* s, const LoraproState* state, const LoraproOptions* o) { \
        name<double>(*s, *state, *o);                                                                                  \
    }

namespace {

enum XMode : Index { ZERO, SYMMETRIC, SYLVESTER };

using Stack = LoraproStack;
using Options = LoraproOptions;

// ---- one pair ----

Basis kept_basis(Arena& arena, const Stack& stack, Index entry, Index side) {
    const Index r = stack.r;
    const double* kept = stack.bases + (2 * entry + side) * (r + 1) * r;
    Basis basis(arena, r);
    std::copy_n(kept, r * r, basis.vectors.data), std::copy_n(kept + r * r, r, basis.singular);
    basis.fill();
    return basis;
}

double longest_step(const LoraproState& state, Index entry) {
    return state.longest == nullptr ? std::numeric_limits<double>::infinity() : state.longest[entry];
}

template <class T> struct Pair {
    Arena& arena;
    const Stack& stack;
    const Index r, m, n;
    const double s, longest;
    T *A, *B;          // as they are stored, (r, n) and (m, r)
    T* Bt;             // (r, m)
    Basis of_A, of_B;
    T *left, *right;   // (2r, m) and (2r, n): [B^; b] and [a; A^], whose product is the equivalent gradient
    T *rows_A, *rows_B, *a, *b;

    Pair(Arena& arena, const Stack& stack, const LoraproState& state, Index entry)
        : arena(arena), stack(stack), r(stack.r), m(stack.m), n(stack.n), s(stack.scaling[entry]),
          longest(longest_step(state, entry)),
          A(reinterpret_cast<T*>(stack.A[entry])), B(reinterpret_cast<T*>(stack.B[entry])), Bt(arena.take<T>(r * m)),
          of_A(kept_basis(arena, stack, entry, 0)), of_B(kept_basis(arena, stack, entry, 1)),
          left(arena.take<T>(2 * r * m)), right(arena.take<T>(2 * r * n)),
          rows_A(right + r * n), rows_B(left), a(right), b(left + r * m) {
        transpose(Bt, B, m, r);
    }

    // The equivalent gradient in the bases of the factors; see `gradient_coordinates`.
    void find_coordinates(Index entry) {
        combine(arena, rows_A, transposed(arena, of_A.whitening), A, n);
        combine(arena, rows_B, transposed(arena, of_B.whitening), Bt, m);
        const T* grad_A = reinterpret_cast<const T*>(stack.grad_A[entry]);
        T* grad_Bt = arena.take<T>(r * m);
        transpose(grad_Bt, reinterpret_cast<const T*>(stack.grad_B[entry]), m, r);
        combine(arena, a, scaled(arena, transposed(arena, of_B.whitening), 1 / s), grad_A, n);
        combine(arena, b, scaled(arena, transposed(arena, of_A.whitening), 1 / s), grad_Bt, m);
        leave_columns_of_B(b);
    }

    // Removes the part of rows (r, m) that lies in the column space of B.
    void leave_columns_of_B(T* rows) {
        combine(arena, rows, scaled(arena, cross(arena, rows, r, rows_B, r, m), -1), rows_B, m, true);
    }

    Matrix core() { return cross(arena, a, r, rows_A, r, n); }
};

// Runs `work` on each pair that has gradients and, if given, is active; threads take pairs as they come.
template <class Work> void for_each_entry(const Stack& stack, const bool* active, Work work) {
#pragma omp parallel num_threads(int(stack.threads))
    {
        Arena arena;
#pragma omp for schedule(dynamic, 1)
        for (Index entry = 0; entry < stack.entries; ++entry) {
            if (stack.grad_A[entry] == 0 || (active != nullptr && !active[entry])) continue;
            arena.reset();
            work(arena, entry);
        }
    }
}

template <class T, class Work> void for_each_pair(const Stack& stack, const LoraproState& state, Work work) {
    for_each_entry(stack, state.active, [&](Arena& arena, Index entry) {
        Pair<T> pair(arena, stack, state, entry);
        pair.find_coordinates(entry);
        work(pair, entry);
    });
}

// ---- from a direction to new factors ----

template <class T> struct Factors {
    T *A, *Bt;
};

// Leaves of the core of a direction the fraction that B moves; A moves the rest.
void take_fraction_of_B(const Matrix& core, const Basis& of_A, const Basis& of_B, Index x_mode) {
    for (Index i = 0; i < core.rows; ++i)
        for (Index j = 0; j < core.columns; ++j) {
            const double tau = of_A.singular[j], length = std::hypot(tau, of_B.singular[i]);
            const double ratio = length > 0 ? tau / length : length * 0;
            core(i, j) *= x_mode == ZERO ? 0 : x_mode == SYMMETRIC ? 0.5 : ratio * ratio;
        }
}

// Directions of the factors whose coordinates are a and b, which are overwritten; see `factor_gradients_`.
template <class T> Factors<T> factor_gradients(Pair<T>& pair, T* a, T* b, Index x_mode) {
    Arena& arena = pair.arena;
    const Matrix core = cross(arena, a, pair.r, pair.rows_A, pair.r, pair.n);
    take_fraction_of_B(core, pair.of_A, pair.of_B, x_mode);
    combine(arena, a, scaled(arena, core, -1), pair.rows_A, pair.n, true);
    combine(arena, b, transposed(arena, core), pair.rows_B, pair.m, true);
    return {combined(arena, scaled(arena, pair.of_B.whitening, 1 / pair.s), a, pair.n),
            combined(arena, scaled(arena, pair.of_A.whitening, 1 / pair.s), b, pair.m)};
}

template <class T> void scale(T* values, Index count, double factor) {
    for (Index i = 0; i < count; ++i) values[i] *= T(factor);
}

// `step += keep * factor`.
template <class T> void settle(T* step, const T* factor, double keep, Index count) {
    for (Index i = 0; i < count; ++i) step[i] += T(keep) * factor[i];
}

// Schatten norm of order 16 of a product `L R`, given `L^T L` and `R R^T`; see `functional.step_limit`.
double schatten_16(Arena& arena, const Matrix& left, const Matrix& right) {
    const Index k = left.rows;
    double* lengths = arena.take<double>(k);
    double size = 0;
    for (Index i = 0; i < k; ++i) {
        lengths[i] = std::sqrt(left(i, i));
        size += left(i, i) * right(i, i);
    }
    if (size == 0) return 0;
    Matrix of_left(arena, k, k), of_right(arena, k, k);
    for (Index i = 0; i < k; ++i)
        for (Index j = 0; j < k; ++j) {
            const double length = lengths[i] * lengths[j];
            of_left(i, j) = lengths[i] == 0 || lengths[j] == 0 ? 0 : left(i, j) / lengths[i] / lengths[j];
            of_right(i, j) = right(i, j) * length / size;
        }
    const Matrix of_unit = product(arena, of_left, of_right), square = product(arena, of_unit, of_unit);
    const Matrix fourth = product(arena, square, square);
    const double trace = inner(fourth, transposed(arena, fourth));
    return std::sqrt(size) * std::pow(trace < 0 ? 0 : trace, 1.0 / 16);
}

// The fraction of a step that may be taken, given `A A^T` and `B^T B` too; see `functional.step_limit`.
template <class T>
double kept_fraction(Arena& arena, const Stack& stack, Factors<const T> old, Factors<const T> step, const Matrix& of_A,
                     const Matrix& of_B, double longest) {
    const Index r = stack.r, m = stack.m, n = stack.n;
    const Matrix square_A = gram(arena, step.A, r, n), across_A = exact_cross(arena, step.A, r, old.A, r, n);
    const Matrix square_B = gram(arena, step.Bt, r, m), across_B = exact_cross(arena, step.Bt, r, old.Bt, r, m);
    Matrix left(arena, 2 * r, 2 * r), right(arena, 2 * r, 2 * r);  // of the rows of dB and B + dB, of A and dA
    for (Index i = 0; i < r; ++i)
        for (Index j = 0; j < r; ++j) {
            right(i, j) = of_A(i, j), right(r + i, r + j) = square_A(i, j);
            right(r + i, j) = right(j, r + i) = across_A(i, j);
            const double beside = across_B(i, j) + square_B(i, j);
            left(i, j) = square_B(i, j), left(r + i, r + j) = of_B(i, j) + across_B(j, i) + beside;
            left(i, r + j) = left(r + j, i) = beside;
        }
    const double length = schatten_16(arena, left, right);
    return length > longest ? longest / length : 1;
}

// The same for changes of a pair in the directions of its bases.
template <class T> double kept_fraction(Pair<T>& pair, const T* step_A, const T* step_Bt) {
    const Matrix of_A = gram_of(pair.arena, pair.of_A), of_B = gram_of(pair.arena, pair.of_B);
    return kept_fraction<T>(pair.arena, pair.stack, {pair.A, pair.Bt}, {step_A, step_Bt}, of_A, of_B, pair.longest);
}

// New factors after a step along h, which they overwrite; see `linear_step`.
template <class T> Factors<T> linear_step(Pair<T>& pair, Factors<T> h, const Options& o) {
    const Index r = pair.r, m = pair.m, n = pair.n;
    Arena& arena = pair.arena;
    scale(h.A, r * n, -o.lr_A), scale(h.Bt, r * m, -o.lr_B);
    if (std::isfinite(pair.longest)) {
        const double kept = kept_fraction<T>(pair, h.A, h.Bt);
        scale(h.A, r * n, kept), scale(h.Bt, r * m, kept);
    }
    settle(h.A, pair.A, o.keep_A, r * n), settle(h.Bt, pair.Bt, o.keep_B, r * m);
    return h;
}

// The same after a sequential step; see `spend_direction`. `through_A(W)` gives rows (r, m), and
// `rest_through_B(W, basis, rows)` rows (r, n) for the basis of the new B and its rows (r, m).
template <class T, class ThroughA, class RestThroughB>
Factors<T> spend_direction(Pair<T>& pair, ThroughA through_A, RestThroughB rest_through_B, const Options& o) {
    const Index r = pair.r, m = pair.m, n = pair.n;
    Arena& arena = pair.arena;
    const double kept_s = pair.s * o.keep_A, moved = kept_s != 0 ? o.lr_B / kept_s : 0;
    T* new_Bt = through_A(scaled(arena, pair.of_A.whitening, -moved));
    const bool is_limited = std::isfinite(pair.longest);
    T* step_Bt = is_limited ? copy_of(arena, new_Bt, r * m) : nullptr;
    settle(new_Bt, pair.Bt, o.keep_B, r * m);
    const Basis basis = basis_of(arena, new_Bt, r, m, pair.stack.rtol);
    const T* rows = combined(arena, transposed(arena, basis.whitening), new_Bt, m);
    T* new_A = rest_through_B(scaled(arena, basis.whitening, -o.lr_A / pair.s), basis, rows);
    if (is_limited) {
        const double kept = kept_fraction<T>(pair, new_A, step_Bt);
        scale(new_A, r * n, kept), scale(step_Bt, r * m, kept);
        settle(step_Bt, pair.Bt, o.keep_B, r * m);
        new_Bt = step_Bt;
    }
    settle(new_A, pair.A, o.keep_A, r * n);
    return {new_A, new_Bt};
}

// The bases of new factors, with their rows.
template <class T> struct NewBases {
    Basis of_A, of_B;
    T *rows_A, *rows_B;

    NewBases(Pair<T>& pair, Factors<T> factors)
        : of_A(basis_of(pair.arena, factors.A, pair.r, pair.n, pair.stack.rtol)),
          of_B(basis_of(pair.arena, factors.Bt, pair.r, pair.m, pair.stack.rtol)),
          rows_A(combined(pair.arena, transposed(pair.arena, of_A.whitening), factors.A, pair.n)),
          rows_B(combined(pair.arena, transposed(pair.arena, of_B.whitening), factors.Bt, pair.m)) {}
};

template <class T> void store(Pair<T>& pair, Factors<T> factors) {
    std::copy_n(factors.A, pair.r * pair.n, pair.A);
    transpose(pair.B, factors.Bt, pair.r, pair.m);
}

}  // namespace
