"""Pooling, padding, cropping and upsampling: each channel on its own."""

from collections.abc import Iterator

from keras import layers

from tfpar.planning.layout_search import Option
from tfpar.planning.sharding import Layout
from tfpar.tensor_parallel.rules import Site, rule

KINDS = [
    kind
    for dims in "123"
    for name in (
        "MaxPooling{}D", "AveragePooling{}D", "GlobalMaxPooling{}D", "GlobalAveragePooling{}D", "UpSampling{}D",
        "ZeroPadding{}D", "Cropping{}D", "SpatialDropout{}D",
    )
    if (kind := getattr(layers, name.format(dims), None)) is not None
]  # fmt: skip


@rule(*KINDS)
def by_channels(site: Site) -> Iterator[Option]:
    """Divided along the channels."""
    first = getattr(site.layer, "data_format", "channels_last") == "channels_first"
    before, after = (1 if first else len(shape) - 1 for shape in (site.inputs[0], site.outputs[0]))
    if site.divides(site.inputs[0][before]):
        yield site.option("channels", [Layout(before)], [Layout(after)])
