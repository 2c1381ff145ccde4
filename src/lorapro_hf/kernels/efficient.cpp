// Mode efficient; see `optim.rules.efficient`.
#include "chunks.hpp"

namespace {

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

}  // namespace

LORAPRO_EXPORT(efficient)
