// First moments in the tangent space of the factors, in polar coordinates: modes factored and spectral.
#pragma once

#include "pairs.hpp"

namespace {

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

}  // namespace
