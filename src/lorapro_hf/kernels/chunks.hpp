// Factors and gradients read where they lie, some columns at a time.
#pragma once

#include "pairs.hpp"

namespace {

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

}  // namespace
