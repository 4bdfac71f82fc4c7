"""BatchNorm folded into convolutions: what crafting asks thousands of times answers faster."""

from collections import Counter
from copy import deepcopy
from inspect import signature

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from foreshot.compute import Compute
from foreshot.inference import place
from foreshot.models import EnsembleNetwork
from foreshot.models.base import Normalized


def frozen(model: nn.Module, compute: Compute) -> nn.Module:
    """A copy on the device: in eval mode, BatchNorm folded, no gradient to weights."""
    model = deepcopy(model).eval()
    fold(model)
    return place(model.requires_grad_(False), compute)


def fold(model: nn.Module) -> None:
    """Folds each BatchNorm that directly follows a convolution into it, in place.

    In eval mode, gamma * (w * x - mean) / sqrt(var + eps) + beta is one convolution with a bias.
    Every layer keeps its name, and its output but for the convolutions: theirs is that of the
    BatchNorm, which becomes the identity. What cannot be seen through stays as it is: networks
    whose forward depends on values, quantised or pruned layers, layers that are used twice.

    Args:
        model: in eval mode.
    """
    if isinstance(model, Normalized | EnsembleNetwork):  # they call their networks as wholes
        for network in model.children():
            fold(network)
        return
    layers = dict(model.named_modules())
    if not any(isinstance(layer, nn.BatchNorm2d) for layer in layers.values()):
        return
    arguments = signature(model.forward).parameters.values()
    given = {a.name: a.default for a in arguments if a.default is not a.empty}
    try:
        graph = fx.Tracer().trace(model, given)
    except Exception:  # whatever a forward raises that cannot be traced
        return
    uses = Counter(
        node.target if node.op == "call_module" else str(node.target).rpartition(".")[0]
        for node in graph.nodes
        if node.op in ("call_module", "get_attr")
    )
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        conv, norm = layers[str(source.target)], layers[str(node.target)]
        if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
            continue
        once = uses[source.target] == uses[node.target] == 1
        if not (once and _plain(conv) and _plain(norm)) or norm.training:
            continue
        if norm.running_mean is None or norm.running_var is None:
            continue  # it goes by the batch
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        # Whatever holds it, under whichever name or in a list, now holds the identity.
        norm.__class__ = nn.Identity  # pyright: ignore[reportAttributeAccessIssue]


def _plain(layer: nn.Module) -> bool:
    """Whether it is of torch's own class, and no hook changes what it does."""
    hooked = layer._forward_pre_hooks or layer._forward_hooks
    return type(layer) in (nn.Conv2d, nn.BatchNorm2d) and not hooked
