// Before a step: the bases of the factors, and the norms of the equivalent gradient.
#include "chunks.hpp"

namespace {

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

}  // namespace

extern "C" void lorapro_measure_float32(const LoraproStack* stack) { measure<float>(*stack); }
extern "C" void lorapro_measure_float64(const LoraproStack* stack) { measure<double>(*stack); }
