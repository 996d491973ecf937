"""Layers called one by one by a rank that has parts of their weights, in a program that all ranks run at once."""

# t: tensor of the graph, v: variable

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from tfpar.comm.in_program import Gang, of_equal_parts
from tfpar.compat import _keras_calls, _keras_parts
from tfpar.errors import ModelError
from tfpar.graph.alike import attributes
from tfpar.graph.keras_graph import KerasGraph
from tfpar.graph.recording import RecordingScope
from tfpar.graph.tf_graph import traced
from tfpar.planning.cost import Hardware
from tfpar.planning.sharding import REPLICATED, Layout
from tfpar.tensor_parallel.inline_layers import has_rule, of_other
from tfpar.tensor_parallel.parallelize import Choice, with_caches
from tfpar.tensor_parallel.rank_graph import in_program, is_collective

LANE = -1  # stands for the number of the lane among the tensors of a graph


class LayerCalls(RecordingScope):
    """Inside, each call of a layer with divided weights computes this rank's part, and gives what the layer gives.

    Caches, arguments of which the name says so, may be divided too: a layer is given its rank's part of one, or all of
    it, and hands on the part.

    Args:
        values: of each variable, what the rank has.
        plans: of the calls, the same for all ranks.
        lane: the number of the rank, a scalar.
    """

    def __init__(self, values: Sequence[tuple[keras.Variable, tf.Tensor]], plans: "LayerPlans", lane: tf.Tensor):
        super().__init__(values)
        self.values, self.plans, self.lane, self.gang = values, plans, lane, plans.gang
        self.inside = False  # whether ranks are computing their parts of a layer

    def get_current_value(self, variable):
        """A variable's value; where no layer computes parts, all of it."""
        value = super().get_current_value(variable)
        layout = self.plans.layouts.get(id(variable), REPLICATED)
        if self.inside or layout == REPLICATED:
            return value
        return self.gang.exchanged("all-gather", "tensor", value, self.lane, ("whole", variable.path), layout.dim)

    def __call__(self, function: Callable, layer: keras.layers.Layer, args: tuple, kwargs: dict) -> Any:
        """What a layer makes of its arguments, in place of its `__call__`."""
        divided = any(id(v) in self.plans.layouts for v in layer.variables)
        if self.inside or not divided or isinstance(layer, keras.Model):
            return function(layer, *args, **kwargs)
        arguments = inspect.signature(layer.call).bind(*args, **kwargs).arguments
        arguments = {name: x for name, x in sorted(arguments.items()) if x is not None}  # as `tree` flattens them
        flat = [(name, x) for name, value in arguments.items() for x in tree.flatten(value) if tf.is_tensor(x)]
        graph, layouts = self.plans.of(layer, arguments, flat)
        tensors = {LANE: self.lane}
        for (_, x), t in zip(flat, graph.graph.inputs, strict=True):
            whole = layouts[t] != REPLICATED and not x.shape.is_compatible_with(graph.symbols[t].shape)
            tensors[t] = self.gang.own_part("tensor", x, self.lane, layouts[t].dim) if whole else x
        self.inside = True
        try:
            with _keras_parts.shaped(self.values), _keras_calls.telling(layer, False):
                for call in graph.calls:
                    call(tensors, False)
        finally:
            self.inside = False
        return tree.map_structure(lambda t: tensors[t], graph.outputs)


class LayerPlans:
    """What each rank runs of layers, by what they are called with.

    Args:
        layouts: of the variables that are divided, by `id`.
        gang: the ranks.
        hardware: for the estimates of cost.
    """

    def __init__(self, layouts: Mapping[int, Layout], gang: Gang, hardware: Hardware):
        self.layouts, self.gang, self.hardware = layouts, gang, hardware
        self.plans: dict[Any, tuple[KerasGraph, Any]] = {}
        self.traces: dict[Any, tuple[Any, KerasGraph]] = {}  # of layers that are alike, the first
        self.choices: dict[Any, Choice] = {}  # of layers that are alike, too
        self.caches: dict[Any, tuple[tuple, Layout]] = {}  # by layer, argument and shape of a part, the whole's

    def of(
        self, layer: Any, arguments: dict[str, Any], flat: list[tuple[str, tf.Tensor]]
    ) -> tuple[KerasGraph, dict[int, Layout]]:
        """What the rank runs for such arguments, and the layouts of its inputs.

        Raises:
            ModelError: it cannot be run in one program.
        """
        mine = [(id(layer), name, tuple(x.shape)) for name, x in flat]
        known = [self.caches.get(key, (key[2], None)) for key in mine]
        symbols = [keras.KerasTensor(shape, x.dtype.name) for (shape, _), (_, x) in zip(known, flat, strict=True)]
        others = attributes(tree.map_structure(lambda x: "tensor" if tf.is_tensor(x) else x, arguments))
        kind = str(([(s.shape, s.dtype) for s in symbols], others))
        if (id(layer), kind) not in self.plans:
            alike = str((attributes(layer), kind))
            graph = self.traced(layer, arguments, symbols, alike)
            layouts = {v: self.layouts.get(id(variable), REPLICATED) for v, variable in enumerate(graph.variables)}
            names = zip(graph.graph.inputs, flat, symbols, strict=True)
            caches = {t for t, (name, _), symbol in names if "cache" in name and len(symbol.shape) > 1}
            layout = next((layout for _, layout in known if layout), None)
            choice = alike, str(layouts), layout
            local, self.choices[choice] = with_caches(
                graph, self.gang.mesh.tensor, self.hardware, layouts, caches, layout, self.choices.get(choice)
            )
            layout = self.choices[choice].layout
            self.check_exchanges(layer, local)
            inputs = zip(graph.graph.inputs, local.graph.inputs, mine, known, strict=True)
            of_inputs = {}
            for t, here, (_, name, _), (shape, _) in inputs:
                of_inputs[here] = layout if t in caches else REPLICATED
                if of_inputs[here] != REPLICATED:
                    self.caches[id(layer), name, tuple(local.symbols[here].shape)] = shape, layout
            calls = tuple(in_program(call, self.gang, LANE) for call in local.calls)
            self.plans[id(layer), kind] = replace(local, calls=calls), of_inputs
        return self.plans[id(layer), kind]

    def traced(self, layer: Any, arguments: Any, symbols: Sequence[Any], alike: str) -> KerasGraph:
        """What a layer runs for such arguments, as all do of which `alike` is the same."""

        def run(*values):
            left = iter(values)
            return layer(**tree.map_structure(lambda x: next(left) if tf.is_tensor(x) else x, arguments))

        if alike not in self.traces:
            with _keras_calls.telling(layer, False):
                self.traces[alike] = layer, traced(run, symbols, has_rule)
        return of_other(*self.traces[alike], layer)

    def check_exchanges(self, layer: Any, graph: KerasGraph):
        """Check that the exchanges of a layer can be in a program.

        Raises:
            ModelError: they cannot, and why.
        """
        why = of_equal_parts([call.operation for call in graph.calls if is_collective(call)], self.gang.mesh)
        if why:
            raise ModelError(f"{layer.name} cannot run on {self.gang.mesh.tensor} ranks in one program: {why}")
