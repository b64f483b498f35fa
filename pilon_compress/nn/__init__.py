"""The PILON form as modules: banks of primitives, compositions, integers, ternary weights, layouts."""
