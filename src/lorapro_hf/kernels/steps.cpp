// The steps of the rules whose state has the size of the factors, one pair after the other, each in the caches of its
// thread. The formulas are those of `lorapro_hf.functional`, where they are derived; the names are the same.
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
    double lr_A, lr_B, keep_A, keep_B, trust_region;  // 0 for no trust region
    double beta1, beta2, eps;
    Index sequential, x_mode, iterations;
    double clipped, skip;
};

// The state of all pairs of a stack, and which of them step.
struct LoraproState {
    void *first_A, *first_B, *second_A, *second_B, *escape_A, *escape_B;
    const float* steps;  // this step included
    const bool* active;
};

}  // extern "C"

namespace {

constexpr double FRESH_START = 0.03;  // as in `functional.factor_steps`
constexpr double LENGTH = 0.2;        // as in `functional.spectral`
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

template <class T> struct Pair {
    Arena& arena;
    const Stack& stack;
    const Index r, m, n;
    const double s;
    T *A, *B;          // as they are stored, (r, n) and (m, r)
    T* Bt;             // (r, m)
    Basis of_A, of_B;
    T *left, *right;   // (2r, m) and (2r, n): [B^; b] and [a; A^], whose product is the equivalent gradient
    T *rows_A, *rows_B, *a, *b;

    Pair(Arena& arena, const Stack& stack, Index entry)
        : arena(arena), stack(stack), r(stack.r), m(stack.m), n(stack.n), s(stack.scaling[entry]),
          A(reinterpret_cast<T*>(stack.A[entry])), B(reinterpret_cast<T*>(stack.B[entry])), Bt(arena.take<T>(r * m)),
          of_A(kept_basis(arena, stack, entry, 0)), of_B(kept_basis(arena, stack, entry, 1)), left(arena.take<T>(2 * r * m)), right(arena.take<T>(2 * r * n)),
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

template <class T, class Work> void for_each_pair(const Stack& stack, const bool* active, Work work) {
    for_each_entry(stack, active, [&](Arena& arena, Index entry) {
        Pair<T> pair(arena, stack, entry);
        pair.find_coordinates(entry);
        work(pair, entry);
    });
}

// ---- before the step: bases and norms ----

constexpr Index CHUNK = 512;  // columns of rows in one pass: all quantities of a chunk stay in the first cache

// One factor and its gradient, as they are stored: A by rows, B by columns.
template <class T> struct Stored {
    T* factor;
    const T* gradient;
    Index r, k;
    bool by_columns;

    // Columns `start` to `start + width` of stored rows, as rows (r, width).
    void take(T* out, const T* stored, Index start, Index width) const {
        if (by_columns) return transpose(out, stored + start * r, width, r);
        for (Index i = 0; i < r; ++i) std::copy_n(stored + i * k + start, width, out + i * width);
    }
};

template <class T> Stored<T> stored_A(const Stack& stack, Index entry) {
    return {reinterpret_cast<T*>(stack.A[entry]), reinterpret_cast<const T*>(stack.grad_A[entry]), stack.r, stack.n, false};
}

template <class T> Stored<T> stored_B(const Stack& stack, Index entry) {
    return {reinterpret_cast<T*>(stack.B[entry]), reinterpret_cast<const T*>(stack.grad_B[entry]), stack.r, stack.m, true};
}

// `F F^T`, `G F^T` and `G G^T` of a factor F and its gradient G.
struct Products {
    Matrix square, across, of_gradient;
};

template <class T> Products products_of(Arena& arena, const Stored<T>& stored) {
    const Index r = stored.r;
    Products sums{Matrix(arena, r, r), Matrix(arena, r, r), Matrix(arena, r, r)};
    for (Matrix* sum : {&sums.square, &sums.across, &sums.of_gradient}) std::fill_n(sum->data, r * r, 0.0);
    T *F = arena.take<T>(r * CHUNK), *G = arena.take<T>(r * CHUNK);
    const auto add = [](const Matrix& sum, const Matrix& part) {
        for (Index i = 0; i < sum.size(); ++i) sum.data[i] += part.data[i];
    };
    for (Index start = 0; start < stored.k; start += CHUNK) {
        const Index width = std::min(CHUNK, stored.k - start);
        stored.take(F, stored.factor, start, width), stored.take(G, stored.gradient, start, width);
        add(sums.square, gram(arena, F, r, width));
        add(sums.across, cross(arena, G, r, F, r, width));
        add(sums.of_gradient, gram(arena, G, r, width));
    }
    return sums;
}

double squared_norm(const Matrix& matrix) { return inner(matrix, matrix); }

// The coordinates of the equivalent gradient are `a = P G_A` and `b = Q G_B - (Q G_B B^T) B^`.
template <class T> void measure(const Stack& stack) {
    const Index r = stack.r;
    for_each_entry(stack, nullptr, [&](Arena& arena, Index entry) {
        const Products A = products_of(arena, stored_A<T>(stack, entry)), B = products_of(arena, stored_B<T>(stack, entry));
        const Basis of_A = basis_of_gram<T>(arena, A.square, stack.n, stack.rtol);
        const Basis of_B = basis_of_gram<T>(arena, B.square, stack.m, stack.rtol);
        double *kept = stack.bases + entry * 2 * (r + 1) * r, *across = stack.across + entry * 2 * r * r;
        for (const Basis* basis : {&of_A, &of_B}) {
            kept = std::copy_n(basis->vectors.data, r * r, kept);
            kept = std::copy_n(basis->singular, r, kept);
        }
        std::copy_n(A.across.data, r * r, across), std::copy_n(B.across.data, r * r, across + r * r);
        const double s = stack.scaling[entry];
        const Matrix P = scaled(arena, transposed(arena, of_B.whitening), 1 / s);
        const Matrix Q = scaled(arena, transposed(arena, of_A.whitening), 1 / s);
        const Matrix core = product(arena, product(arena, P, A.across), of_A.whitening);
        const Matrix inside = product(arena, product(arena, Q, B.across), of_B.whitening);
        const double of_b = inner(product(arena, Q, B.of_gradient), Q) - squared_norm(inside);
        double* norms = stack.norms + 3 * entry;
        norms[0] = std::sqrt(std::abs(inner(product(arena, P, A.of_gradient), P)));
        norms[1] = of_b < 0 ? 0 : std::sqrt(of_b);
        norms[2] = std::sqrt(squared_norm(core));
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

double kept_fraction(double asked, double allowed) { return asked > allowed ? std::sqrt(allowed / asked) : 1; }

// New factors after a step along h, which they overwrite; see `linear_step`.
template <class T> Factors<T> linear_step(Pair<T>& pair, Factors<T> h, const Options& o) {
    const Index r = pair.r, m = pair.m, n = pair.n;
    Arena& arena = pair.arena;
    scale(h.A, r * n, -o.lr_A), scale(h.Bt, r * m, -o.lr_B);
    if (o.trust_region > 0) {
        const Matrix square_A = gram(arena, h.A, r, n), square_B = gram(arena, h.Bt, r, m);
        const Matrix across_A = exact_cross(arena, h.A, r, pair.A, r, n);
        const Matrix across_B = exact_cross(arena, h.Bt, r, pair.Bt, r, m);
        double first_order = o.keep_A * o.keep_A * inner(square_B, gram_of(arena, pair.of_A));
        first_order += o.keep_B * o.keep_B * inner(gram_of(arena, pair.of_B), square_A);
        first_order += 2 * o.keep_A * o.keep_B * inner(across_B, transposed(arena, across_A));
        const double allowed = o.trust_region * o.trust_region * std::max(first_order, 0.0);
        const double kept = kept_fraction(inner(square_B, square_A), allowed);
        const bool is_fresh = kept < FRESH_START * o.trust_region;
        scale(h.A, r * n, is_fresh ? 0 : kept), scale(h.Bt, r * m, is_fresh ? 1 : kept);
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
    const Matrix square_B = gram(arena, new_Bt, r, m);
    settle(new_Bt, pair.Bt, o.keep_B, r * m);
    const Basis basis = basis_of(arena, new_Bt, r, m, pair.stack.rtol);
    const T* rows = combined(arena, transposed(arena, basis.whitening), new_Bt, m);
    T* new_A = rest_through_B(scaled(arena, basis.whitening, -o.lr_A / pair.s), basis, rows);
    if (o.trust_region > 0) {
        const Matrix square_A = gram(arena, new_A, r, n);
        const double of_A = o.trust_region * o.keep_A, of_B = o.trust_region * o.keep_B;
        const double asked = inner(square_B, square_A) - of_B * of_B * inner(gram_of(arena, pair.of_B), square_A);
        scale(new_A, r * n, kept_fraction(asked, of_A * of_A * inner(square_B, gram_of(arena, pair.of_A))));
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

// ---- mode efficient ----

// AdamW of one factor; both moments lie as the factor does.
template <class T> struct Adam {
    T *first, *second;
    T beta1, beta2, rest1, rest2, eps, keep, rate, root;  // 1 - beta loses digits in T

    Adam(void* first, void* second, Index offset, double lr, double keep, double step, const Options& o)
        : first(static_cast<T*>(first) + offset), second(static_cast<T*>(second) + offset), beta1(T(o.beta1)),
          beta2(T(o.beta2)), rest1(T(1 - o.beta1)), rest2(T(1 - o.beta2)), eps(T(o.eps)), keep(T(keep)),
          rate(T(lr / (1 - std::pow(o.beta1, step)))), root(T(1 / std::sqrt(1 - std::pow(o.beta2, step)))) {}

    void step(T* values, const T* gradients, Index start, Index count) const {
        T *of_values = values + start, *M = first + start, *V = second + start;
#pragma omp simd
        for (Index i = 0; i < count; ++i) {
            const T g = gradients[i];
            M[i] = beta1 * M[i] + rest1 * g;
            V[i] = beta2 * V[i] + rest2 * g * g;
            of_values[i] = keep * of_values[i] - rate * M[i] / (std::sqrt(V[i]) * root + eps);
        }
    }
};

// Weights of rows. Where they leave the range of T, the rows are multiplied by a power of two, and the weights divided.
struct Lifted {
    Matrix weights;
    double lift;

    template <class T> void multiply(Arena& arena, T* out, T* rows, Index k, bool add) const {
        if (lift != 1) scale(rows, weights.columns * k, lift);
        combine(arena, out, weights, rows, k, add);
    }
};

double largest(const Matrix& matrix) {
    double found = 0;
    for (Index i = 0; i < matrix.size(); ++i) found = std::max(found, std::abs(matrix.data[i]));
    return found;
}

// `inverse` is the part of the weights whose size undoes that of the rows.
template <class T> Lifted lifted(Arena& arena, const Matrix& weights, const Matrix& inverse) {
    const double size = largest(weights), limit = std::sqrt(double(std::numeric_limits<T>::max()));
    if (size == 0 || (size < limit && size > 1 / limit)) return {weights, 1};
    const double lift = std::ldexp(1.0, std::ilogb(largest(inverse)));
    return {scaled(arena, weights, 1 / lift), lift};
}

// Steps a factor F along the direction `on_gradient G + on_factor F`.
template <class T>
void step_factor(Arena& arena, const Stored<T>& stored, const Lifted& on_gradient, const Lifted& on_factor, Adam<T> adam) {
    const Index r = stored.r;
    T *rows = arena.take<T>(r * CHUNK), *h = arena.take<T>(r * CHUNK), *back = arena.take<T>(r * CHUNK);
    for (Index start = 0; start < stored.k; start += CHUNK) {
        const Index width = std::min(CHUNK, stored.k - start);
        stored.take(rows, stored.gradient, start, width);
        on_gradient.multiply(arena, h, rows, width, false);
        stored.take(rows, stored.factor, start, width);
        on_factor.multiply(arena, h, rows, width, true);
        if (stored.by_columns) {
            transpose(back, h, r, width);
            adam.step(stored.factor, back, start * r, width * r);
        } else {
            for (Index i = 0; i < r; ++i) adam.step(stored.factor, h + i * width, i * stored.k + start, width);
        }
    }
}

// The new A, whose change acts through the new B as AdamW's change acts through the old one; see `change_through`.
template <class T>
void act_through_new_B(Arena& arena, const Stack& stack, Index entry, const T* old_A, const T* old_Bt, const Options& o) {
    const Index r = stack.r, m = stack.m, n = stack.n;
    T *new_Bt = arena.take<T>(r * m), *change = arena.take<T>(r * n), *A = stored_A<T>(stack, entry).factor;
    transpose(new_Bt, stored_B<T>(stack, entry).factor, m, r);
    const Basis basis = basis_of(arena, new_Bt, r, m, stack.rtol);
    const T* rows = combined(arena, transposed(arena, basis.whitening), new_Bt, m);
    const Matrix seen = scaled(arena, cross(arena, rows, r, old_Bt, r, m), o.keep_B);
    for (Index i = 0; i < r * n; ++i) {
        const T decayed = T(o.keep_A) * old_A[i];
        change[i] = A[i] - decayed;
        A[i] = decayed;
    }
    combine(arena, A, product(arena, basis.whitening, seen), change, n, true);
}

// The options of B follow those of A in memory.
template <class T> void efficient(const Stack& stack, const LoraproState& state, const Options& o) {
    const Options& of_B = (&o)[1];
    const Index r = stack.r, m = stack.m, n = stack.n;
    for_each_entry(stack, state.active, [&](Arena& arena, Index entry) {
        const Basis A = kept_basis(arena, stack, entry, 0), B = kept_basis(arena, stack, entry, 1);
        Matrix across_A(arena, r, r), across_B(arena, r, r);
        const double *across = stack.across + entry * 2 * r * r, s = stack.scaling[entry];
        std::copy_n(across, r * r, across_A.data), std::copy_n(across + r * r, r * r, across_B.data);
        const Matrix of_A = scaled(arena, A.whitening, 1 / s), of_Bt = scaled(arena, B.whitening, 1 / s);
        const Matrix P = transposed(arena, of_Bt), Q = transposed(arena, of_A);
        const Matrix core = product(arena, product(arena, P, across_A), A.whitening);
        take_fraction_of_B(core, A, B, o.x_mode);
        // h_A = of_Bt (a - core A^) and h_B = of_A (b + core^T B^), with the coordinates of `measure`
        const Matrix on_A = product(arena, product(arena, of_Bt, core), transposed(arena, A.whitening));
        const Matrix inside = product(arena, product(arena, Q, across_B), B.whitening);
        const Matrix rest = difference(arena, transposed(arena, core), inside);
        const Matrix on_B = product(arena, product(arena, of_A, rest), transposed(arena, B.whitening));
        const double step = state.steps[entry];
        const Adam<T> adam_A(state.first_A, state.second_A, entry * r * n, o.lr_A, o.keep_A, step, o);
        const Adam<T> adam_B(state.first_B, state.second_B, entry * r * m, o.lr_B, o.keep_B, step, of_B);
        const Stored<T> stored = stored_A<T>(stack, entry);
        T *old_A = nullptr, *old_Bt = nullptr;
        if (o.sequential) {
            old_A = copy_of(arena, stored.factor, r * n), old_Bt = arena.take<T>(r * m);
            transpose(old_Bt, stored_B<T>(stack, entry).factor, m, r);
        }
        step_factor(arena, stored, lifted<T>(arena, product(arena, of_Bt, P), of_Bt),
                    lifted<T>(arena, scaled(arena, on_A, -1), A.whitening), adam_A);
        step_factor(arena, stored_B<T>(stack, entry), lifted<T>(arena, product(arena, of_A, Q), of_A),
                    lifted<T>(arena, on_B, B.whitening), adam_B);
        if (o.sequential) act_through_new_B(arena, stack, entry, old_A, old_Bt, o);
    });
}

// ---- modes full and full_8bit: before and after the products of the direction ----

constexpr double ALL_DIRECTIONS = 1e-14;  // as in `functional.bases`

// The directions of B that the products are taken with: a sequential step may make any of them large enough.
template <class T> Basis basis_of_products(Pair<T>& pair, const Options& o) {
    return o.sequential ? basis_of(pair.arena, pair.Bt, pair.r, pair.m, ALL_DIRECTIONS) : pair.of_B;
}

// Writes `left` (2r, m) and `right` (2r, n), whose product is the equivalent gradient, to first_B and first_A, and the
// rows of the basis of B to second_B.
template <class T> void full_before(const Stack& stack, const LoraproState& state, const Options& o) {
    const Index r = stack.r, m = stack.m, n = stack.n;
    for_each_pair<T>(stack, state.active, [&](Pair<T>& pair, Index entry) {
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
    for_each_pair<T>(stack, state.active, [&](Pair<T>& pair, Index entry) {
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

// ---- first moments in the tangent space: modes factored and spectral ----

// `out = rest * rows + beta * V^T M` with the moment M in polar coordinates.
template <class T> void blend(Arena& arena, T* rows, const Basis& basis, const T* moment, double beta, Index k) {
    const Index r = basis.vectors.rows;
    scale(rows, r * k, 1 - beta);
    combine(arena, rows, scaled(arena, transposed(arena, basis.vectors), beta), moment, k, true);
}

// Writes the first moment `left^T right` of a pair in the polar coordinates of new bases; see `transport`.
template <class T> void transport(Pair<T>& pair, const NewBases<T>& bases, T* M_a, T* M_b) {
    const Index r = pair.r, m = pair.m, n = pair.n;
    Arena& arena = pair.arena;
    const Matrix through_B = cross(arena, bases.rows_B, r, pair.left, 2 * r, m);
    const Matrix through_A =
        product(arena, bases.of_A.vectors, cross(arena, bases.rows_A, r, pair.right, 2 * r, n));
    combine(arena, M_b, through_A, pair.left, m);
    const Matrix inside = product(arena, through_A, transposed(arena, through_B));
    combine(arena, M_b, scaled(arena, inside, -1), bases.rows_B, m, true);
    combine(arena, M_a, product(arena, bases.of_B.vectors, through_B), pair.right, n);
}

// ---- mode factored ----

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
    for_each_pair<T>(stack, state.active, [&](Pair<T>& pair, Index entry) {
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

// ---- mode spectral ----

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
    for_each_pair<T>(stack, state.active, [&](Pair<T>& pair, Index entry) {
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

// ---- mode rite ----

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
    for_each_pair<T>(stack, state.active, [&](Pair<T>& pair, Index entry) {
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

#define LORAPRO_STEP(name, suffix, T)                                                                                  \
    void lorapro_##name##_##suffix(const LoraproStack* stack, const LoraproState* state, const LoraproOptions* o) {    \
        name<T>(*stack, *state, *o);                                                                                   \
    }
#define LORAPRO_EXPORT(suffix, T)                                                                                      \
    void lorapro_measure_##suffix(const LoraproStack* stack) { measure<T>(*stack); }                                   \
    LORAPRO_STEP(efficient, suffix, T)                                                                                 \
    LORAPRO_STEP(full_before, suffix, T)                                                                               \
    LORAPRO_STEP(full_after, suffix, T)                                                                                \
    LORAPRO_STEP(factored, suffix, T)                                                                                  \
    LORAPRO_STEP(spectral, suffix, T)                                                                                  \
    LORAPRO_STEP(rite, suffix, T)

extern "C" {
LORAPRO_EXPORT(float32, float)
LORAPRO_EXPORT(float64, double)
}
