"""Quantized linears of a checkpoint under the names that a server gives to its layers.

A checkpoint names linears as Transformers does. A server may rename modules, and joins linears that
read one tensor into one layer: ``qkv_proj`` stands for ``q_proj``, ``k_proj`` and ``v_proj``. This
module decides which linears a layer consists of. A linear of the checkpoint that no layer takes, or
a layer that is neither quantized nor stored, would run with random numbers, so both are refused.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fgmp.errors import CheckpointError
from fgmp.pack.checkpoint import CheckpointConfig, SiteConfig

Rename = Callable[[str], str | None]
"""Name of a module or tensor in the server, by its name in the checkpoint; None: left out."""


@dataclass(frozen=True)
class Parts:
    """Linears of the checkpoint that make up one layer of a server, in the order of its rows.

    Attributes:
        linears: their names in the checkpoint.
        owner: the linear that holds their site's constants.
        site: the site's entry in config.json.
    """

    linears: tuple[str, ...]
    owner: str
    site: SiteConfig


class Linears:
    """Quantized linears by the server's names, and which of them layers have taken.

    Args:
        config: the checkpoint's configuration.
        tensors: names of all tensors in its files.
        rename: changes names before the server's own changes.
    """

    def __init__(
        self, config: CheckpointConfig, tensors: Iterable[str], rename: Rename = lambda name: name
    ) -> None:
        self._sites = config.sites
        self._owner_of = {
            name: owner for owner, site in config.sites.items() for name in site.linears
        }
        names = {name: name for name in self._owner_of}
        weights = (name for name in tensors if name.endswith(".weight"))
        self._linears = _renamed(names, rename)
        self._weights = _renamed({name: name for name in weights}, rename)
        self._taken: set[str] = set()
        self._unread = set(self._owner_of)

    def rename(self, rename: Rename) -> None:
        """Apply the server's changes of names."""
        self._linears = _renamed(self._linears, rename)
        self._weights = _renamed(self._weights, rename)

    def take(self, layer: str, parts: Mapping[str, list[str]]) -> Parts | None:
        """Linears that make up a layer; None: the layer is not quantized.

        Args:
            layer: the server's name of the layer.
            parts: last names of joined linears, by last name of the layer.

        Raises:
            CheckpointError: some of its linears are quantized and others are not, or they read
                different sites.
        """
        names = self._parts(layer, parts)
        quantized = [name for name in names if name in self._linears]
        if not quantized:
            return None
        if quantized != names:
            missing = next(name for name in names if name not in self._linears)
            raise CheckpointError(
                f"{layer}: all of {', '.join(map(_last, names))} must be quantized or none, since "
                f"vLLM computes them as one product, but {missing} is not quantized"
            )
        linears = tuple(self._linears[name] for name in names)
        owners = {self._owner_of[name] for name in linears}
        if len(owners) > 1:
            raise CheckpointError(
                f"{layer}: {', '.join(map(_last, names))} must read one site, since vLLM computes "
                f"them as one product, got {', '.join(sorted(owners))}"
            )
        self._taken |= set(quantized)
        owner = owners.pop()
        return Parts(linears, owner, self._sites[owner])

    def require_weight(self, layer: str, parts: Mapping[str, list[str]]) -> None:
        """Check that the files hold the weights of a layer that is not quantized.

        Raises:
            CheckpointError: names the first weight that is missing.
        """
        for name in self._parts(layer, parts):
            if f"{name}.weight" not in self._weights:
                raise CheckpointError(
                    f"{layer}: vLLM needs {name}, which the checkpoint holds neither quantized nor "
                    "as a weight of this name: vLLM has another structure for this model"
                )

    def require_all_taken(self) -> None:
        """Check that every quantized linear is part of a layer.

        Raises:
            CheckpointError: names the first one that is not.
        """
        if others := sorted(self._linears.keys() - self._taken):
            raise CheckpointError(
                f"{self._linears[others[0]]}: no layer of vLLM's model takes this quantized linear "
                f"(nor {len(others) - 1} others): vLLM has another structure for this model"
            )

    def mark_read(self, parts: Parts) -> bool:
        """Note that the weights of a layer were read; whether those of all layers were, now."""
        self._unread.difference_update(parts.linears)
        return not self._unread

    def _parts(self, layer: str, parts: Mapping[str, list[str]]) -> list[str]:
        if layer in self._linears:
            return [layer]
        parent, dot, last = layer.rpartition(".")
        return [f"{parent}{dot}{part}" for part in parts.get(last, [last])]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _renamed(names: Mapping[str, str], rename: Rename) -> dict[str, str]:
    """The same values under new keys."""
    new = {rename(name): value for name, value in names.items()}
    return {name: value for name, value in new.items() if name is not None}
