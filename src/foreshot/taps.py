"""Outputs of the named layers of any network."""

import re
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from foreshot.errors import ForeshotError, nearest


class Taps:
    """Outputs of named layers, caught while a network runs; the hooks go when this goes.

    A layer may return a tuple whose first item is its output.

    Raises:
        ForeshotError: the network has no such layer; or, from `collect`, it was not run, its output
            is no tensor, or the network changed it in place.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], role: str) -> None:
        self.names = sorted(set(names))
        self.role = role
        self._caught: dict[str, tuple[Any, int]] = {}
        layers = dict(network.named_modules())
        for name in self.names:
            if name not in layers:
                known = sorted(n for n in layers if n)
                short = [n for n in known if n.count(".") < 2]
                hint = nearest(name, known)
                hint = hint if hint.startswith("did") else f"expected one of {', '.join(short)}"
                raise ForeshotError(f"{role} layer {name!r}: {hint}")
            # The hook holds what is caught, not this object, which may go before the network.
            handle = layers[name].register_forward_hook(partial(_catch, self._caught, name))
            weakref.finalize(self, handle.remove)

    def collect(self) -> dict[str, Tensor]:
        """What was caught since the last call."""
        caught = dict(self._caught)
        self._caught.clear()
        features: dict[str, Tensor] = {}
        for name in self.names:
            place = f"{self.role} layer {name!r}"
            if name not in caught:
                raise ForeshotError(f"{place}: it did not run in the forward")
            output, version = caught[name]
            if not isinstance(output, Tensor):
                raise ForeshotError(f"{place}: expected a tensor, found {type(output).__name__}")
            if _version(output) != version:
                raise ForeshotError(
                    f"{place}: the network changes its output in place; name the layer after it"
                )
            features[name] = output
        return features


def _catch(
    caught: dict[str, tuple[Any, int]], name: str, _module: nn.Module, _inputs: Any, output: Any
) -> None:
    output = output[0] if isinstance(output, tuple | list) else output
    caught[name] = output, _version(output)


def _version(output: Any) -> int:
    """How often a tensor has been changed in place; a compiler cannot tell, nor does it have to."""
    return output._version if isinstance(output, Tensor) and not is_compiling() else 0


def stages(network: nn.Module, who: str) -> list[str]:
    """The names of a network's stages, in their order.

    Args:
        network: any network.
        who: the defence that needs them.

    Raises:
        ForeshotError: there are none.
    """
    named = [name for name, _ in network.named_modules() if re.search(r"(^|\.)layer\d+$", name)]
    if not named:
        raise ForeshotError(
            f"defence {who}: expected stages named layer1, layer2 and so on, "
            f"found {type(network).__name__} without"
        )
    return named
