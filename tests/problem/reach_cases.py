"""Models whose parameters have two names, or are read past their modules."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rows(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 6, generator=generator).to(dtype), torch.randint(3, (16,), generator=generator)


class Shared(nn.Module):
    """A part of the network registered again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.backbone = self.net[:2]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Wrapper(nn.Module):
    """One module under two names, as Fabric's."""

    def __init__(self) -> None:
        super().__init__()
        self._forward_module = self._original_module = Shared()

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_module(x)


class Tied(nn.Module):
    """Two layers with one weight, and a list of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 6).double(), nn.Linear(6, 6).double(), nn.Linear(6, 3).double()
        self.second.weight = self.first.weight
        self.layers = nn.ModuleList([self.first, self.second])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


class Unused(Shared):
    """With a layer that takes no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2).double()


class Listed(Shared):
    """Reads a weight from a list, where nothing can be substituted."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.net[2].weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.backbone(x), self.weights[0], self.net[2].bias)


class OnlyParameters(Shared):
    """Takes a weight into account only where it is a parameter: it is neither seen nor replaced in our graph."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.net[2].weight
        return F.linear(self.backbone(x), weight if isinstance(weight, nn.Parameter) else weight.detach(), self.net[2].bias)


def dense_by_live_parameters(model: nn.Module) -> Tensor:
    """The Hessian of the mean loss by double backward through the model's own parameters, nothing substituted."""
    x, y = rows()
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = F.cross_entropy(model(x), y)
    parts = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True, allow_unused=True)
    gradient = torch.cat([part.flatten() for part in parts])
    lines = []
    for entry in gradient:
        if not entry.requires_grad:
            lines.append(torch.zeros_like(gradient))
            continue
        line = torch.autograd.grad(entry, leaves, retain_graph=True, materialize_grads=True, allow_unused=True)
        lines.append(torch.cat([part.flatten() for part in line]))
    return torch.stack(lines).detach()
