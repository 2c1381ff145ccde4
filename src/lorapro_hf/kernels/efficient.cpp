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

// Weights that lengthen a change of A; see `lengthened`.
Matrix lengthening(Arena& arena, const Basis& B, Index n, const Options& o) {
    const Index r = B.vectors.rows;
    double* factors = arena.take<double>(r);
    for (Index i = 0; i < r; ++i) {
        const double square = B.singular[i] * B.singular[i] + double(n) * o.lr_A * o.lr_A;
        factors[i] = std::sqrt(1 + o.reach * o.reach / std::max(square, double(std::numeric_limits<float>::min())));
    }
    return product(arena, columns_times(arena, B.vectors, factors), transposed(arena, B.vectors));
}

// Weights by which a change of A acts through the new B as it acts through the old one; see `change_through`.
template <class T> Matrix through_new_B(Arena& arena, const Stack& stack, Index entry, const T* old_Bt, const Options& o) {
    const Index r = stack.r, m = stack.m;
    T* new_Bt = arena.take<T>(r * m);
    transpose(new_Bt, stored_B<T>(stack, entry).factor, m, r);
    const Basis basis = basis_of(arena, new_Bt, r, m, stack.rtol);
    const T* rows = combined(arena, transposed(arena, basis.whitening), new_Bt, m);
    return product(arena, basis.whitening, scaled(arena, cross(arena, rows, r, old_Bt, r, m), o.keep_B));
}

// Multiplies the change of A by weights.
template <class T> void change_again(Arena& arena, T* A, const T* old_A, const Matrix& weights, Index n, const Options& o) {
    const Index r = weights.columns;
    T* change = arena.take<T>(r * n);
    for (Index i = 0; i < r * n; ++i) {
        const T decayed = T(o.keep_A) * old_A[i];
        change[i] = A[i] - decayed;
        A[i] = decayed;
    }
    combine(arena, A, weights, change, n, true);
}

// AdamW of both factors along their projected gradients.
template <class T> void step_projected(Arena& arena, const Stack& stack, Index entry, const Adam<T>& adam_A,
                                       const Adam<T>& adam_B, const Options& o) {
    const Index r = stack.r;
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
    step_factor(arena, stored_A<T>(stack, entry), lifted<T>(arena, product(arena, of_Bt, P), of_Bt),
                lifted<T>(arena, scaled(arena, on_A, -1), A.whitening), adam_A);
    step_factor(arena, stored_B<T>(stack, entry), lifted<T>(arena, product(arena, of_A, Q), of_A),
                lifted<T>(arena, on_B, B.whitening), adam_B);
}

// Shortens a step that is longer than `longest`; see `functional.step_limit`.
template <class T>
void keep_within(Arena& arena, const Stack& stack, Index entry, const T* old_A, const T* old_Bt, double longest, const Options& o) {
    const Index r = stack.r, m = stack.m, n = stack.n;
    T *A = stored_A<T>(stack, entry).factor, *B = stored_B<T>(stack, entry).factor;
    T *step_A = copy_of(arena, A, r * n), *step_Bt = arena.take<T>(r * m);
    transpose(step_Bt, B, m, r);
    settle(step_A, old_A, -o.keep_A, r * n), settle(step_Bt, old_Bt, -o.keep_B, r * m);
    const double kept = kept_fraction<T>(
        arena, stack, {old_A, old_Bt}, {step_A, step_Bt}, gram(arena, old_A, r, n), gram(arena, old_Bt, r, m), longest);
    if (!(kept < 1)) return;
    scale(step_A, r * n, kept), scale(step_Bt, r * m, kept);
    settle(step_A, old_A, o.keep_A, r * n), settle(step_Bt, old_Bt, o.keep_B, r * m);
    std::copy_n(step_A, r * n, A);
    transpose(B, step_Bt, r, m);
}

// The options of B follow those of A in memory.
template <class T> void efficient(const Stack& stack, const LoraproState& state, const Options& o) {
    const Options& of_B = (&o)[1];
    const Index r = stack.r, m = stack.m, n = stack.n;
    for_each_entry(stack, state.active, [&](Arena& arena, Index entry) {
        const double step = state.steps[entry];
        const Adam<T> adam_A(state.first_A, state.second_A, entry * r * n, o.lr_A, o.keep_A, step, o);
        const Adam<T> adam_B(state.first_B, state.second_B, entry * r * m, o.lr_B, o.keep_B, step, of_B);
        const Stored<T> A = stored_A<T>(stack, entry), B = stored_B<T>(stack, entry);
        const double longest = longest_step(state, entry);
        const bool is_limited = std::isfinite(longest);
        const T* old_A = copy_of(arena, A.factor, r * n);
        T* old_Bt = nullptr;
        if (o.sequential || is_limited) {
            old_Bt = arena.take<T>(r * m);
            transpose(old_Bt, B.factor, m, r);
        }
        if (o.reach == 0) {
            step_projected(arena, stack, entry, adam_A, adam_B, o);
        } else {
            adam_A.step(A.factor, A.gradient, 0, r * n), adam_B.step(B.factor, B.gradient, 0, r * m);
        }
        if (o.reach != 0 || o.sequential) {
            Matrix weights = o.sequential ? through_new_B(arena, stack, entry, old_Bt, o) : Matrix(arena, 0, 0);
            if (o.reach != 0) {
                const Matrix longer = lengthening(arena, kept_basis(arena, stack, entry, 1), n, o);
                weights = o.sequential ? product(arena, weights, longer) : longer;
            }
            change_again(arena, A.factor, old_A, weights, n, o);
        }
        if (is_limited) keep_within<T>(arena, stack, entry, old_A, old_Bt, longest, o);
    });
}

}  // namespace

LORAPRO_EXPORT(efficient)
