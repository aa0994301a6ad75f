"""Upcycling: the weights of a trained model as the first weights of one with more experts or untied weights.

    dense → experts / MoMa      every expert a copy of the dense feed-forward
    1t1i → NtNi                 every expert of a group a copy of the group's one (MoMa, arXiv 2407.21770 §2.4)
    tied → untied               every modality a copy of the shared weight
    block → MoD round it        the block inside is the old one
    text → text and images      ids keep their vectors under their new numbers; new ids, and the stems and heads of what
                                carries none, keep their first values (LMFusion, arXiv 2412.15188, starts so too)

What has no counterpart (routers of another number of experts, auxiliary routers) keeps its first values; copies of one
expert part ways through the router's noise (`router: {noise: gumbel}`) or its random start. The optimiser starts anew:
moments of one weight say nothing about N copies that see other tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from zoo.config import UserError
from zoo.experts import RoutedExperts
from zoo.heads import IdHead
from zoo.roles import Role, parameter_roles
from zoo.slots import Depth, Head, Stem
from zoo.stems import IdStem

FRESH = {Role.ROUTER, Role.AUXILIARY}
"""What may keep its first values; so may buffers, which no gradient trains."""


@dataclasses.dataclass(frozen=True)
class Upcycled:
    """First weights of the new model, and where each came from."""

    weights: dict[str, Tensor]
    origin: dict[str, str]
    """Name in the new model → name in the old one; absent for what keeps its first value."""


def upcycle(old: Mapping[str, Tensor], new: nn.Module, ids: Tensor | None = None) -> Upcycled:
    """Fill a new model's weights from an old one's; the new model itself is left as it is.

    Args:
        old: whole weights of the trained model by name.
        new: the model with its first weights; gives names, roles, shapes, and what stays fresh.
        ids: (V,) int64, which id of the old model each of the new one's is, −1 for none (`Vocabulary.ids_in`); default:
            they are the same.
    Raises:
        UserError: a weight of the new model has no counterpart of a shape it can be copied from.
    """
    roles, sources = parameter_roles(new), _Sources(new)
    weights, origin, ends = {}, {}, _own_ends(new)
    for name, value in new.state_dict().items():
        found = next((source for source in sources.of(name) if source.name in old), None)
        role = roles.get(name)
        if found is None and name in ends:
            weights[name] = value
            continue
        if ids is not None and role in (Role.EMBEDDING, Role.HEAD) and found is not None:
            known = (ids >= 0).to(value.device)
            weights[name], origin[name] = value.clone(), found.name
            weights[name][known] = old[found.name][ids[ids >= 0]].to(value.dtype)
            continue
        if (role is None or role in FRESH) and (found is None or old[found.name].shape != value.shape):
            # also a router of one expert: N copies of its column would choose the same tokens for all N experts
            weights[name] = value
            continue
        copied = None if found is None else _spread(found.laid_out(old[found.name], role, value), value)
        if found is None or copied is None:
            raise UserError(_problem(name, value, found, old))
        weights[name], origin[name] = copied.to(value.dtype).clone(), found.name
    return Upcycled(weights, origin)


def _own_ends(new: nn.Module) -> set[str]:
    """Names of the weights of stems and heads of modalities whose positions carry no ids."""
    parts = [(name, part) for name, part in new.named_modules() if isinstance(part, Stem | Head)]
    return {
        f"{name}.{weight}"
        for name, part in parts
        if not isinstance(part, IdStem | IdHead)
        for weight, _ in part.named_parameters()
    }


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where an old model may hold a weight."""

    name: str
    dense: bool = False
    """The linear map of a dense feed-forward, stored (out, in); stacked experts are (E, in, out)."""

    def laid_out(self, value: Tensor, role: Role | None, target: Tensor) -> Tensor:
        """The old `value`, laid out as the new weight `target` of this role is."""
        if self.dense:
            return value.transpose(-1, -2)
        if role is Role.MODALITY_BIAS and target.shape[0] % value.shape[0] == 0:
            return value.repeat(target.shape[0] // value.shape[0])
        return value


class _Sources:
    """Names under which an old model may hold what a new one's weights come from."""

    def __init__(self, new: nn.Module) -> None:
        modules = list(new.named_modules())
        lists = [(name, part) for name, part in modules if isinstance(part, nn.ModuleList)]
        self.layers = {f"{name}.{i}.": layer for name, part in lists for i, layer in enumerate(part)}
        self.experts = {
            f"{name}.groups.{group}.experts.{weight}": (f"groups.{group}.experts.{weight}", weight)
            for name, part in modules
            if isinstance(part, RoutedExperts)
            for group in part.groups
            for weight in ("w_in", "w_out")
        }

    def of(self, name: str) -> Iterator[_Source]:
        """Best first: of the same name, from inside or outside an MoD wrapper; each time itself, the dense feed-forward
        that became experts, or the one group that became several."""
        tail, weight = self.experts.get(name, ("", ""))
        for same in self._moved(name):
            yield _Source(same)
            if weight:
                path = same.removesuffix(tail)
                yield _Source(f"{path}{weight}.weight", dense=True)
                yield _Source(f"{path}groups.all.experts.{weight}")

    def _moved(self, name: str) -> Iterator[str]:
        yield name
        for prefix, layer in self.layers.items():
            if name.startswith(prefix):
                rest = name.removeprefix(prefix)
                if not isinstance(layer, Depth):
                    yield f"{prefix}block.{rest}"
                elif rest.startswith("block."):
                    yield prefix + rest.removeprefix("block.")


def _spread(source: Tensor, target: Tensor) -> Tensor | None:
    """`source` in the shape of `target`: as it is, copied along a new first axis, or along one of length 1."""
    if source.shape == target.shape:
        return source
    if source.dim() + 1 == target.dim() and source.shape == target.shape[1:]:
        return source.expand(target.shape)
    if source.dim() == target.dim() and source.shape[0] == 1 and source.shape[1:] == target.shape[1:]:
        return source.expand(target.shape)
    return None


def _problem(name: str, value: Tensor, found: _Source | None, old: Mapping[str, Tensor]) -> str:
    shape = tuple(value.shape)
    if found is None:
        return f"upcycle: {name} {shape} has no counterpart; the recipes may differ in experts, untying and depth alone"
    there = f"{found.name} {tuple(old[found.name].shape)}"
    return f"upcycle: {name} {shape} cannot be copied from {there}; keep widths and heads"
