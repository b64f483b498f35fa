"""Cholesky factors of second moments, singular ones too: dead neurons, constant inputs, fewer tokens than inputs."""

import torch
from torch import Tensor

from pilon_compress.errors import BadInput

FIRST_DAMPING = {torch.float64: 1e-14, torch.float32: 1e-7}  # relative damping of the first attempt after the plain one
DAMPING_GROWTH = 10.0
MOST_DAMPING = 1.0


def damped_cholesky(matrix: Tensor, name: str = "a second moment", upper: bool = False) -> Tensor:
    """Return the Cholesky factor (d, d) of a symmetric matrix that is positive semidefinite up to rounding.

    The plain factor where there is one, bit for bit. Otherwise the smallest of a series of dampings that makes the
    matrix positive definite, relative to its mean diagonal, is added to the diagonal; zero gives the identity's factor.
    Raises BadInput, with `name`, for a matrix that is not finite or has no positive diagonal to damp by.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix, upper=upper)
    if not int(failed) and bool(factor.isfinite().all()):
        return factor
    if not bool(matrix.isfinite().all()):
        raise BadInput(f"the calibration statistics of {name} are NaN or infinite: it cannot be converted")
    mean = float(matrix.diagonal().mean())
    if not bool(matrix.any()):
        return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    damping = FIRST_DAMPING.get(matrix.dtype, FIRST_DAMPING[torch.float32])
    while mean > 0 and damping <= MOST_DAMPING:
        damped = matrix.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped, upper=upper)
        if not int(failed) and bool(factor.isfinite().all()):
            return factor
        damping *= DAMPING_GROWTH
    raise BadInput(f"the calibration statistics of {name} are no second moment: it cannot be converted")


def damped_inverse(matrix: Tensor, name: str = "a second moment") -> Tensor:
    """Return the inverse (d, d) of such a matrix, by `damped_cholesky`.

    By way of the factor's inverse: `torch.cholesky_inverse` is seven times as slow from a thousand rows up.
    """
    lower = damped_cholesky(matrix, name)
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)
    return inverse.T @ inverse


def damped_solve(matrix: Tensor, right: Tensor, name: str = "a second moment") -> Tensor:
    """Return the solution X (d, m) of `matrix` X = `right` (d, m) for such a matrix.

    By LU factors where they exist and give finite numbers; else by `damped_cholesky`.
    """
    solution, failed = torch.linalg.solve_ex(matrix, right)
    if not int(failed) and bool(solution.isfinite().all()):
        return solution
    return torch.cholesky_solve(right, damped_cholesky(0.5 * (matrix + matrix.T), name))
