"""Convolutions: by output channels (columns) or input channels (rows); depthwise ones by channels."""

from collections.abc import Iterator
from typing import Any

from keras import layers

from tfpar.compat._keras_layers import kernel
from tfpar.graph.keras_graph import Ref
from tfpar.planning.layout_search import Option
from tfpar.planning.sharding import Layout
from tfpar.tensor_parallel.rank_graph import RankGraphBuilder
from tfpar.tensor_parallel.rules import Site, rule
from tfpar.tensor_parallel.rules.dense import End, WithoutEnd, by_rows
from tfpar.tensor_parallel.rules.elementwise import is_elementwise

NO_BIAS = {"use_bias": False}


def channels(site: Site) -> int:
    """The dim of the channels."""
    return len(site.outputs[0]) - 1 if site.layer.data_format == "channels_last" else 1


@rule(layers.Conv1D, layers.Conv2D, layers.Conv3D)
def convolution(site: Site) -> Iterator[Option]:
    """The kernel `(..., inputs, filters)` by filters or by inputs."""
    layer, at = site.layer, channels(site)
    if layer.groups != 1 or layer.lora_enabled:
        return
    if site.divides(layer.filters) and is_elementwise(layer.activation):
        build = by_filters(site, at)
        yield site.option("column-parallel", None, [Layout(at)], [(kernel(layer), -1), (layer.bias, 0)], build=build)
    if site.divides(site.inputs[0][at]):
        yield from by_rows(site, Layout(at), [(kernel(layer), -2)], at, NO_BIAS)


def by_filters(site: Site, at: int):
    """What each rank runs where it has some of the filters."""
    call = site.graph.calls[site.index]

    def build(local: RankGraphBuilder, inputs: list[int]) -> int:
        x = local.run(WithoutEnd(call, NO_BIAS), Ref(inputs[0]), like=site.op.outputs, layouts=[Layout(at)])
        return local.run(End(site.layer, at), Ref(x), like=site.op.outputs, layouts=[Layout(at)])

    return build


@rule(layers.DepthwiseConv1D, layers.DepthwiseConv2D)
def depthwise_convolution(site: Site) -> Iterator[Option]:
    """The kernel `(..., channels, multiplier)` by channels, as its input is."""
    layer, at = site.layer, channels(site)
    size = site.inputs[0][at]
    if site.divides(size) and (layer.depth_multiplier == 1 or not size % site.ranks) and elementwise(layer):
        yield site.option("channels", [Layout(at)], [Layout(at)], [(layer.kernel, -2), (layer.bias, 0)])


@rule(layers.SeparableConv1D, layers.SeparableConv2D)
def separable_convolution(site: Site) -> Iterator[Option]:
    """By channels of the input, which the pointwise kernel adds up, or by filters of the pointwise kernel."""
    layer, at = site.layer, channels(site)
    size = site.inputs[0][at]
    if site.divides(layer.filters) and elementwise(layer):
        weights = [(layer.pointwise_kernel, -1), (layer.bias, 0)]
        yield site.option("column-parallel", None, [Layout(at)], weights, build=by_filters(site, at))
    if site.divides(size) and (layer.depth_multiplier == 1 or not size % site.ranks):
        weights = [(layer.depthwise_kernel, -2), (layer.pointwise_kernel, -2)]
        yield from by_rows(site, Layout(at), weights, at, NO_BIAS)


def elementwise(layer: Any) -> bool:
    """Whether its activation treats channels one by one."""
    return is_elementwise(layer.activation)
