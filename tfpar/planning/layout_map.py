"""Layouts of weights as a user wrote them, in the words of `keras.distribution.LayoutMap`."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from tfpar.errors import LayoutError
from tfpar.planning.op_graph import Variable
from tfpar.planning.sharding import REPLICATED, Layout

AXIS = "tensor"


def layouts_of(
    asked: Any, variables: Sequence[Variable], layers: Sequence[Sequence[int]], ranks: int
) -> dict[int, Layout] | None:
    """The layout that each of these variables is to have, by index; `None` for `"auto"`.

    A variable that no key matches is replicated, unless one matches another variable of its layer: then its layout is
    left to the search.

    Args:
        asked: `"auto"`, a `keras.distribution.LayoutMap`, or a mapping. A key is a path or a regular expression over
            paths; a value has an entry for each dim, the axis that divides it or `None`.
        layers: for each layer, the indices of its variables.
        ranks: how many divide variables between them.

    Raises:
        LayoutError: no mapping, a device mesh of another shape, a key that matches nothing, a value that does not fit
            what its key matches, or two keys that contradict each other.
    """
    if isinstance(asked, str) and asked == "auto":
        return None
    axis, written = axis_of(asked, ranks), {key: getattr(axes, "axes", axes) for key, axes in asked.items()}
    known_axes: Sequence[str] = getattr(getattr(asked, "device_mesh", None), "axis_names", (axis,))
    found: dict[int, tuple[str, Layout]] = {}
    for key, axes in written.items():
        matched = [v for v, variable in enumerate(variables) if variable.path == key or re.search(key, variable.path)]
        if not matched:
            near = difflib.get_close_matches(key, [v.path for v in variables], n=1, cutoff=0.0)
            raise LayoutError(f"the layout for {key!r} matches no weight; the nearest path is {', '.join(near)!r}")
        for v in matched:
            layout = layout_by(key, axes, variables[v], axis, known_axes, ranks)
            other, known = found.get(v, (key, layout))
            if known != layout and variables[v].path not in (key, other):
                raise LayoutError(
                    f"{variables[v].path} is {known} by {other!r}, and {layout} by {key!r}: make one of them match less"
                )
            if v not in found or variables[v].path == key:  # the whole path wins over a pattern
                found[v] = key, layout
    free = {v for layer in layers if not found.keys().isdisjoint(layer) for v in layer}
    rest = [v for v in range(len(variables)) if v not in found and v not in free]
    return {**dict.fromkeys(rest, REPLICATED), **{v: layout for v, (_, layout) in found.items()}}


def axis_of(asked: Any, ranks: int) -> str:
    """The name of the axis that divides weights.

    Raises:
        LayoutError: no mapping, or a device mesh that has not `ranks` devices along one axis and one along the others.
    """
    if not hasattr(asked, "items"):
        raise LayoutError(
            f'layout is "auto", a keras.distribution.LayoutMap, or a mapping such as '
            f'{{"dense/kernel": (None, "{AXIS}")}}; received {asked!r}'
        )
    mesh = getattr(asked, "device_mesh", None)
    if mesh is None:
        return AXIS
    sizes = dict(zip(mesh.axis_names, mesh.shape, strict=True))
    name = next((n for n in (AXIS, "model") if n in sizes), max(sizes, key=lambda axis: sizes[axis]))
    others = {n: size for n, size in sizes.items() if n != name and size > 1}
    if sizes[name] != ranks or others:
        raise LayoutError(
            f"the device mesh of this LayoutMap is {sizes}; the strategy has {ranks} devices, all of them along "
            f"{name!r}: use keras.distribution.DeviceMesh((1, {ranks}), ('batch', {name!r}), devices)"
        )
    return name


def layout_by(
    key: str, axes: Sequence[str | None], variable: Variable, axis: str, known: Sequence[str], ranks: int
) -> Layout:
    """The layout that a key and its value give to a variable.

    Args:
        axes: an entry for each dim.
        axis: the name of the axis that divides variables, one of those that are `known`.

    Raises:
        LayoutError: not an entry for each dim, an unknown axis, several divided dims, or one whose size is no multiple
            of `ranks`.
    """
    if len(axes) != len(variable.shape):
        raise LayoutError(
            f"{key!r} gives {len(axes)} axes, {tuple(axes)}, but {variable.path} has the shape {variable.shape}"
        )
    wrong = [name for name in axes if name is not None and name not in known]
    if wrong:
        raise LayoutError(
            f"{key!r} names the axis {wrong[0]!r}; an entry is None, or {axis!r} for the dim that ranks divide"
        )
    dims = [d for d, name in enumerate(axes) if name == axis]
    if len(dims) > 1:
        raise LayoutError(f"{key!r} divides {variable.path} along {len(dims)} dims, {tuple(axes)}: one is possible")
    if dims and variable.shape[dims[0]] % ranks:
        raise LayoutError(
            f"{key!r} divides dim {dims[0]} of {variable.path} {variable.shape}, of size {variable.shape[dims[0]]}, "
            f"between {ranks} ranks: it is no multiple of {ranks}. Leave it out, or use another number of devices"
        )
    return Layout(*dims)
