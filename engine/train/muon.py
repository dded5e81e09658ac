"""Muon (Jordan et al. 2024): momentum whose matrix is replaced by the nearest semi-orthogonal one,
so that every direction of a weight learns at one pace. For the matrices inside the blocks; vectors,
embeddings and heads stay with AdamW.

torch.optim.Muon computes the same update matrix by matrix and reads the learning rate on the host;
this one orthogonalises all matrices of a shape in one batch, and skips a non-finite step on the
device.
"""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at 0: singular values end in about [0.7, 1.2]
ITERATIONS = 5
BATCH_ELEMENTS = 2**24  # of one batch of matrices: bounds the scratch memory at 14B widths


def orthogonalize(matrices: Tensor) -> Tensor:
    """Newton-Schulz: X <- aX + (bA + cA^2)X with A = XX^T, from X of Frobenius norm 1, [N,R,C] ->
    [N,R,C]. In bf16; in fp32 on a CPU, where few have bf16 products: without them a step of the
    embedded model spent 4 s here, and in fp32 the whole step took 1.5."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if matrices.device.type != "cpu" else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Steps 2-D parameters by lr * sqrt(max(1, rows / columns)) along the orthogonalised Nesterov
    momentum. found_inf: 0-d fp32 tensor; where it is 1, `step` changes nothing, bit for bit.

    matrices: by name. sharding: the `engine.parallel.world.Sharding` whose ranks hold rows of each;
    all of them then orthogonalise the whole matrices."""

    def __init__(
        self,
        matrices: dict[str, Tensor],
        lr: float,
        weight_decay: float,
        sharding=None,
        momentum: float = 0.95,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(list(matrices.values()), defaults)
        self.found_inf: Tensor | None = None
        self.names = {p: name for name, p in matrices.items()}
        self.sharding = sharding

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault((self._rows(p), p.shape[1]), []).append(p)
            for (rows, columns), params in by_shape.items():
                size = max(1, BATCH_ELEMENTS // (rows * columns))
                for i in range(0, len(params), size):
                    self._update(params[i : i + size], rows / columns, group)

    def _rows(self, p: Tensor) -> int:
        """The number of rows of the whole matrix."""
        return len(p) if self.sharding is None else self.sharding.shards[self.names[p]].rows

    def _orthogonal(self, rows_NRC: Tensor, first: Tensor) -> Tensor:
        """This rank's rows of the orthogonalised matrices; `first` is one of their parameters."""
        if self.sharding is None:
            return orthogonalize(rows_NRC)
        name = self.names[first]
        whole_NRC = self.sharding.whole(name, rows_NRC.transpose(0, 1)).transpose(0, 1)
        start = self.sharding.shards[name].start
        return orthogonalize(whole_NRC)[:, start : start + len(first)]

    def _update(self, params: list[Tensor], aspect: float, group: dict) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        good = 1 - self.found_inf
        grads = torch.where(good > 0, torch.stack([p.grad for p in params]), 0.0)
        # A weight for each, since one 0-d tensor for all would be read on the host.
        torch._foreach_lerp_(buffers, list(grads), [(1 - group["momentum"]) * good] * len(buffers))
        mixed_NRC = grads.lerp(torch.stack(buffers), group["momentum"])
        updates = self._orthogonal(mixed_NRC, params[0])
        rate = group["lr"] * max(1.0, aspect) ** 0.5
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * good)
        torch._foreach_sub_(params, list(updates.to(params[0].dtype) * (rate * good)))
