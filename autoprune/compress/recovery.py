"""Recovery without gradients: least squares of the following layers, and BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from autoprune.compress.layers import BatchNorm, device_of, submodule
from autoprune.compress.statistics import LayerStatistics
from autoprune.compress.surgery import Plan, kept_channels
from autoprune.space.groups import Groups

# Ridge as a share of the mean variance of the kept inputs, and how often it is made ten times larger where the
# matrix is still singular.
_RIDGE = 1e-3
_RIDGE_TRIES = 4


def solve_following_layers(
    dense: nn.Module,
    pruned: nn.Module,
    groups: Groups,
    plan: Plan,
    statistics: LayerStatistics,
    *,
    refreshed: bool = True,
) -> list[str]:
    r"""Let the kept inputs of every cut layer make up for the dropped ones, in closed form and in place.

    For each convolution or linear layer that lost inputs, finds the weights on its kept inputs :math:`K` that
    come nearest to the dense layer's outputs on calibration data,

    .. math:: \min_D E\lVert W_P x_P - D x_K \rVert^2 + \lambda \lVert D \rVert^2, \quad W'_K = W_K + D

    with :math:`P` the dropped inputs; the ridge pulls towards the dense weights, not towards zero. The
    second moments are the dense network's, so losses that earlier cuts cause are not seen [He2017]_. Where
    the layer has a bias or a BatchNorm follows, moments are central: a bias takes the shift of the mean, and
    else the BatchNorm will (:func:`refresh_batchnorm`). Rows of outputs that are cut are left out.

    Args:
        dense: The dense network.
        pruned: Its cut copy, whose weights are changed.
        groups: The dense network's groups.
        plan: The kept units that ``pruned`` was made with.
        statistics: Of the dense network.
        refreshed: Whether :func:`refresh_batchnorm` comes next, so that a BatchNorm takes up a shift of the mean.

    Returns:
        Names of the layers that were solved, in the order of the modules. Layers without a Gram matrix
        (grouped, depthwise and transposed convolutions, or too many inputs) are left as they were cut.

    References:
        [He2017] Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017.
    """
    kept = kept_channels(dense, groups, plan)
    before_norm = statistics.before_batchnorm if refreshed else frozenset()
    solved = []
    for name, module in dense.named_modules():
        gram = statistics.gram.get(name)
        if gram is None or "in" not in kept.get(name, {}) or not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        target = submodule(pruned, name)
        outputs = kept[name].get("out", list(range(module.weight.shape[0])))
        if _solve_layer(
            module, target, gram.double(), kept[name]["in"], outputs, central=name in before_norm
        ):
            solved.append(name)
    return solved


@torch.no_grad()
def _solve_layer(
    dense: nn.Conv2d | nn.Linear,
    target: nn.Module,
    gram: Tensor,
    inputs: Sequence[int],
    outputs: Sequence[int],
    *,
    central: bool,
) -> bool:
    taps = dense.weight[0, 0].numel()
    features = len(gram) - 1
    kept = (torch.tensor(inputs)[:, None] * taps + torch.arange(taps)).flatten()
    is_dropped = torch.ones(features, dtype=torch.bool)
    is_dropped[kept] = False
    dropped = is_dropped.nonzero().flatten()
    mean = gram[:features, features]
    moments = gram[:features, :features]
    if central or dense.bias is not None:
        moments = moments - torch.outer(mean, mean)
    weight = dense.weight.detach().double().cpu().flatten(1)[torch.tensor(outputs)]
    addition = solve_ridge(moments[kept][:, kept], moments[kept][:, dropped] @ weight[:, dropped].T)
    if addition is None:
        return False
    solved = weight[:, kept] + addition.T
    assert isinstance(target, nn.Conv2d | nn.Linear)  # noqa: S101
    target.weight.copy_(solved.reshape(target.weight.shape))
    if target.bias is not None:
        target.bias.add_((weight @ mean - solved @ mean[kept]).to(target.bias))
    return True


def solve_ridge(moments: Tensor, right: Tensor) -> Tensor | None:
    r"""Solve :math:`(M + \lambda I) X = R` with a ridge that is raised until the matrix is regular.

    Args:
        moments: Positive semi-definite ``M``, ``(n, n)``, float64.
        right: ``R``, ``(n, m)``.

    Returns:
        ``X``, ``(n, m)``; None if no ridge helps or the result is not finite.
    """
    scale = float(moments.diagonal().mean())
    if not scale > 0:
        return None
    ridge = _RIDGE * scale
    for _ in range(_RIDGE_TRIES):
        factor, failed = torch.linalg.cholesky_ex(
            moments + ridge * torch.eye(len(moments), dtype=moments.dtype)
        )
        if int(failed) == 0:
            solution = torch.cholesky_solve(right, factor)
            if bool(torch.isfinite(solution).all()):
                return solution
        ridge *= 10
    return None


@torch.no_grad()
def refresh_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Estimate the running statistics of all BatchNorms anew, as the mean over ``batches`` weighted by examples.

    Args:
        model: The network; its mode and momenta are as before afterwards. One without BatchNorm is not run.
        batches: Inputs; one example at the end joins the batch before it, for it has no variance.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        device = device_of(model)
        seen = 0
        for inputs in _without_single(batches):
            seen += len(inputs)
            for norm in norms:
                norm.momentum = len(inputs) / seen
            model(inputs.to(device))
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _without_single(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    held: Tensor | None = None
    for inputs in batches:
        if held is not None and len(inputs) == 1:
            held = torch.cat([held, inputs])
            continue
        if held is not None:
            yield held
        held = inputs
    if held is not None:
        yield held
