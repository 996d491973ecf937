"""Meshes: coordinates, and what is refused."""

import pytest

from tfpar.errors import DeviceError
from tfpar.planning.mesh import Coordinate, Mesh

pytestmark = pytest.mark.fast


def test_neighbours():
    mesh = Mesh(data=2, stage=3, tensor=2).on([f"GPU:{i}" for i in range(12)])
    assert mesh.device(Coordinate(tensor=1)) == "GPU:1"
    assert mesh.device(Coordinate(stage=1)) == "GPU:2"
    assert mesh.device(Coordinate(data=1)) == "GPU:6"
    with pytest.raises(IndexError, match="Mesh.data=2, stage=3, tensor=2. has no Coordinate.data=0, stage=3"):
        mesh.device(Coordinate(stage=3))
    assert mesh.lanes == tuple(Coordinate(data=r, tensor=k) for r, k in ((0, 0), (0, 1), (1, 0), (1, 1)))
    assert mesh.along("stage", Coordinate(1, 2, 1)) == tuple(Coordinate(1, s, 1) for s in range(3))
    assert mesh.replicas == (Coordinate(), Coordinate(data=1)) and mesh.ranks == (Coordinate(), Coordinate(tensor=1))
    at = Coordinate(1, 0, 1)
    assert (at.replica, at.rank) == (Coordinate(data=1), Coordinate(tensor=1))
    assert (mesh.size, mesh.shape) == (12, (2, 1, 3, 2))
    assert str(mesh) == "Mesh(data=2, stage=3, tensor=2)"
    groups = Mesh(data=2, tensor=2, shard=3)
    assert groups.along("samples", Coordinate(tensor=1)) == tuple(
        Coordinate(data=d, shard=s, tensor=1) for d in range(2) for s in range(3)
    )
    assert (groups.count("samples"), groups.count("shard"), groups.count("weights")) == (6, 3, 2)
    assert len(groups.replicas) == 6 and groups.ranks == mesh.ranks
    assert str(Mesh()) == "Mesh(data=1)"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"stage": 0}, "at least 1; received stage=0"),
        ({"data": 1.5}, "received data=1.5"),
        ({"stage": 2, "devices": ("CPU:0", "CPU:0")}, "CPU:0 repeats"),
        ({"stage": 3, "devices": ("CPU:0", "CPU:1")}, "has 3 places, but 2 devices"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(DeviceError, match=message):
        Mesh(**arguments)


def test_on_gpus():
    assert Mesh(data=2, devices=("GPU:0", "GPU:1")).on_gpus
    assert not Mesh(data=2, devices=("GPU:0", "CPU:0")).on_gpus
    assert not Mesh(stage=4).on_gpus
