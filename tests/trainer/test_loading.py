"""Weights have no values before they are needed, and what is loaded goes to its devices at once."""

import json

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from training import Own, build, compiled, data, history, mostly

import tfpar
from tfpar import Mesh
from tfpar.compat import _keras
from tfpar.planning.sharding import Sharding
from tfpar.testing import assert_same
from tfpar.trainer import placement
from tfpar.variables.parts import parts_of

pytestmark = pytest.mark.fast

LLAMA = dict(
    vocabulary_size=50, num_layers=2, num_query_heads=4, num_key_value_heads=2, hidden_dim=16, intermediate_dim=32
)
TOKENS = {"token_ids": np.arange(40).reshape(5, 8), "padding_mask": np.ones((5, 8), "int32")}
MESHES = {
    "tensor": lambda: tfpar.TensorParallelStrategy(["CPU:0", "CPU:1"]),
    "pipeline": lambda: tfpar.PipelineStrategy(["CPU:0", "CPU:1"], micro_batches=2),
    "data x tensor": lambda: tfpar.MeshStrategy(Mesh(data=2, tensor=2)),
    "zero 3": lambda: tfpar.MeshStrategy(Mesh(data=2), zero=3),
}


@pytest.fixture(params=mostly(list(MESHES), ["data x tensor", "pipeline"]))
def mesh(request):
    return MESHES[request.param]()


@pytest.fixture
def large(monkeypatch):
    """As if every model were a large one."""
    monkeypatch.setattr(placement, "FEW_BYTES", 0)


def stored(model):
    return [_keras.stored(v) for v in model.variables if not _keras.is_seed(v)]


def llama(**more):
    keras.utils.set_random_seed(5)
    return keras_hub.models.LlamaBackbone(**LLAMA, **more)


def bytes_on(model):
    """Bytes of weights on each device; of those that have a value."""
    found = {}
    for variable in stored(model):
        for copy in [] if variable.is_waiting else variable.copies:
            device = copy.device[-5:]
            found[device] = found.get(device, 0) + copy.shape.num_elements() * copy.dtype.size
    return found


def test_weights_wait_until_they_are_needed(mesh):
    """And begin as on one device, whenever that is."""
    one, other = compiled(), compiled(mesh)
    assert all(variable.is_waiting for variable in stored(other))
    np.testing.assert_array_equal(one.layers[1].kernel, other.layers[1].kernel)
    assert not stored(other)[0].is_waiting and stored(other)[1].is_waiting
    for model in (one, other):
        history(*data(), batch_size=10)(model)
    assert_same(one, other, 1e-5, 1e-7)
    assert not any(variable.is_waiting for variable in stored(other))


def test_planning_a_language_model_needs_few_values(mesh, large):
    """All of a large one would be more than the host has. One of the decoders may be tried, for all that are alike."""
    with mesh.scope():
        model = keras_hub.models.LlamaCausalLM(llama(), preprocessor=None)
    embedding, *others = model.variables
    embedding.assign(np.ones(embedding.shape))
    began = [variable.path for variable in others if not _keras.stored(variable).is_waiting]
    assert not _keras.stored(embedding).is_waiting
    assert all(path.startswith("transformer_layer_0/") for path in began)


def own_model():
    """One that looks after its training itself, and so is planned while a step is traced."""
    model = build()
    return Own(model.inputs, model.outputs)


@pytest.mark.parametrize("own", [False, True])
def test_only_training_creates_slots(mesh, own):
    """Adam's are twice the weights, which a model that predicts need not have room for."""
    made = dict(optimizer="adam", build=own_model if own else build)
    one, other = compiled(**made), compiled(mesh, **made)
    for model in (one, other):
        model.predict(data()[0], verbose=0)
        model.evaluate(*data(), verbose=0)
        assert not model.optimizer.built
        history(*data(), batch_size=10)(model)
    assert_same(one, other, 1e-5, 1e-7)


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_do_not_hold_on_to_the_whole(dim):
    """TensorFlow's rows of a tensor are a view of it: on the device where it was, all of it would stay."""
    value = tf.random.normal((8, 64))  # small parts are copied anyway
    parts = parts_of(value, Sharding({"tensor": dim}, Mesh(tensor=2)), 2)
    assert not any(np.shares_memory(value._numpy(), part._numpy()) for part in parts)


class Scale(keras.layers.Layer):
    """A layer that Keras must run to know what comes of it."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="glorot_uniform", name="scale")

    def call(self, x):
        return keras.ops.vectorized_map(lambda row: row * self.scale, x)


def test_symbolic_calls_need_no_values(mesh):
    """They read weights for their shapes."""

    def model():
        keras.utils.set_random_seed(1)
        x = keras.Input((6,))
        return keras.Model(x, keras.layers.Dense(3)(Scale()(keras.layers.Dense(6)(x))))

    with mesh.scope():
        other = model()
    assert all(variable.is_waiting for variable in stored(other))
    x, _ = data()
    np.testing.assert_allclose(other.predict(x, verbose=0), model().predict(x, verbose=0), rtol=1e-5)


def test_a_first_value_that_was_interrupted(mesh, monkeypatch):
    """It is made when it is needed next."""
    one, other = compiled(), compiled(mesh)
    variable = stored(other)[0]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tfpar.variables.placed.parts_of", raising)
        variable.numpy()
    assert variable.is_waiting
    np.testing.assert_array_equal(variable, one.layers[1].kernel)


def raising(*args):
    raise KeyboardInterrupt


def test_functions_and_checkpoints_see_weights_that_wait(strategy, tmp_path):
    one, other = compiled(), compiled(strategy)
    x, _ = data()
    np.testing.assert_allclose(tf.function(other)(x), one(x), rtol=1e-5)
    again = compiled(strategy)
    path = tf.train.Checkpoint(model=compiled(strategy)).write(str(tmp_path / "c"))
    for v in again.variables:
        v.assign(v + 1.0)
    tf.train.Checkpoint(model=again).read(path).assert_consumed()
    assert_same(one, again, 1e-6)


def test_what_is_loaded_goes_to_its_devices(mesh, large, tmp_path):
    """Before the model is used, and nothing of it stays in host memory."""
    one = llama()
    for n, v in enumerate(one.variables):
        v.assign(v + 0.01 * n)
    one.save_weights(tmp_path / "all.weights.h5")
    with mesh.scope():
        other = llama()
    other.load_weights(tmp_path / "all.weights.h5")
    found = bytes_on(other)
    assert len(found) == mesh.mesh.size
    plan = mesh.explain(other, batch_size=5)
    stages = plan.partition.stages
    assert max(found.values()) == max(plan.parameter_bytes(stage) for stage in range(stages))
    np.testing.assert_allclose(other.predict(TOKENS, verbose=0), one.predict(TOKENS, verbose=0), rtol=1e-4, atol=1e-5)
    assert bytes_on(other) == found
    assert_same(one, other, 0)


def test_a_larger_model_may_have_other_places(mesh, large, tmp_path):
    """The backbone is loaded first; the model that it is in is planned as a whole."""
    with mesh.scope():
        backbone = llama()
        backbone.set_weights([w + 0.01 for w in llama().get_weights()])
        assert len(bytes_on(backbone)) == mesh.mesh.size
        model = keras_hub.models.LlamaCausalLM(backbone=backbone)
    single = keras_hub.models.LlamaCausalLM(backbone=llama())
    single.set_weights([w + 0.01 for w in single.get_weights()])
    for each in (model, single):
        each.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
        each.fit(TOKENS, TOKENS["token_ids"], batch_size=5, verbose=0)
    assert_same(single, model, 1e-4, 1e-6)


def test_weights_that_a_causal_lm_is_given_one_by_one(mesh, large):
    """Its call is KerasHub's own, so that it is planned from the symbols of its inputs."""

    def build():
        return keras_hub.models.LlamaCausalLM(backbone=llama(), preprocessor=None)

    one = build()
    with mesh.scope():
        other = build()
    for weight, given in zip(other.weights, one.weights, strict=True):
        weight.assign(given)
    assert len(bytes_on(other)) == mesh.mesh.size
    assert_same(one, other, 0)


def test_small_models_wait_in_host_memory(mesh):
    """They need no plan before they are used."""
    other = compiled(mesh)
    other.set_weights(build().get_weights())
    assert set(bytes_on(other)) == {"CPU:0"}


def test_a_model_that_cannot_be_planned_is_loaded(large):
    """What is wrong with it is said when it is used."""
    strategy = tfpar.PipelineStrategy(["CPU:0", "CPU:1"], micro_batches=2, placement=["no such layer"])
    weights = build().get_weights()
    other = compiled(strategy)
    other.set_weights(weights)
    for a, b in zip(weights, other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(tfpar.TfparError, match="no such layer"):
        other.fit(*data(), verbose=0)


@pytest.mark.parametrize("shard", [None, 1e-5], ids=["one file", "shards"])
def test_presets(shard, mesh, large, tmp_path):
    """A folder that KerasHub wrote."""
    one = llama()
    one.save_to_preset(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.weights.json").exists() == bool(shard)
    with mesh.scope():
        other = keras_hub.models.LlamaBackbone.from_preset(str(tmp_path))
    assert len(bytes_on(other)) == mesh.mesh.size
    assert_same(one, other, 0)
    other.save_to_preset(tmp_path / "again", max_shard_size=shard)
    assert_same(one, keras_hub.models.LlamaBackbone.from_preset(str(tmp_path / "again")), 0)


def test_a_preset_with_a_missing_shard(tmp_path):
    llama().save_to_preset(tmp_path, max_shard_size=1e-5)
    gone = sorted(tmp_path.glob("model_*.weights.h5"))[-1]
    gone.unlink()
    with MESHES["tensor"]().scope(), pytest.raises(FileNotFoundError, match=gone.name):
        keras_hub.models.LlamaBackbone.from_preset(str(tmp_path))


def test_a_preset_of_another_model(strategy, tmp_path):
    llama().save_to_preset(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["config"]["hidden_dim"] = 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    with strategy.scope(), pytest.raises(tfpar.FileError, match="of another model"):
        keras_hub.models.LlamaBackbone.from_preset(str(tmp_path))
    with strategy.scope(), pytest.raises(ValueError, match="GPT2"):
        keras_hub.models.GPT2Backbone.from_preset(str(tmp_path))
